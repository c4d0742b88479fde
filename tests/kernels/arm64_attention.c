/* Reads attention's inputs from standard input, writes what NEON and the portable code make of each: y, keys, values. */
#include <stdio.h>
#include <stdlib.h>

#include "flrc_attention.h"

static void *taken(size_t size) {
  void *data = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
  if (!data || fread(data, 1, size, stdin) != size) exit(2);
  return data;
}

int main(void) {
  int32_t head[9]; /* heads, of the cache, dim, cache, window, rotated, tokens, bytes of a block, blocks */
  float numbers[3]; /* scale, soft cap, epsilon */
  while (fread(head, sizeof head, 1, stdin) == 1 && fread(numbers, sizeof numbers, 1, stdin) == 1) {
    size_t tokens = (size_t)head[6], dim = (size_t)head[2], row = (size_t)head[0] * dim, kv_row = (size_t)head[1] * dim;
    size_t bytes = (size_t)head[1] * (size_t)head[8] * (size_t)head[7];
    flrc_attention a = {.heads = head[0], .kv_heads = head[1], .dim = head[2], .cache = head[3], .window = head[4],
                        .rotated = head[5], .scale = numbers[0], .softcap = numbers[1], .epsilon = numbers[2],
                        .tokens = head[6], .block_bytes = head[7], .head_bytes = (int64_t)head[7] * head[8]};
    a.q = taken(4 * tokens * row);
    a.k = taken(4 * tokens * kv_row);
    a.v = taken(4 * tokens * kv_row);
    a.cos = taken(4 * tokens * (size_t)head[5]);
    a.sin = taken(4 * tokens * (size_t)head[5]);
    a.q_norm = taken(4 * dim);
    a.k_norm = taken(4 * dim);
    for (int i = 0; i < 2; i++) {
      const flrc_attention_isa *isa = i ? &flrc_attention_portable : &flrc_attention_neon;
      a.y = calloc(tokens * row, 4);
      a.keys = calloc(bytes, 1);
      a.values = calloc(bytes, 1);
      if (!a.y || !a.keys || !a.values) return 2;
      int32_t group = a.heads / a.kv_heads;
      for (int32_t h = 0; h < a.kv_heads; h++) {
        isa->append(&a, h, 0, a.tokens);
        for (int32_t t = 0; t < a.tokens; t += 3) {
          flrc_tile tile = {h * group, group, t, t + 3 < a.tokens ? 3 : a.tokens - t};
          isa->attend(&a, &tile, 0, (t + tile.tokens - 1) / FLRC_CHUNK + 1, NULL);
        }
      }
      fwrite(a.y, 4, tokens * row, stdout);
      fwrite(a.keys, 1, bytes, stdout);
      fwrite(a.values, 1, bytes, stdout);
    }
  }
  return 0;
}
