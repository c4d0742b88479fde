/* A token's activations before they are multiplied: gate, norms, residual, and the rounding to int8 in blocks.
 *
 * Included by vector_<isa>.c. The order of every sum is fixed: squares in 16 lanes (a column's lane is its number mod 16),
 * then v16_sum. So bytes are the same on every instruction set.
 */
#include "flrc_product.h"

/* Sixteen columns from `i` on, those that are not there 0. */
INLINE v16 some(const float *from, int32_t i, int32_t columns) {
  if (i + 16 <= columns) return v16_load(from + i);
  float few[16] = {0};
  if (i < columns) memcpy(few, from + i, (size_t)(columns - i) * sizeof *few);
  return v16_load(few);
}

INLINE void keep(float *to, int32_t i, int32_t columns, v16 v) {
  if (i + 16 <= columns) {
    v16_store(to + i, v);
  } else if (i < columns) {
    float few[16];
    v16_store(few, v);
    memcpy(to + i, few, (size_t)(columns - i) * sizeof *few);
  }
}

INLINE v16 gated(const flrc_prologue *p, int32_t i) {
  v16 x = some(p->x, i, p->columns);
  if (!p->gate) return x;
  v16 gate = some(p->gate, i, p->columns);
  return v16_mul(p->gelu ? v16_gelu_tanh(gate) : v16_silu(gate), x);
}

INLINE v16 weighted(v16 x, float factor, const float *weights, int32_t i, int32_t columns) {
  return v16_mul(v16_mul(x, v16_set(factor)), some(weights, i, columns));
}

INLINE v16 added(const flrc_prologue *p, int32_t i, float post) {
  v16 x = gated(p, i);
  if (p->post_norm) x = weighted(x, post, p->post_norm, i, p->columns);
  return p->residual ? v16_add(x, some(p->residual, i, p->columns)) : x;
}

/* 1 / root of the mean of squares; no number if their sum is none. */
INLINE float of_norm(const flrc_prologue *p, v16 squares) {
  float sum = v16_sum(squares);
  return 1.0f / sqrtf(sum / (float)p->columns + p->epsilon) + (sum - sum);
}

/* One block: to nearest, ties to even, in steps of its largest magnitude / 127; all 0 if a value is not finite. */
INLINE bool round_block(v16 a, v16 b, int8_t *integers, float *scale, int32_t *sum) {
  v16 none = v16_set(0.0f);
  bool finite = v16_sum(v16_fma(a, none, v16_mul(b, none))) == 0; /* NaN and infinities times 0 are NaN */
  float most = v16_most(v16_max(v16_abs(a), v16_abs(b)));
  if (!finite || !(most > 1e-30f)) { /* smaller ones are zero: 127 / most would not be finite */
    memset(integers, 0, FLRC_BLOCK);
    *scale = 0;
    *sum = 0;
    return finite;
  }
  v16 inverse = v16_set(127.0f / most);
  a = v16_round(v16_mul(a, inverse));
  b = v16_round(v16_mul(b, inverse));
  v16_store_int8(integers, a);
  v16_store_int8(integers + 16, b);
  *scale = most / 127.0f;
  *sum = (int32_t)v16_sum(v16_add(a, b)); /* small integers: exact */
  return true;
}

bool FLRC_NAME(flrc_prepare)(const flrc_prologue *p, int32_t first, int32_t last, const flrc_prepared *out) {
  float post = 0, factor = 0;
  v16 squares = v16_set(0.0f);
  if (p->post_norm) {
    for (int32_t i = 0; i < p->columns; i += 16) {
      v16 x = gated(p, i);
      squares = v16_fma(x, x, squares);
    }
    post = of_norm(p, squares);
    squares = v16_set(0.0f);
  }
  if (p->residual || p->norm) {
    int32_t end = last * FLRC_BLOCK < p->columns ? last * FLRC_BLOCK : p->columns;
    for (int32_t i = first * FLRC_BLOCK; i < end; i += 16) {
      v16 x = added(p, i, post);
      if (p->residual) keep(p->sum, i, p->columns, x);
      squares = v16_fma(x, x, squares);
    }
    factor = of_norm(p, squares);
  }
  bool finite = true;
  for (int32_t b = first; b < last; b++) {
    v16 x[2];
    for (int half = 0; half < 2; half++) {
      int32_t i = b * FLRC_BLOCK + 16 * half;
      x[half] = p->residual ? some(p->sum, i, p->columns) : added(p, i, post);
      if (p->norm) x[half] = weighted(x[half], factor, p->norm, i, p->columns);
      if (out->floats) v16_store(out->floats + i, x[half]);
    }
    int8_t unread[FLRC_BLOCK];
    float scale;
    int32_t sum;
    if (out->integers)
      finite &= round_block(x[0], x[1], out->integers + b * FLRC_BLOCK, out->scales + b, out->sums + b);
    else
      finite &= round_block(x[0], x[1], unread, &scale, &sum);
  }
  return finite;
}
