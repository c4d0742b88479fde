/* Sixteen floats in plain C: the specification of the others. */
typedef struct {
  float lane[16];
} v16;

#define FLRC_LANES for (int i = 0; i < 16; i++)

INLINE v16 v16_load(const float *at) {
  v16 v;
  memcpy(v.lane, at, sizeof v.lane);
  return v;
}
INLINE void v16_store(float *at, v16 v) { memcpy(at, v.lane, sizeof v.lane); }
INLINE v16 v16_set(float x) {
  v16 v;
  FLRC_LANES v.lane[i] = x;
  return v;
}
INLINE v16 v16_add(v16 a, v16 b) {
  FLRC_LANES a.lane[i] += b.lane[i];
  return a;
}
INLINE v16 v16_sub(v16 a, v16 b) {
  FLRC_LANES a.lane[i] -= b.lane[i];
  return a;
}
INLINE v16 v16_mul(v16 a, v16 b) {
  FLRC_LANES a.lane[i] *= b.lane[i];
  return a;
}
INLINE v16 v16_div(v16 a, v16 b) {
  FLRC_LANES a.lane[i] /= b.lane[i];
  return a;
}
INLINE v16 v16_max(v16 a, v16 b) {
  FLRC_LANES a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
INLINE v16 v16_min(v16 a, v16 b) {
  FLRC_LANES a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
INLINE v16 v16_abs(v16 a) {
  FLRC_LANES a.lane[i] = fabsf(a.lane[i]);
  return a;
}
/* a * b + c, rounded once. */
INLINE v16 v16_fma(v16 a, v16 b, v16 c) {
  FLRC_LANES c.lane[i] = fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}
/* Lanes 8 apart, then 4, 2, 1. */
INLINE float v16_sum(v16 a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a.lane[i] += a.lane[i + width];
  return a.lane[0];
}
INLINE float v16_most(v16 a) {
  float most = a.lane[0];
  FLRC_LANES most = a.lane[i] > most ? a.lane[i] : most;
  return most;
}
/* The bytes of every lane as an integer, 23 places to the left. */
INLINE v16 v16_shift23(v16 a) {
  uint32_t bits[16];
  memcpy(bits, a.lane, sizeof bits);
  FLRC_LANES bits[i] <<= 23;
  memcpy(a.lane, bits, sizeof bits);
  return a;
}
INLINE v16 v16_load_int8(const int8_t *at) {
  v16 v;
  FLRC_LANES v.lane[i] = (float)at[i];
  return v;
}
/* Lanes are integers between -128 and 127. */
INLINE void v16_store_int8(int8_t *at, v16 v) { FLRC_LANES at[i] = (int8_t)v.lane[i]; }

/* A float16's value. */
INLINE float flrc_from_half(uint16_t half) {
  uint32_t exponent = half >> 10 & 31, rest = half & 1023;
  if (exponent == 0) {
    float small = (float)rest * 0x1p-24f;
    return half >> 15 ? -small : small;
  }
  uint32_t bits = (uint32_t)(half >> 15) << 31 | (exponent == 31 ? 255u : exponent + 112) << 23 | rest << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
/* The nearest float16, ties to even; too large a value is infinite. */
INLINE uint16_t flrc_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (size < 0x38800000) { /* not normal: a multiple of 2^-24 */
    float shifted = fabsf(value) + 0.5f;
    memcpy(&bits, &shifted, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3f000000));
  }
  size += 0xc8000fff + (size >> 13 & 1);
  return (uint16_t)(sign | size >> 13);
}
INLINE v16 v16_load_half(const uint16_t *at) {
  v16 v;
  FLRC_LANES v.lane[i] = flrc_from_half(at[i]);
  return v;
}
INLINE void v16_store_half(uint16_t *at, v16 v) { FLRC_LANES at[i] = flrc_to_half(v.lane[i]); }
