/* AVX-512 with VNNI: a register holds four consecutive inputs of all 16 rows. */
#include <immintrin.h>

#include "tile.h"

#define FLRC_TOKENS 8 /* at a time, for the integers of a tile unpacked once */
#define INLINE static inline __attribute__((always_inline))

INLINE __m512i line(const uint8_t *at, int j) { return _mm512_load_si512((const void *)(at + FLRC_LINE * j)); }

INLINE __m512i nibbles(const uint8_t *plane, int i) {
  __m512i v = line(plane, i / 2);
  return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
}

INLINE __m512i pairs(const uint8_t *plane, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(line(plane, i / 4), 2 * (i % 4)), _mm512_set1_epi8(3));
}

INLINE __m512i bits(const uint8_t *plane, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(line(plane, 0), i), _mm512_set1_epi8(1));
}

/* The integers of inputs 4i .. 4i + 3 of all rows. */
INLINE __m512i integers(const uint8_t *tile, int width, int i) {
  const uint8_t *low = tile + FLRC_LINE * (width == 3 ? 2 : 4);
  switch (width) {
  case 8:
    return _mm512_or_si512(_mm512_slli_epi16(nibbles(tile, i), 4), nibbles(low, i));
  case 6:
    return _mm512_or_si512(_mm512_slli_epi16(nibbles(tile, i), 2), pairs(low, i));
  case 5:
    return _mm512_or_si512(_mm512_slli_epi16(nibbles(tile, i), 1), bits(low, i));
  case 4:
    return nibbles(tile, i);
  case 3:
    return _mm512_or_si512(_mm512_slli_epi16(pairs(tile, i), 1), bits(low, i));
  default:
    return pairs(tile, i);
  }
}

INLINE __m512 scales_of(const uint8_t *bytes) {
  __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
  __m512i sign = _mm512_slli_epi32(_mm512_and_si512(v, _mm512_set1_epi32(0x80)), 24);
  __m512i rest = _mm512_slli_epi32(_mm512_and_si512(v, _mm512_set1_epi32(0x7f)), 20);
  return _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
}

/* The sums of 32 products of a token, from `sum` on; two chains, which wait less for one another. */
INLINE __m512i dot(__m512i sum, const __m512i *u, const int8_t *q) {
  __m512i odd = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    int32_t four;
    __builtin_memcpy(&four, q + 4 * i, 4);
    if (i % 2) odd = _mm512_dpbusd_epi32(odd, u[i], _mm512_set1_epi32(four));
    else sum = _mm512_dpbusd_epi32(sum, u[i], _mm512_set1_epi32(four));
  }
  return _mm512_add_epi32(sum, odd);
}

INLINE void tokens(const flrc_plane *plane, const flrc_inputs *x, const uint8_t *group, int32_t t, int count, int width,
                   float *y, ptrdiff_t stride, bool add) {
  __m512 sum[FLRC_TOKENS];
  float unit = flrc_factor(plane, 1.0f);
  size_t from = (size_t)t * (size_t)x->stride;
#pragma GCC unroll 8
  for (int c = 0; c < count; c++) sum[c] = _mm512_setzero_ps();
  for (int32_t b = 0; b < x->blocks; b++) {
    flrc_block at = flrc_block_at(group, b, width);
    if (t == 0) flrc_ask(at.tile, width); /* later tokens find them */
    __m512 scales = scales_of(at.scales);
    __m512i u[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) u[i] = integers(at.tile, width, i);
#pragma GCC unroll 8
    for (int c = 0; c < count; c++) {
      size_t place = from + (size_t)c * (size_t)x->stride + (size_t)b;
      __m512i all = dot(_mm512_set1_epi32(-flrc_zero(width) * x->sums[place]), u, x->integers + place * FLRC_BLOCK);
      __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(unit * x->scales[place]));
      sum[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), factor, sum[c]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < count; c++) {
    float *out = y + (t + c) * stride;
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), sum[c]) : sum[c]);
  }
}

#include "groups.h"

FLRC_PRODUCT(flrc_product_avx512)
