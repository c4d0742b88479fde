/* Sixteen floats in two registers of AVX2; needs fma and f16c. */
#include <immintrin.h>

typedef struct {
  __m256 a, b;
} v16;

INLINE v16 both(__m256 a, __m256 b) {
  v16 v = {a, b};
  return v;
}
INLINE v16 v16_load(const float *at) { return both(_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)); }
INLINE void v16_store(float *at, v16 v) {
  _mm256_storeu_ps(at, v.a);
  _mm256_storeu_ps(at + 8, v.b);
}
INLINE v16 v16_set(float x) { return both(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE v16 v16_add(v16 x, v16 y) { return both(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE v16 v16_sub(v16 x, v16 y) { return both(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE v16 v16_mul(v16 x, v16 y) { return both(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE v16 v16_div(v16 x, v16 y) { return both(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE v16 v16_max(v16 x, v16 y) { return both(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE v16 v16_min(v16 x, v16 y) { return both(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE v16 v16_abs(v16 x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return both(_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
INLINE v16 v16_fma(v16 x, v16 y, v16 z) {
  return both(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
INLINE float v16_sum(v16 x) {
  __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float v16_most(v16 x) {
  __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE __m256 shift23_of(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
INLINE v16 v16_shift23(v16 x) { return both(shift23_of(x.a), shift23_of(x.b)); }
INLINE __m256 eight_int8(const int8_t *at) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at)));
}
INLINE v16 v16_load_int8(const int8_t *at) { return both(eight_int8(at), eight_int8(at + 8)); }
INLINE void v16_store_int8(int8_t *at, v16 v) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
  words = _mm256_permute4x64_epi64(words, 0xd8); /* packed within halves: 0 2 1 3 puts them in order */
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i *)(void *)at, bytes);
}
INLINE __m256 eight_halves(const uint16_t *at) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}
INLINE v16 v16_load_half(const uint16_t *at) { return both(eight_halves(at), eight_halves(at + 8)); }
INLINE void v16_store_half(uint16_t *at, v16 v) {
  enum { nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }; /* clang wants a constant expression */
  _mm_storeu_si128((__m128i *)(void *)at, _mm256_cvtps_ph(v.a, nearest));
  _mm_storeu_si128((__m128i *)(void *)(at + 8), _mm256_cvtps_ph(v.b, nearest));
}
