/* Reads products from standard input, writes what NEON and the portable code make of each. */
#include <stdio.h>
#include <stdlib.h>

#include "flrc_product.h"

static void *taken(size_t size) {
  void *data = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
  if (!data || fread(data, 1, size, stdin) != size) exit(2);
  return data;
}

int main(void) {
  int32_t head[7]; /* groups, stored blocks, width, tokens, read blocks, add, bytes of the plane */
  while (fread(head, sizeof head, 1, stdin) == 1) {
    size_t tokens = (size_t)head[3], blocks = (size_t)head[1], rows = 16 * (size_t)head[0];
    float *unit = taken(sizeof(float));
    flrc_plane plane = {taken((size_t)head[6]), head[0], head[1], head[2], *unit};
    flrc_inputs x = {taken(tokens * blocks * FLRC_BLOCK), taken(4 * tokens * blocks), taken(4 * tokens * blocks),
                     head[3], head[1], head[4], NULL};
    for (int i = 0; i < 2; i++) {
      float *y = taken(4 * tokens * rows);
      (i ? flrc_product_portable : flrc_product_neon)(&plane, &x, 0, head[0], y, (ptrdiff_t)rows, head[5] != 0);
      fwrite(y, 4, tokens * rows, stdout);
    }
  }
  return flrc_best_isa()->product == flrc_product_neon ? 0 : 3;
}
