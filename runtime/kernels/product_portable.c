/* The specification: one row, one token, one input at a time. */
#include <math.h>
#include <string.h>

#include "tile.h"

static uint32_t nibble(const uint8_t *plane, int32_t row, int32_t input) {
  uint8_t byte = plane[FLRC_LINE * (input / 8) + 4 * row + input % 4];
  return input / 4 % 2 ? byte >> 4 : byte & 15;
}

static uint32_t pair(const uint8_t *plane, int32_t row, int32_t input) {
  uint8_t byte = plane[FLRC_LINE * (input / 16) + 4 * row + input % 4];
  return byte >> (2 * (input / 4 % 4)) & 3;
}

static uint32_t bit(const uint8_t *plane, int32_t row, int32_t input) {
  return plane[4 * row + input % 4] >> (input / 4) & 1;
}

static uint32_t integer(const uint8_t *tile, int32_t width, int32_t row, int32_t input) {
  switch (width) {
  case 8:
    return nibble(tile, row, input) << 4 | nibble(tile + 4 * FLRC_LINE, row, input);
  case 6:
    return nibble(tile, row, input) << 2 | pair(tile + 4 * FLRC_LINE, row, input);
  case 5:
    return nibble(tile, row, input) << 1 | bit(tile + 4 * FLRC_LINE, row, input);
  case 4:
    return nibble(tile, row, input);
  case 3:
    return pair(tile, row, input) << 1 | bit(tile + 2 * FLRC_LINE, row, input);
  default:
    return pair(tile, row, input);
  }
}

static float scale_of(uint8_t byte) {
  uint32_t bits = (uint32_t)(byte & 0x80) << 24 | (uint32_t)(byte & 0x7f) << 20;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

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
            dot += (int32_t)integer(at.tile, plane->width, row, k) * q[k];
          dot -= flrc_zero(plane->width) * x->sums[place];
          sum = fmaf((float)dot, scale_of(at.scales[row]) * flrc_factor(plane, x->scales[place]), sum);
        }
        out[row] = add ? out[row] + sum : sum;
      }
    }
  }
}
