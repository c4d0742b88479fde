/* Attention over a cache of keys and values: what the operator (attention.c) and the arithmetic (attend.h) agree on.
 *
 * The cache has blocks of 16 positions. A block of keys is [dim][16 positions], one of values [16 positions][dim], of float32,
 * float16 or int8; behind int8 stand 16 float32 scales, one a position (its largest magnitude / 127).
 *
 * One result everywhere. A query's positions are cut at multiples of 128; in such a chunk
 *   score[p]  = fma over dims in order from 0 of q[i] * key[i][p] (times p's scale), q being scaled before; then soft-capped
 *   weight[p] = exp(score[p] - the chunk's largest)
 *   total     = the weights in 16 lanes (p mod 16), blocks in order, then v16_sum
 *   y[i]      = fma over positions in order from 0 of weight[p] (times p's scale) * value[p][i]
 * and chunks are put together in their order: with m the larger of both maxima, what was there times exp(its - m), plus what
 * the chunk gave times exp(the chunk's - m). Positions that a query does not see are in none of these sums.
 */
#ifndef FLRC_ATTENTION_H
#define FLRC_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FLRC_LANES_OF_BLOCK 16 /* positions of a block */
#define FLRC_CHUNK 128         /* positions of a chunk */
#define FLRC_MOST_DIM 512
#define FLRC_MOST_ROWS 32      /* queries of a tile, each head by itself */
#define FLRC_TILE_FLOATS 4096  /* that a tile's queries hold at most, each filled up to a multiple of 16 */

enum { FLRC_CACHE_FLOAT, FLRC_CACHE_HALF, FLRC_CACHE_INT8 };

typedef struct {
  int32_t heads, kv_heads, dim;
  int32_t cache;    /* FLRC_CACHE_... */
  int32_t window;   /* 0: all */
  int32_t rotated;  /* half of the dims that are rotated */
  float scale, softcap, epsilon;
  int32_t tokens, past;
  const float *q, *k, *v; /* [tokens][heads * dim], [tokens][kv_heads * dim] twice */
  const float *cos, *sin; /* [positions][rotated], or NULL */
  const float *q_norm, *k_norm; /* [dim], or NULL */
  uint8_t *keys, *values; /* [kv_heads][blocks][block_bytes] */
  int64_t block_bytes, head_bytes;
  float *y; /* like q */
} flrc_attention;

/* Queries that share keys: some tokens, and some heads of those that read one head of the cache. */
typedef struct {
  int32_t head, heads, token, tokens;
} flrc_tile;

/* What chunks gave a tile's queries (rows: token by token, in it head by head). `total` 0: they see nothing of it. */
typedef struct {
  float *most, *total; /* [FLRC_MOST_ROWS] */
  float *sums;         /* [rows][dim filled up to a multiple of 16] */
} flrc_partial;

static inline size_t flrc_partial_floats(int32_t rows, int32_t wide) {
  return 2 * FLRC_MOST_ROWS + (size_t)rows * (size_t)wide;
}

static inline flrc_partial flrc_partial_at(float *memory, int32_t rows, int32_t wide, int32_t i) {
  float *at = memory + flrc_partial_floats(rows, wide) * (size_t)i;
  flrc_partial found = {at, at + FLRC_MOST_ROWS, at + 2 * FLRC_MOST_ROWS};
  return found;
}

/* Norms and rotates the keys of tokens first .. last - 1 for one head of the cache, and writes them and the values there. */
typedef void flrc_append(const flrc_attention *a, int32_t kv_head, int32_t first, int32_t last);

/* Goes over chunks first .. last - 1 for a tile. If `apart` is NULL, puts them together and writes y;
 * else writes what each chunk gave, one behind another (flrc_partial_at). */
typedef void flrc_attend(const flrc_attention *a, const flrc_tile *tile, int32_t first, int32_t last, float *apart);

/* Puts what `count` chunks gave together with what `all` holds, in order; writes y if `last`. */
typedef void flrc_together(const flrc_attention *a, const flrc_tile *tile, flrc_partial all, float *apart, int32_t count,
                           bool last);

typedef struct {
  flrc_append *append;
  flrc_attend *attend;
  flrc_together *together;
} flrc_attention_isa;

extern const flrc_attention_isa flrc_attention_portable, flrc_attention_avx2, flrc_attention_avx512, flrc_attention_neon;

#endif
