// Rows between storage and fp32 scratch, for the kernels.
#pragma once

#include "vec.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// n elements to fp32, zeros up to np (a multiple of VL).
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

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
