/* The arithmetic of attention, sixteen floats at a time. Included by vector_<isa>.c behind vec.h and FLRC_NAME.
 *
 * FLRC_ROWS_AT_ONCE, FLRC_BLOCKS_AT_ONCE and FLRC_VECTORS_AT_ONCE say how many sums grow in registers; they change no result.
 */
#include "flrc_attention.h"

#define LEAST (-3.0e38f) /* the score of what a query does not see, until its weight becomes 0 */
#if defined(FLRC_PORTABLE)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

typedef struct {
  const float *q;               /* [rows][wide], scaled */
  int32_t rows, wide;
  int32_t from[FLRC_MOST_ROWS]; /* positions that a row sees: from .. to - 1 */
  int32_t to[FLRC_MOST_ROWS];
} rows_of_tile;

INLINE int32_t wide_of(const flrc_attention *a) { return (a->dim + 15) / 16 * 16; }
INLINE int64_t size_of(int cache) { return cache == FLRC_CACHE_FLOAT ? 4 : cache == FLRC_CACHE_HALF ? 2 : 1; }

/* Sixteen elements of a block, from the i-th on. */
INLINE v16 cached(const uint8_t *block, int64_t i, int cache) {
  const uint8_t *at = block + i * size_of(cache);
  if (cache == FLRC_CACHE_FLOAT) return v16_load((const float *)(const void *)at);
  if (cache == FLRC_CACHE_HALF) return v16_load_half((const uint16_t *)(const void *)at);
  return v16_load_int8((const int8_t *)(const void *)at);
}

/* Eight elements and eight zeros. */
INLINE v16 cached_8(const uint8_t *block, int64_t i, int cache) {
  uint8_t sixteen[64] = {0};
  memcpy(sixteen, block + i * size_of(cache), 8 * (size_t)size_of(cache));
  return cached(sixteen, 0, cache);
}

INLINE const float *scales_of_block(const flrc_attention *a, const uint8_t *block) {
  return (const float *)(const void *)(block + 16 * (int64_t)a->dim);
}

/* One head of one token: normed, rotated and scaled; filled up with zeros. */
INLINE void prepared(const flrc_attention *a, const float *in, const float *norm, int32_t position, float scale, float *out) {
  int32_t dim = a->dim, wide = wide_of(a);
  memcpy(out, in, (size_t)dim * sizeof *out);
  for (int32_t i = dim; i < wide; i++) out[i] = 0;
  if (norm) {
    v16 squares = v16_set(0);
    for (int32_t i = 0; i < wide; i += 16) {
      v16 x = v16_load(out + i);
      squares = v16_fma(x, x, squares);
    }
    float r = 1.0f / sqrtf(v16_sum(squares) / (float)dim + a->epsilon);
    for (int32_t i = 0; i < dim; i++) out[i] = out[i] * r * norm[i];
  }
  if (a->cos) {
    int32_t half = a->rotated;
    const float *cos = a->cos + (int64_t)position * half, *sin = a->sin + (int64_t)position * half;
    for (int32_t i = 0; i < half; i++) {
      float x = out[i], y = out[half + i];
      out[i] = x * cos[i] - y * sin[i];
      out[half + i] = y * cos[i] + x * sin[i];
    }
  }
  if (scale != 1.0f)
    for (int32_t i = 0; i < dim; i++) out[i] *= scale;
}

/* To int8 as flrc_quantize does; returns the scale. What is not finite becomes zeros and a scale that is not a number. */
INLINE float to_int8(const float *in, int32_t wide, int8_t *out) {
  v16 most = v16_set(0), none = v16_set(0);
  for (int32_t i = 0; i < wide; i += 16) {
    v16 x = v16_load(in + i);
    most = v16_max(v16_abs(x), most);
    none = v16_fma(x, v16_set(0), none);
  }
  float largest = v16_most(most);
  bool finite = v16_sum(none) == 0;
  if (!finite || !(largest > 1e-30f)) {
    memset(out, 0, (size_t)wide);
    return finite ? 0 : NAN;
  }
  v16 inverse = v16_set(127.0f / largest);
  for (int32_t i = 0; i < wide; i += 16) v16_store_int8(out + i, v16_round(v16_mul(v16_load(in + i), inverse)));
  return largest / 127.0f;
}

