// Converts rows between storage and fp32 scratch, for the kernels.
#pragma once

#include "vec.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// Widens n elements to fp32, with zeros up to np (a multiple of VL).
template <class T>
FASTVDM_INLINE void widen_row(const T* from, float* to, int n, int np) {
  int i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  if (i < n) {
    store(to + i, load_n(from + i, n - i));
    i += VL;
  }
  for (; i < np; i += VL) store(to + i, vf{});
}

template <class T>
FASTVDM_INLINE void narrow_row(const float* from, T* to, int n) {
  int i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load(from + i), n - i);
}

// Rounds `rows` rows of fp32 of width np to bf16 at `to`, with zeros from np to kp.
FASTVDM_INLINE void round_rows(const float* from, int rows, int np, bf16* to, int64_t ld, int kp) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < np; c += VL) store(to + r * ld + c, load(from + (int64_t)r * np + c));
    if (np < kp) memset(to + r * ld + np, 0, sizeof(bf16) * (kp - np));
  }
}

// sum[c] += Σ over the rows of x (rows, width).
FASTVDM_INLINE void add_columns(const float* x, int rows, int width, float* sum) {
  for (int c = 0; c < width; c += VL) {
    vf s = load(sum + c);
    for (int r = 0; r < rows; ++r) s += load(x + (int64_t)r * width + c);
    store(sum + c, s);
  }
}

// to = x + y + bias (unless null) for `count` values.
template <class T>
FASTVDM_INLINE void add_residual(const T* x, const float* y, const float* bias, int count, T* to) {
  for (int c = 0; c < count; c += VL) {
    const int n = count - c < VL ? count - c : VL;
    vf s = FASTVDM_LOAD(x, c, n) + load(y + c);
    if (bias != nullptr) s += load(bias + c);
    FASTVDM_STORE(to, c, s, n);
  }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
