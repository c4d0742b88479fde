/* Products of planes of floats. Included by vector_<isa>.c. */
#include "flrc_product.h"

/* 16 rows of `count` tokens from `t` on. */
INLINE void float_rows(const float *group, const flrc_inputs *x, int32_t t, int count, float *y, ptrdiff_t stride,
                       bool add) {
  v16 sum[4];
  const float *from[4];
  for (int c = 0; c < count; c++) {
    sum[c] = v16_set(0.0f);
    from[c] = x->floats + (size_t)(t + c) * (size_t)x->stride * FLRC_BLOCK;
  }
  for (int32_t i = 0; i < x->blocks * FLRC_BLOCK; i++) {
    v16 weights = v16_load(group + FLRC_ROWS * (size_t)i);
    for (int c = 0; c < count; c++) sum[c] = v16_fma(v16_set(from[c][i]), weights, sum[c]);
  }
  for (int c = 0; c < count; c++) {
    float *out = y + (t + c) * stride;
    v16_store(out, add ? v16_add(v16_load(out), sum[c]) : sum[c]);
  }
}

void FLRC_NAME(flrc_floats)(const flrc_plane *plane, const flrc_inputs *x, int32_t first, int32_t last, float *y,
                            ptrdiff_t stride, bool add) {
  for (int32_t g = first; g < last; g++) {
    const float *group = (const float *)(const void *)(plane->data + (size_t)g * flrc_group_bytes(plane));
    int32_t t = 0;
    for (; t + 4 <= x->tokens; t += 4) float_rows(group, x, t, 4, y + FLRC_ROWS * g, stride, add);
    for (; t < x->tokens; t++) float_rows(group, x, t, 1, y + FLRC_ROWS * g, stride, add);
  }
}