static void FLRC_NAME(append)(const flrc_attention *a, int32_t kv_head, int32_t first, int32_t last) {
  int32_t dim = a->dim, wide = wide_of(a);
  float row[FLRC_MOST_DIM];
  uint16_t halves[FLRC_MOST_DIM];
  int8_t integers[FLRC_MOST_DIM];
  for (int32_t t = first; t < last; t++) {
    int32_t position = a->past + t, lane = position % 16;
    int64_t place = kv_head * a->head_bytes + position / 16 * a->block_bytes;
    int64_t of_token = ((int64_t)t * a->kv_heads + kv_head) * dim;
    for (int is_value = 0; is_value < 2; is_value++) {
      uint8_t *block = (is_value ? a->values : a->keys) + place;
      uint8_t *line = block + lane * dim * size_of(a->cache); /* of a value */
      if (is_value) {
        memcpy(row, a->v + of_token, (size_t)dim * sizeof *row);
        for (int32_t i = dim; i < wide; i++) row[i] = 0;
      } else {
        prepared(a, a->k + of_token, a->k_norm, position, 1.0f, row);
      }
      if (a->cache == FLRC_CACHE_FLOAT) {
        if (is_value) memcpy(line, row, 4 * (size_t)dim);
        else for (int32_t i = 0; i < dim; i++) memcpy(block + 4 * (16 * (int64_t)i + lane), row + i, 4);
      } else if (a->cache == FLRC_CACHE_HALF) {
        for (int32_t i = 0; i < wide; i += 16) v16_store_half(halves + i, v16_load(row + i));
        if (is_value) memcpy(line, halves, 2 * (size_t)dim);
        else for (int32_t i = 0; i < dim; i++) memcpy(block + 2 * (16 * (int64_t)i + lane), halves + i, 2);
      } else {
        float scale = to_int8(row, wide, integers);
        if (is_value) memcpy(line, integers, (size_t)dim);
        else for (int32_t i = 0; i < dim; i++) block[16 * (int64_t)i + lane] = (uint8_t)integers[i];
        memcpy(block + 16 * (int64_t)dim + 4 * lane, &scale, 4);
      }
    }
  }
}

/* Scores of some rows and some blocks behind one another. */
INLINE void some_scores(const flrc_attention *a, const uint8_t *block, const float *q, int32_t wide, int cache, int rows,
                        int blocks, float *scores) {
  v16 sum[FLRC_ROWS_AT_ONCE][FLRC_BLOCKS_AT_ONCE];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < blocks; b++) sum[r][b] = v16_set(0);
  int32_t dim = a->dim;
  for (int32_t i = 0; i < dim; i++) {
    v16 key[FLRC_BLOCKS_AT_ONCE];
    UNROLL for (int b = 0; b < blocks; b++) key[b] = cached(block + b * a->block_bytes, 16 * (int64_t)i, cache);
    UNROLL for (int r = 0; r < rows; r++) {
      v16 x = v16_set(q[r * wide + i]);
      UNROLL for (int b = 0; b < blocks; b++) sum[r][b] = v16_fma(x, key[b], sum[r][b]);
    }
  }
  UNROLL for (int b = 0; b < blocks; b++) {
    if (cache == FLRC_CACHE_INT8) {
      v16 scales = v16_load(scales_of_block(a, block + b * a->block_bytes));
      UNROLL for (int r = 0; r < rows; r++) sum[r][b] = v16_mul(sum[r][b], scales);
    }
    UNROLL for (int r = 0; r < rows; r++) v16_store(scores + r * FLRC_CHUNK + 16 * b, sum[r][b]);
  }
}

/* Scores of all rows, of blocks first .. last - 1 of a chunk. */
INLINE void scores_of(const flrc_attention *a, const uint8_t *chunk, const rows_of_tile *rows, int32_t first, int32_t last,
                      int cache, float *scores) {
  int32_t b = first;
  while (b < last) {
    int32_t blocks = last - b >= FLRC_BLOCKS_AT_ONCE ? FLRC_BLOCKS_AT_ONCE : 1;
    const uint8_t *block = chunk + b * a->block_bytes;
    int32_t r = 0;
#define FLRC_SOME(n)                                                                                                         \
  for (; r + n <= rows->rows; r += n) {                                                                                      \
    const float *q = rows->q + r * rows->wide;                                                                               \
    float *out = scores + r * FLRC_CHUNK + 16 * b;                                                                           \
    if (blocks == 1) some_scores(a, block, q, rows->wide, cache, n, 1, out);                                                 \
    else some_scores(a, block, q, rows->wide, cache, n, FLRC_BLOCKS_AT_ONCE, out);                                           \
  }
    FLRC_OVER_ROWS(FLRC_SOME)
#undef FLRC_SOME
    b += blocks;
  }
}

