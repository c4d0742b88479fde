/* Sixteen floats in four registers of NEON. */
#include <arm_neon.h>

typedef struct {
  float32x4_t q[4];
} v16;

#define FLRC_QUARTERS for (int i = 0; i < 4; i++)

INLINE v16 v16_load(const float *at) {
  v16 v;
  FLRC_QUARTERS v.q[i] = vld1q_f32(at + 4 * i);
  return v;
}
INLINE void v16_store(float *at, v16 v) { FLRC_QUARTERS vst1q_f32(at + 4 * i, v.q[i]); }
INLINE v16 v16_set(float x) {
  v16 v;
  FLRC_QUARTERS v.q[i] = vdupq_n_f32(x);
  return v;
}
INLINE v16 v16_add(v16 a, v16 b) {
  FLRC_QUARTERS a.q[i] = vaddq_f32(a.q[i], b.q[i]);
  return a;
}
INLINE v16 v16_sub(v16 a, v16 b) {
  FLRC_QUARTERS a.q[i] = vsubq_f32(a.q[i], b.q[i]);
  return a;
}
INLINE v16 v16_mul(v16 a, v16 b) {
  FLRC_QUARTERS a.q[i] = vmulq_f32(a.q[i], b.q[i]);
  return a;
}
INLINE v16 v16_div(v16 a, v16 b) {
  FLRC_QUARTERS a.q[i] = vdivq_f32(a.q[i], b.q[i]);
  return a;
}
INLINE v16 v16_max(v16 a, v16 b) {
  FLRC_QUARTERS a.q[i] = vmaxq_f32(a.q[i], b.q[i]);
  return a;
}
INLINE v16 v16_min(v16 a, v16 b) {
  FLRC_QUARTERS a.q[i] = vminq_f32(a.q[i], b.q[i]);
  return a;
}
INLINE v16 v16_abs(v16 a) {
  FLRC_QUARTERS a.q[i] = vabsq_f32(a.q[i]);
  return a;
}
INLINE v16 v16_fma(v16 a, v16 b, v16 c) {
  FLRC_QUARTERS c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
  return c;
}
INLINE float v16_sum(v16 a) {
  float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float v16_most(v16 a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.q[0], a.q[1]), vmaxq_f32(a.q[2], a.q[3])));
}
INLINE v16 v16_shift23(v16 a) {
  FLRC_QUARTERS a.q[i] = vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.q[i]), 23));
  return a;
}
INLINE v16 v16_load_int8(const int8_t *at) {
  int8x16_t bytes = vld1q_s8(at);
  int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  v16 v = {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
  return v;
}
INLINE void v16_store_int8(int8_t *at, v16 v) {
  int16x8_t low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(v.q[0])), vmovn_s32(vcvtq_s32_f32(v.q[1])));
  int16x8_t high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(v.q[2])), vmovn_s32(vcvtq_s32_f32(v.q[3])));
  vst1q_s8(at, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
INLINE v16 v16_load_half(const uint16_t *at) {
  v16 v;
  FLRC_QUARTERS v.q[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at + 4 * i)));
  return v;
}
INLINE void v16_store_half(uint16_t *at, v16 v) {
  FLRC_QUARTERS vst1_u16(at + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.q[i])));
}
