/* The product in registers of 256 bits: four consecutive inputs of 8 rows, so a line is two of them. Included by the files
 * of AVX2 and of AVX-VNNI, which say in FLRC_VNNI whether there is an instruction for sums of four products.
 */
#include <immintrin.h>

#include "tile.h"

#define FLRC_TOKENS 8 /* at a time, for the integers of a tile unpacked once */

/* Whether the integers are multiplied in halves of 4 bits: as 8, pairs of products overflow 16 bits. */
#ifdef FLRC_VNNI
#define HALVES(width) false
#else
#define HALVES(width) ((width) == 8)
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE __m256i line(const uint8_t *at, int j, int half) {
  return _mm256_load_si256((const __m256i *)(at + FLRC_LINE * j + 32 * half));
}

INLINE __m256i nibbles(const uint8_t *plane, int i, int half) {
  __m256i v = line(plane, i / 2, half);
  return _mm256_and_si256(i % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}

INLINE __m256i pairs(const uint8_t *plane, int i, int half) {
  return _mm256_and_si256(_mm256_srli_epi16(line(plane, i / 4, half), 2 * (i % 4)), _mm256_set1_epi8(3));
}

INLINE __m256i bits(const uint8_t *plane, int i, int half) {
  return _mm256_and_si256(_mm256_srli_epi16(line(plane, 0, half), i), _mm256_set1_epi8(1));
}

/* The integers of inputs 4i .. 4i + 3 of 8 rows; of 8 bits without VNNI, the high four. */
INLINE __m256i integers(const uint8_t *tile, int width, int i, int half) {
  const uint8_t *low = tile + FLRC_LINE * (width == 3 ? 2 : 4);
  switch (width) {
#ifdef FLRC_VNNI
  case 8:
    return _mm256_or_si256(_mm256_slli_epi16(nibbles(tile, i, half), 4), nibbles(low, i, half));
#endif
  case 6:
    return _mm256_or_si256(_mm256_slli_epi16(nibbles(tile, i, half), 2), pairs(low, i, half));
  case 5:
    return _mm256_or_si256(_mm256_slli_epi16(nibbles(tile, i, half), 1), bits(low, i, half));
  case 3:
    return _mm256_or_si256(_mm256_slli_epi16(pairs(tile, i, half), 1), bits(low, i, half));
  case 2:
    return pairs(tile, i, half);
  default:
    return nibbles(tile, i, half);
  }
}

INLINE __m256i four(const int8_t *q, int i) {
  int32_t value;
  __builtin_memcpy(&value, q + 4 * i, 4);
  return _mm256_set1_epi32(value);
}

/* The sums of 32 products of 8 rows, from `sum` on. */
INLINE __m256i dot(__m256i sum, const __m256i *u, const int8_t *q, int width) {
#ifdef FLRC_VNNI
  (void)width;
  __m256i odd = _mm256_setzero_si256(); /* two chains wait less for one another */
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    sum = _mm256_dpbusd_avx_epi32(sum, u[i], four(q, i));
    odd = _mm256_dpbusd_avx_epi32(odd, u[i + 1], four(q, i + 1));
  }
  sum = _mm256_add_epi32(sum, odd);
#else
  /* Pairs of products fit 16 bits this often before they overflow: 15, 31 and 63 times 127, twice. */
  const int often = width <= 4 ? 8 : width == 5 ? 4 : 2;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += often) {
    __m256i part = _mm256_maddubs_epi16(u[i], four(q, i));
#pragma GCC unroll 8
    for (int j = i + 1; j < i + often; j++) part = _mm256_add_epi16(part, _mm256_maddubs_epi16(u[j], four(q, j)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
#endif
  return sum;
}

INLINE __m256 scales_of(const uint8_t *bytes) {
  __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
  __m256i sign = _mm256_slli_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0x80)), 24);
  __m256i rest = _mm256_slli_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0x7f)), 20);
  return _mm256_castsi256_ps(_mm256_or_si256(sign, rest));
}

/* Rows of halves first .. last - 1 of a group. */
INLINE void rows_of(const flrc_plane *plane, const flrc_inputs *x, const uint8_t *group, int first, int last, int32_t t,
                    int count, int width, float *y, ptrdiff_t stride, bool add) {
  __m256 sum[2][FLRC_TOKENS];
  float unit = flrc_factor(plane, 1.0f);
  size_t from = (size_t)t * (size_t)x->stride;
#pragma GCC unroll 2
  for (int half = first; half < last; half++)
#pragma GCC unroll 8
    for (int c = 0; c < count; c++) sum[half][c] = _mm256_setzero_ps();
  for (int32_t b = 0; b < x->blocks; b++) {
    flrc_block at = flrc_block_at(group, b, width);
    if (t == 0 && first == 0) flrc_ask(at.tile, width); /* later tokens find them */
#pragma GCC unroll 2
    for (int half = first; half < last; half++) {
      __m256 scales = scales_of(at.scales + 8 * half);
      __m256i u[8], low[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        u[i] = integers(at.tile, width, i, half);
        if (HALVES(width)) low[i] = nibbles(at.tile + 4 * FLRC_LINE, i, half);
      }
#pragma GCC unroll 8
      for (int c = 0; c < count; c++) {
        size_t place = from + (size_t)c * (size_t)x->stride + (size_t)b;
        const int8_t *q = x->integers + place * FLRC_BLOCK;
        __m256i all = _mm256_set1_epi32(-flrc_zero(width) * x->sums[place]);
        if (HALVES(width)) {
          __m256i high = dot(_mm256_setzero_si256(), u, q, 4);
          all = dot(_mm256_add_epi32(all, _mm256_slli_epi32(high, 4)), low, q, 4);
        } else {
          all = dot(all, u, q, width);
        }
        __m256 factor = _mm256_mul_ps(scales, _mm256_set1_ps(unit * x->scales[place]));
        sum[half][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), factor, sum[half][c]);
      }
    }
  }
#pragma GCC unroll 2
  for (int half = first; half < last; half++) {
#pragma GCC unroll 8
    for (int c = 0; c < count; c++) {
      float *out = y + (t + c) * stride + 8 * half;
      _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), sum[half][c]) : sum[half][c]);
    }
  }
}

/* Both halves at once as far as registers hold their sums: every line is then read once. */
INLINE void tokens(const flrc_plane *plane, const flrc_inputs *x, const uint8_t *group, int32_t t, int count, int width,
                   float *y, ptrdiff_t stride, bool add) {
  if (count <= 2) {
    rows_of(plane, x, group, 0, 2, t, count, width, y, stride, add);
  } else {
    rows_of(plane, x, group, 0, 1, t, count, width, y, stride, add);
    rows_of(plane, x, group, 1, 2, t, count, width, y, stride, add);
  }
}

#include "groups.h"