/* cap * tanh(x / cap) */
INLINE v16 capped(v16 x, float cap) {
  v16 e = v16_exp(v16_mul(x, v16_set(2.0f / cap)));
  return v16_sub(v16_set(cap), v16_div(v16_set(2.0f * cap), v16_add(e, v16_set(1.0f))));
}

/* A row's scores become weights; from .. to - 1 of the chunk are seen. */
INLINE void weigh(const flrc_attention *a, float *row, int32_t from, int32_t to, float *most, float *total) {
  int32_t first = from / 16 * 16, last = (to + 15) / 16 * 16;
  v16 largest = v16_set(LEAST), sum = v16_set(0);
  if (a->softcap > 0)
    for (int32_t i = first; i < last; i += 16) v16_store(row + i, capped(v16_load(row + i), a->softcap));
  for (int32_t i = first; i < from; i++) row[i] = LEAST;
  for (int32_t i = to; i < last; i++) row[i] = LEAST;
  for (int32_t i = first; i < last; i += 16) largest = v16_max(v16_load(row + i), largest);
  *most = v16_most(largest);
  v16 all = v16_set(*most);
  for (int32_t i = first; i < last; i += 16) v16_store(row + i, v16_exp(v16_sub(v16_load(row + i), all)));
  for (int32_t i = first; i < from; i++) row[i] = 0;
  for (int32_t i = to; i < last; i++) row[i] = 0;
  for (int32_t i = first; i < last; i += 16) sum = v16_add(sum, v16_load(row + i));
  *total = v16_sum(sum);
}

/* How a chunk's sums come to those before it, a row each: keep * what was there + take * the chunk's; keep < 0: alone. */
typedef struct {
  float keep[FLRC_MOST_ROWS], take[FLRC_MOST_ROWS];
} mixture;

/* Puts maxima and totals of a chunk together with those before it. */
INLINE void mix(flrc_partial all, const float *most, const float *total, int32_t rows, mixture *how) {
  for (int32_t r = 0; r < rows; r += 16) {
    float before[16], after[16], larger[16];
    for (int32_t i = 0; i < 16; i++) {
      bool is = r + i < rows;
      before[i] = is ? all.most[r + i] : 0;
      after[i] = is ? most[r + i] : 0;
      larger[i] = after[i] > before[i] ? after[i] : before[i];
    }
    v16 m = v16_load(larger);
    v16_store(how->keep + r, v16_exp(v16_sub(v16_load(before), m)));
    v16_store(how->take + r, v16_exp(v16_sub(v16_load(after), m)));
    for (int32_t i = 0; i < 16 && r + i < rows; i++) {
      int32_t at = r + i;
      if (total[at] == 0) continue;
      if (all.total[at] == 0) {
        how->keep[at] = -1.0f;
        all.most[at] = most[at];
        all.total[at] = total[at];
      } else {
        all.most[at] = larger[i];
        all.total[at] = fmaf(total[at], how->take[at], all.total[at] * how->keep[at]);
      }
    }
  }
}

