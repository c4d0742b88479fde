/* The specification: one row, one token, one input at a time. */
#include <math.h>

#include "tile.h"

void flrc_product_portable(const flrc_plane *plane, const flrc_inputs *x, int32_t first, int32_t last, float *y,
                           ptrdiff_t stride, bool add) {
  size_t size = flrc_group_bytes(plane);
  for (int32_t group = first; group < last; group++) {
    for (int32_t t = 0; t < x->tokens; t++) {
      float *out = y + t * stride + FLRC_ROWS * group;
      for (int32_t row = 0; row < FLRC_ROWS; row++) {
        float sum = 0;
        for (int32_t b = 0; b < x->blocks; b++) {
          flrc_block at = flrc_block_at(plane->data + (size_t)group * size, b, plane->width);
          size_t place = (size_t)t * (size_t)x->stride + (size_t)b;
          const int8_t *q = x->integers + place * FLRC_BLOCK;
          int32_t dot = 0;
          for (int32_t k = 0; k < FLRC_BLOCK; k++)
            dot += (int32_t)flrc_integer(at.tile, plane->width, row, k) * q[k];
          dot -= flrc_zero(plane->width) * x->sums[place];
          sum = fmaf((float)dot, flrc_scale_of(at.scales[row]) * flrc_factor(plane, x->scales[place]), sum);
        }
        out[row] = add ? out[row] + sum : sum;
      }
    }
  }
}
