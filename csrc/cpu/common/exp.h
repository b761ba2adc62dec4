// exp and the sigmoid on vectors.
#pragma once

#include "vec.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

#if defined(__AVX512F__)
// exp of N vectors for 16-bit results, by the instructions that split and scale by powers of two.
// It takes two thirds of the time of vexp_each. No clamp: results out of fp32's range become 0 or
// inf.
template <int N>
FASTVDM_INLINE void vexp_short(vf (&x)[N]) {
  vf t[N], f[N], p[N];
#define FASTVDM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  FASTVDM_EACH t[i] = x[i] * 1.44269502162933349609375f;
  FASTVDM_EACH f[i] = (vf)_mm512_reduce_ps((__m512)t[i], 8);  // difference to the nearest integer
  FASTVDM_EACH p[i] = f[i] * 0.009570101791612535f + 0.05591786031000737f;
  FASTVDM_EACH p[i] = p[i] * f[i] + 0.24024744830815806f;
  FASTVDM_EACH p[i] = p[i] * f[i] + 0.693121814738437f;
  FASTVDM_EACH p[i] = p[i] * f[i] + 0.9999992614448233f;
  FASTVDM_EACH x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)(t[i] - f[i]));
#undef FASTVDM_EACH
}
#endif

// exp of N vectors, x clamped to [-87.3, 88.3]. Two-part log2(e), then 2^f on [-1/2, 1/2] by a
// minimax polynomial: relative error 1.2e-7 (DEGREE 5, for fp32 results) or 2.6e-6 (4, for 16-bit
// ones). One vector is a dependency chain of 45 cycles, and a core runs three or four chains at a
// time: interleaving the steps of four vectors keeps it busy and takes half the time.
template <int N, int DEGREE = 5>
FASTVDM_INLINE void vexp_each(vf (&x)[N]) {
#if defined(__AVX512F__)
  if constexpr (DEGREE == 4) return vexp_short(x);
#endif
  // 1.5 * 2^23 + 127: adding it rounds to an integer and leaves the biased integer in the low bits.
  const vf magic = splat(12583039.f);
  constexpr float LOG2E = 1.44269502162933349609375f;
  vf t[N], p[N];
#define FASTVDM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  FASTVDM_EACH x[i] = vmin(splat(88.3f), vmax(splat(-87.3f), x[i]));  // this order keeps NaN
  FASTVDM_EACH t[i] = x[i] * LOG2E + magic;
  FASTVDM_EACH p[i] = x[i] * LOG2E - (t[i] - magic);
  FASTVDM_EACH x[i] = x[i] * 1.925963033500011e-08f + p[i];
  if constexpr (DEGREE == 5) {
    FASTVDM_EACH p[i] = x[i] * 0.001327647187378206f + 0.009675541333501724f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 0.05550713273865286f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 0.24022119723863763f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 0.6931469670645355f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 1.0f;
  } else {
    FASTVDM_EACH p[i] = x[i] * 0.009570101791612535f + 0.05591786031000737f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 0.24024744830815806f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 0.693121814738437f;
    FASTVDM_EACH p[i] = p[i] * x[i] + 0.9999992614448233f;
  }
  // Times 2^n, by a product, because t is NaN for a NaN: adding to the exponent of p instead could
  // turn a NaN whose low bits are all ones (a device's) into a number.
  FASTVDM_EACH x[i] = p[i] * as_float(as_int(t[i]) << 23);
#undef FASTVDM_EACH
}

template <int DEGREE = 5>
FASTVDM_INLINE vf vexp(vf x) {
  vf one[1] = {x};
  vexp_each<1, DEGREE>(one);
  return one[0];
}

// exp(x - m) in place for `count` vectors `step` apart; returns their sum.
template <int DEGREE = 5>
FASTVDM_INLINE vf vexp_rows(float* x, int64_t step, int count, vf m) {
  vf sum = {};
  int c = 0;
  for (; c + 4 <= count; c += 4) {
    vf e[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) e[i] = load(x + (c + i) * step) - m;
    vexp_each<4, DEGREE>(e);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(x + (c + i) * step, e[i]);
    sum += (e[0] + e[1]) + (e[2] + e[3]);
  }
  for (; c + 2 <= count; c += 2) {
    vf e[2] = {load(x + c * step) - m, load(x + (c + 1) * step) - m};
    vexp_each<2, DEGREE>(e);
    store(x + c * step, e[0]);
    store(x + (c + 1) * step, e[1]);
    sum += e[0] + e[1];
  }
  if (c < count) {
    const vf e = vexp<DEGREE>(load(x + c * step) - m);
    store(x + c * step, e);
    sum += e;
  }
  return sum;
}

// 1 / d for d in [1, 2^127): no intermediate denormals.
FASTVDM_INLINE vf vrecip(vf d) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)d);
  return r * (2.f - d * r);
#else
  return 1.f / d;
#endif
}

// 1 / (1 + exp(-x)) of N vectors, interleaved like vexp_each.
template <int DEGREE, int N>
FASTVDM_INLINE void vsigmoid_each(vf (&x)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    // exp(-x) is clamped at 2.2e38, so far below zero the result is 4.5e-39 or zero.
    x[i] = -x[i];
    if constexpr (DEGREE == 4) x[i] = vmin(splat(88.3f), x[i]);
  }
  vexp_each<N, DEGREE>(x);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = vrecip(1.f + x[i]);
}

// The degree of exp's polynomial for a storage type.
template <class T>
constexpr int kDegree = sizeof(T) == 4 ? 5 : 4;

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
