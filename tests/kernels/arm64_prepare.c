/* Reads tokens from standard input, writes what NEON and the portable code make of each before it is multiplied, and of its
 * product with a plane of floats.
 */
#include <stdio.h>
#include <stdlib.h>

#include "flrc_product.h"

static void *taken(size_t size) {
  void *data = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
  if (!data || fread(data, 1, size, stdin) != size) exit(2);
  return data;
}

int main(void) {
  int32_t head[7]; /* columns; whether there are gate, post_norm, residual, norm; gelu; groups of the plane */
  while (fread(head, sizeof head, 1, stdin) == 1) {
    size_t columns = (size_t)head[0], blocks = (columns + 31) / 32;
    flrc_prologue p = {.columns = head[0], .gelu = head[5], .epsilon = 1e-5f};
    p.x = taken(4 * columns);
    if (head[1]) p.gate = taken(4 * columns);
    if (head[2]) p.post_norm = taken(4 * columns);
    if (head[3]) p.residual = taken(4 * columns);
    if (head[4]) p.norm = taken(4 * columns);
    flrc_plane plane = {taken(2048 * blocks * (size_t)head[6]), head[6], (int32_t)blocks, FLRC_FLOAT, 1};
    for (int i = 0; i < 2; i++) {
      flrc_prepared out = {calloc(blocks, 32), calloc(blocks, 4), calloc(blocks, 4), calloc(blocks, 128)};
      float *y = calloc((size_t)head[6], 64);
      p.sum = calloc(columns, 4);
      if (!(i ? flrc_prepare_portable : flrc_prepare_neon)(&p, 0, (int32_t)blocks, &out)) return 4;
      flrc_inputs x = {NULL, NULL, NULL, 1, (int32_t)blocks, (int32_t)blocks, out.floats};
      (i ? flrc_floats_portable : flrc_floats_neon)(&plane, &x, 0, head[6], y, 16 * head[6], false);
      fwrite(out.integers, 32, blocks, stdout);
      fwrite(out.scales, 4, blocks, stdout);
      fwrite(out.sums, 4, blocks, stdout);
      fwrite(out.floats, 128, blocks, stdout);
      fwrite(p.sum, 4, columns, stdout);
      fwrite(y, 64, (size_t)head[6], stdout);
    }
  }
  return 0;
}
