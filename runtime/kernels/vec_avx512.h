/* Sixteen floats in one register of AVX-512. */
#include <immintrin.h>

typedef __m512 v16;

INLINE v16 v16_load(const float *at) { return _mm512_loadu_ps(at); }
INLINE void v16_store(float *at, v16 v) { _mm512_storeu_ps(at, v); }
INLINE v16 v16_set(float x) { return _mm512_set1_ps(x); }
INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
INLINE v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
INLINE v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
INLINE v16 v16_abs(v16 a) { return _mm512_abs_ps(a); }
INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE __m256 upper_half(v16 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
INLINE float v16_sum(v16 a) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), upper_half(a));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float v16_most(v16 a) { return _mm512_reduce_max_ps(a); }
INLINE v16 v16_shift23(v16 a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
INLINE v16 v16_load_int8(const int8_t *at) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)at)));
}
INLINE void v16_store_int8(int8_t *at, v16 v) {
  _mm_storeu_si128((__m128i *)(void *)at, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
INLINE v16 v16_load_half(const uint16_t *at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}
INLINE void v16_store_half(uint16_t *at, v16 v) {
  _mm256_storeu_si256((__m256i *)(void *)at, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
