// LayerNorm over the channels of one pixel, for the attention blocks. A row is fp32 of width cp,
// the channels rounded up to a multiple of VL, and zero beyond the channels.
#pragma once

#include "rows.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

struct LayerNorm {
  int channels, cp;
  float eps;
  const float *weight, *bias;  // (cp), zero beyond the channels; bias may be null
};

// row = weight x_hat + bias of the C values at x; x_hat goes to `hat` unless null. Returns 1/σ.
template <class T>
FASTVDM_INLINE float layer_norm(const LayerNorm& p, const T* x, float* row, float* hat) {
  const int C = p.channels, cp = p.cp;
  widen_row(x, row, C, cp);
  vf s = {};
  for (int c = 0; c < cp; c += VL) s += load(row + c);
  const float mean = hsum(s) / (float)C;
  vf q = {};
  for (int c = 0; c < C; c += VL) {
    vf d = load(row + c) - mean;
    if (c + VL > C) {
      float part[VL];
      store(part, d);
      for (int l = C - c; l < VL; ++l) part[l] = 0.f;
      d = load(part);
    }
    store(row + c, d);
    q += d * d;
  }
  const float inv = 1.f / __builtin_sqrtf(hsum(q) / (float)C + p.eps);
  for (int c = 0; c < cp; c += VL) {
    vf v = load(row + c) * inv;
    if (hat != nullptr) store(hat + c, v);
    v = v * load(p.weight + c);
    if (p.bias != nullptr) v += load(p.bias + c);
    store(row + c, v);
  }
  return inv;
}

// dx = dy + the gradient through the norm, from the gradient d of its result (overwritten). Adds to
// the gradients of weight and bias unless null.
template <class T>
FASTVDM_INLINE void layer_norm_bwd(const LayerNorm& p, float* d, const float* hat, float inv,
                                   const float* dy, float* dweight, float* dbias, T* dx) {
  const int C = p.channels;
  vf s1 = {}, s2 = {};
  for (int c = 0; c < p.cp; c += VL) {
    const vf raw = load(d + c), h = load(hat + c);
    if (dweight != nullptr) store(dweight + c, load(dweight + c) + raw * h);
    if (dbias != nullptr) store(dbias + c, load(dbias + c) + raw);
    const vf e = raw * load(p.weight + c);
    s1 += e;
    s2 += e * h;
    store(d + c, e);
  }
  const float m1 = hsum(s1) / (float)C, m2 = hsum(s2) / (float)C;
  for (int c = 0; c < C; c += VL) {
    const vf e = load(dy + c) + (load(d + c) - m1 - load(hat + c) * m2) * inv;
    const int n = C - c < VL ? C - c : VL;
    FASTVDM_STORE(dx, c, e, n);
  }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
