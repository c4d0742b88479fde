/* Sixteen floats at a time, with the same bytes as results on every instruction set.
 *
 * Included by the files vector_<isa>.c, which are compiled with their own flags; vector_portable.c defines FLRC_PORTABLE.
 * Each operation is one IEEE operation a lane, and sums of lanes have a fixed tree. `v16_max` of a NaN is unspecified.
 */
#ifndef FLRC_VEC_H
#define FLRC_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(FLRC_PORTABLE) || defined(__SANITIZE_ADDRESS__)
#define INLINE static inline /* as the compiler likes: all of it in one place takes minutes to compile */
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(FLRC_PORTABLE)
#include "vec_portable.h"
#elif defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#elif defined(__aarch64__)
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif

/* Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, below 2^22. */
#define FLRC_ROUND 12582912.0f

INLINE v16 v16_round(v16 x) { return v16_sub(v16_add(x, v16_set(FLRC_ROUND)), v16_set(FLRC_ROUND)); }

/* e^x, relative error below 2e-7; x is held between -87 and 88. Taylor's series of degree 7 for what a power of two leaves. */
INLINE v16 v16_exp(v16 x) {
  x = v16_min(v16_max(x, v16_set(-87.0f)), v16_set(88.0f));
  v16 n = v16_round(v16_mul(x, v16_set(1.44269504f)));
  v16 r = v16_fma(n, v16_set(-0.693359375f), x); /* the first 10 bits of ln 2: n times them is exact */
  r = v16_fma(n, v16_set(2.12194440e-4f), r);
  v16 p = v16_set(1.0f / 5040);
  p = v16_fma(p, r, v16_set(1.0f / 720));
  p = v16_fma(p, r, v16_set(1.0f / 120));
  p = v16_fma(p, r, v16_set(1.0f / 24));
  p = v16_fma(p, r, v16_set(1.0f / 6));
  p = v16_fma(p, r, v16_set(0.5f));
  p = v16_fma(p, r, v16_set(1.0f));
  p = v16_fma(p, r, v16_set(1.0f));
  /* Behind 1.5 * 2^23 the last bits of a float's bytes are the integer, which becomes an exponent. */
  return v16_mul(p, v16_shift23(v16_add(n, v16_set(FLRC_ROUND + 127.0f))));
}

/* x / (1 + e^-x) */
INLINE v16 v16_silu(v16 x) {
  v16 one = v16_set(1.0f);
  return v16_div(x, v16_add(one, v16_exp(v16_sub(v16_set(0.0f), x))));
}

/* x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU in its tanh form. */
INLINE v16 v16_gelu_tanh(v16 x) {
  v16 cube = v16_mul(v16_mul(x, x), x);
  v16 u = v16_mul(v16_set(-1.5957691216f), v16_fma(cube, v16_set(0.044715f), x));
  return v16_div(x, v16_add(v16_set(1.0f), v16_exp(u)));
}

#endif
