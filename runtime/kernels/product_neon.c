/* NEON with the instructions for sums of four products (dotprod): four consecutive inputs of 4 rows a register. */
#include <arm_neon.h>

#include "tile.h"

#define FLRC_TOKENS 4
#define INLINE static inline __attribute__((always_inline))

INLINE uint8x16_t line(const uint8_t *at, int j, int quarter) { return vld1q_u8(at + FLRC_LINE * j + 16 * quarter); }

INLINE uint8x16_t nibbles(const uint8_t *plane, int i, int quarter) {
  uint8x16_t v = line(plane, i / 2, quarter);
  return i % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
}

/* A shift by a number that is known where this is inlined. */
INLINE uint8x16_t shifted(uint8x16_t v, int by) { return vshlq_u8(v, vdupq_n_s8((int8_t)-by)); }

INLINE uint8x16_t pairs(const uint8_t *plane, int i, int quarter) {
  return vandq_u8(shifted(line(plane, i / 4, quarter), 2 * (i % 4)), vdupq_n_u8(3));
}

INLINE uint8x16_t bits(const uint8_t *plane, int i, int quarter) {
  return vandq_u8(shifted(line(plane, 0, quarter), i), vdupq_n_u8(1));
}

/* The integers of inputs 4i .. 4i + 3 of 4 rows, all positive as signed bytes; of 8 bits, the high four. */
INLINE int8x16_t integers(const uint8_t *tile, int width, int i, int quarter) {
  const uint8_t *low = tile + FLRC_LINE * (width == 3 ? 2 : 4);
  switch (width) {
  case 6:
    return vreinterpretq_s8_u8(vorrq_u8(vshlq_n_u8(nibbles(tile, i, quarter), 2), pairs(low, i, quarter)));
  case 5:
    return vreinterpretq_s8_u8(vorrq_u8(vshlq_n_u8(nibbles(tile, i, quarter), 1), bits(low, i, quarter)));
  case 3:
    return vreinterpretq_s8_u8(vorrq_u8(vshlq_n_u8(pairs(tile, i, quarter), 1), bits(low, i, quarter)));
  case 2:
    return vreinterpretq_s8_u8(pairs(tile, i, quarter));
  default:
    return vreinterpretq_s8_u8(nibbles(tile, i, quarter));
  }
}

/* The sums of 32 products of 4 rows. */
INLINE int32x4_t dot(const int8x16_t *u, const int8_t *q) {
  int8x16_t first = vld1q_s8(q), second = vld1q_s8(q + 16);
  int32x4_t even = vdupq_n_s32(0), odd = even;
  even = vdotq_laneq_s32(even, u[0], first, 0);
  odd = vdotq_laneq_s32(odd, u[1], first, 1);
  even = vdotq_laneq_s32(even, u[2], first, 2);
  odd = vdotq_laneq_s32(odd, u[3], first, 3);
  even = vdotq_laneq_s32(even, u[4], second, 0);
  odd = vdotq_laneq_s32(odd, u[5], second, 1);
  even = vdotq_laneq_s32(even, u[6], second, 2);
  odd = vdotq_laneq_s32(odd, u[7], second, 3);
  return vaddq_s32(even, odd);
}

INLINE float32x4_t scales_of(const uint8_t *bytes) {
  uint32_t all;
  __builtin_memcpy(&all, bytes, 4);
  uint32x4_t v = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(all))));
  uint32x4_t sign = vshlq_n_u32(vandq_u32(v, vdupq_n_u32(0x80)), 24);
  return vreinterpretq_f32_u32(vorrq_u32(sign, vshlq_n_u32(vandq_u32(v, vdupq_n_u32(0x7f)), 20)));
}

INLINE void tokens(const flrc_plane *plane, const flrc_inputs *x, const uint8_t *group, int32_t t, int count, int width,
                   float *y, ptrdiff_t stride, bool add) {
  float32x4_t sum[4][4];
  for (int c = 0; c < count; c++)
    for (int quarter = 0; quarter < 4; quarter++) sum[c][quarter] = vdupq_n_f32(0);
  for (int32_t b = 0; b < x->blocks; b++) {
    flrc_block at = flrc_block_at(group, b, width);
    if (t == 0) flrc_ask(at.tile, width); /* later tokens find them */
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      float32x4_t scales = scales_of(at.scales + 4 * quarter);
      int8x16_t u[8], low[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        u[i] = integers(at.tile, width, i, quarter);
        if (width == 8) low[i] = vreinterpretq_s8_u8(nibbles(at.tile + 4 * FLRC_LINE, i, quarter));
      }
      for (int c = 0; c < count; c++) {
        size_t place = (size_t)(t + c) * (size_t)x->stride + (size_t)b;
        const int8_t *q = x->integers + place * FLRC_BLOCK;
        int32x4_t all = dot(u, q);
        if (width == 8) all = vaddq_s32(vshlq_n_s32(all, 4), dot(low, q));
        all = vsubq_s32(all, vdupq_n_s32(flrc_zero(width) * x->sums[place]));
        float32x4_t factor = vmulq_f32(scales, vdupq_n_f32(flrc_factor(plane, x->scales[place])));
        sum[c][quarter] = vfmaq_f32(sum[c][quarter], vcvtq_f32_s32(all), factor);
      }
    }
  }
  for (int c = 0; c < count; c++) {
    for (int quarter = 0; quarter < 4; quarter++) {
      float *out = y + (t + c) * stride + 4 * quarter;
      vst1q_f32(out, add ? vaddq_f32(vld1q_f32(out), sum[c][quarter]) : sum[c][quarter]);
    }
  }
}

#include "groups.h"

FLRC_PRODUCT(flrc_product_neon)