/* The sums of values of some rows and some dims over one chunk, put together with what `sums` holds. */
INLINE void some_values(const flrc_attention *a, const uint8_t *chunk, int32_t begin, const rows_of_tile *rows, int32_t row,
                        int32_t dim, const float *weights, const mixture *how, float *sums, int cache, int count, int vectors,
                        bool eight) {
  v16 sum[FLRC_ROWS_AT_ONCE][FLRC_VECTORS_AT_ONCE];
  int32_t from[FLRC_ROWS_AT_ONCE], to[FLRC_ROWS_AT_ONCE];
  int32_t least = FLRC_CHUNK, low = 0, high = FLRC_CHUNK, most = 0; /* seen by any, by all of them */
  UNROLL for (int r = 0; r < count; r++) {
    from[r] = rows->from[row + r] - begin > 0 ? rows->from[row + r] - begin : 0;
    to[r] = rows->to[row + r] - begin < FLRC_CHUNK ? rows->to[row + r] - begin : FLRC_CHUNK;
    if (from[r] > to[r]) from[r] = to[r] = to[r] < 0 ? 0 : to[r];
    if (from[r] < to[r]) {
      least = from[r] < least ? from[r] : least;
      most = to[r] > most ? to[r] : most;
    }
    low = from[r] > low ? from[r] : low;
    high = to[r] < high ? to[r] : high;
    UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = v16_set(0);
  }
  if (low >= high) low = high = most;
  const float *of_row = weights + row * FLRC_CHUNK;
  int32_t p = least;
#define FLRC_POSITIONS(until, is_seen)                                                                                       \
  for (; p < until; p++) {                                                                                                   \
    const uint8_t *block = chunk + (p >> 4) * a->block_bytes;                                                                \
    int64_t place = (p & 15) * (int64_t)a->dim + dim;                                                                        \
    v16 value[FLRC_VECTORS_AT_ONCE];                                                                                         \
    UNROLL for (int v = 0; v < vectors; v++) {                                                                               \
      value[v] = eight ? cached_8(block, place, cache) : cached(block, place + 16 * v, cache);                               \
    }                                                                                                                        \
    UNROLL for (int r = 0; r < count; r++) {                                                                                 \
      if (!(is_seen)) continue;                                                                                              \
      v16 weight = v16_set(of_row[r * FLRC_CHUNK + p]);                                                                      \
      UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = v16_fma(weight, value[v], sum[r][v]);                             \
    }                                                                                                                        \
  }
  FLRC_POSITIONS(low, p >= from[r] && p < to[r])
  FLRC_POSITIONS(high, true)
  FLRC_POSITIONS(most, p >= from[r] && p < to[r])
#undef FLRC_POSITIONS
  UNROLL for (int r = 0; r < count; r++) {
    if (from[r] >= to[r]) continue;
    float *out = sums + (row + r) * rows->wide + dim;
    float keep = how ? how->keep[row + r] : -1.0f;
    UNROLL for (int v = 0; v < vectors; v++) {
      v16 now = sum[r][v];
      if (!(keep < 0)) now = v16_fma(now, v16_set(how->take[row + r]), v16_mul(v16_load(out + 16 * v), v16_set(keep)));
      v16_store(out + 16 * v, now);
    }
  }
}

/* The sums of values of all rows and dims over one chunk, that begins at position `begin`. */
INLINE void values_of(const flrc_attention *a, const uint8_t *chunk, int32_t begin, const rows_of_tile *rows,
                      const float *weights, const mixture *how, int cache, float *sums) {
  int32_t step = 0;
  for (int32_t d = 0; d < a->dim; d += step) {
    bool many = a->dim - d >= 16 * FLRC_VECTORS_AT_ONCE, eight = a->dim - d < 16;
    int32_t r = 0;
#define FLRC_SOME(n)                                                                                                         \
  for (; r + n <= rows->rows; r += n) {                                                                                      \
    if (many)                                                                                                                \
      some_values(a, chunk, begin, rows, r, d, weights, how, sums, cache, n, FLRC_VECTORS_AT_ONCE, false);                   \
    else if (eight) some_values(a, chunk, begin, rows, r, d, weights, how, sums, cache, n, 1, true);                         \
    else some_values(a, chunk, begin, rows, r, d, weights, how, sums, cache, n, 1, false);                                   \
  }
    FLRC_OVER_ROWS(FLRC_SOME)
#undef FLRC_SOME
    step = many ? 16 * FLRC_VECTORS_AT_ONCE : 16;
  }
}

/* Writes y of a tile. */
INLINE void finish(const flrc_attention *a, const flrc_tile *tile, flrc_partial all) {
  int32_t wide = wide_of(a), row = 0;
  for (int32_t t = tile->token; t < tile->token + tile->tokens; t++) {
    for (int32_t h = tile->head; h < tile->head + tile->heads; h++, row++) {
      float *y = a->y + ((int64_t)t * a->heads + h) * a->dim, inverse = 1.0f / all.total[row];
      const float *sums = all.sums + row * wide;
      for (int32_t i = 0; i < a->dim; i++) y[i] = sums[i] * inverse;
    }
  }
}

