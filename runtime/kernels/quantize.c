/* Activations to int8: to nearest, ties to even, a scale a block. */
#include <math.h>
#include <string.h>

#include "flrc_product.h"

bool flrc_quantize(const float *x, int32_t blocks, int8_t *integers, float *scales, int32_t *sums) {
  bool finite = true;
  for (int32_t b = 0; b < blocks; b++) {
    const float *in = x + FLRC_BLOCK * b;
    int8_t *out = integers + FLRC_BLOCK * b;
    float most = 0;
    bool of_block = true;
    for (int32_t k = 0; k < FLRC_BLOCK; k++) {
      float size = fabsf(in[k]);
      of_block &= size <= 3.402823466e38f; /* false for NaN, too */
      most = size > most ? size : most;
    }
    finite &= of_block;
    memset(out, 0, FLRC_BLOCK);
    scales[b] = 0;
    sums[b] = 0;
    if (!of_block || !(most > 1e-30f)) continue; /* smaller ones are zero: 127 / most would not be finite */
    float inverse = 127.0f / most;
    int32_t sum = 0;
    for (int32_t k = 0; k < FLRC_BLOCK; k++) {
      /* Adding and taking away 1.5 * 2^23 rounds as rintf does, and can be done for many at once. */
      float shifted = in[k] * inverse + 12582912.0f;
      int32_t q = (int32_t)(shifted - 12582912.0f);
      out[k] = (int8_t)q;
      sum += q;
    }
    scales[b] = most / 127.0f;
    sums[b] = sum;
  }
  return finite;
}