static void FLRC_NAME(together)(const flrc_attention *a, const flrc_tile *tile, flrc_partial all, float *apart,
                                int32_t count, bool last) {
  int32_t wide = wide_of(a), rows = tile->heads * tile->tokens;
  for (int32_t c = 0; c < count; c++) {
    flrc_partial chunk = flrc_partial_at(apart, rows, wide, c);
    mixture how;
    mix(all, chunk.most, chunk.total, rows, &how);
    for (int32_t r = 0; r < rows; r++) {
      if (chunk.total[r] == 0) continue;
      float *out = all.sums + r * wide, keep = how.keep[r];
      const float *in = chunk.sums + r * wide;
      for (int32_t i = 0; i < wide; i += 16) {
        v16 now = v16_load(in + i);
        if (!(keep < 0)) now = v16_fma(now, v16_set(how.take[r]), v16_mul(v16_load(out + i), v16_set(keep)));
        v16_store(out + i, now);
      }
    }
  }
  if (last) finish(a, tile, all);
}

INLINE void chunks_of(const flrc_attention *a, const flrc_tile *tile, int32_t first, int32_t last, float *apart,
                      int cache) {
  float q[FLRC_TILE_FLOATS], weights[FLRC_MOST_ROWS * FLRC_CHUNK];
  float mosts[FLRC_MOST_ROWS], totals[FLRC_MOST_ROWS], sums[FLRC_TILE_FLOATS];
  flrc_partial all = {mosts, totals, sums};
  rows_of_tile rows = {q, tile->heads * tile->tokens, wide_of(a), {0}, {0}};
  int32_t row = 0, least = INT32_MAX, most = 0;
  for (int32_t t = tile->token; t < tile->token + tile->tokens; t++) {
    int32_t position = a->past + t;
    for (int32_t h = tile->head; h < tile->head + tile->heads; h++, row++) {
      prepared(a, a->q + ((int64_t)t * a->heads + h) * a->dim, a->q_norm, position, a->scale, q + row * rows.wide);
      rows.to[row] = position + 1;
      rows.from[row] = a->window > 0 && position >= a->window ? position + 1 - a->window : 0;
      all.total[row] = 0;
      all.most[row] = 0;
      least = rows.from[row] < least ? rows.from[row] : least;
      most = position + 1;
    }
  }
  int64_t head = tile->head / (a->heads / a->kv_heads) * a->head_bytes;
  for (int32_t c = first; c < last; c++) {
    int32_t begin = c * FLRC_CHUNK, end = begin + FLRC_CHUNK;
    int32_t low = least > begin ? least : begin, high = most < end ? most : end;
    int64_t place = head + begin / 16 * a->block_bytes;
    flrc_partial into = apart ? flrc_partial_at(apart, rows.rows, rows.wide, c - first) : all;
    float largest[FLRC_MOST_ROWS] = {0}, total[FLRC_MOST_ROWS] = {0};
    mixture how;
    if (low < high) {
      scores_of(a, a->keys + place, &rows, (low - begin) / 16, (high - begin + 15) / 16, cache, weights);
      for (int32_t r = 0; r < rows.rows; r++) {
        int32_t from = (rows.from[r] > begin ? rows.from[r] : begin) - begin;
        int32_t to = (rows.to[r] < end ? rows.to[r] : end) - begin;
        if (from >= to) continue;
        float *of_row = weights + r * FLRC_CHUNK;
        weigh(a, of_row, from, to, largest + r, total + r);
        if (cache == FLRC_CACHE_INT8) {
          for (int32_t b = from / 16; b < (to + 15) / 16; b++) {
            const float *scales = scales_of_block(a, a->values + place + b * a->block_bytes);
            v16_store(of_row + 16 * b, v16_mul(v16_load(of_row + 16 * b), v16_load(scales)));
          }
        }
      }
    }
    if (apart) {
      memcpy(into.most, largest, sizeof largest);
      memcpy(into.total, total, sizeof total);
    } else {
      mix(all, largest, total, rows.rows, &how);
    }
    if (low < high) values_of(a, a->values + place, begin, &rows, weights, apart ? NULL : &how, cache, into.sums);
  }
  if (!apart) finish(a, tile, all);
}

static void FLRC_NAME(attend)(const flrc_attention *a, const flrc_tile *tile, int32_t first, int32_t last,
                              float *apart) {
  if (a->cache == FLRC_CACHE_FLOAT) chunks_of(a, tile, first, last, apart, FLRC_CACHE_FLOAT);
  else if (a->cache == FLRC_CACHE_HALF) chunks_of(a, tile, first, last, apart, FLRC_CACHE_HALF);
  else chunks_of(a, tile, first, last, apart, FLRC_CACHE_INT8);
}

const flrc_attention_isa FLRC_NAME(flrc_attention) = {FLRC_NAME(append), FLRC_NAME(attend), FLRC_NAME(together)};
