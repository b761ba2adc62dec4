// y = x Wᵀ + b, with the rows widened to fp32 one block at a time.
#include "linear.h"

#include "common/gemm.h"
#include "common/rows.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

template <class T>
void pack(const LinearLayerArgs& a, int64_t begin, int64_t end) {
  const T* weight = (const T*)a.weight;
  for (int64_t k = begin; k < end; ++k) {
    float* to = a.packed + k * a.np;
    for (int64_t n = 0; n < a.n; ++n) to[n] = to_f32(weight[n * a.w_n + k * a.w_k]);
    for (int64_t n = a.n; n < a.np; ++n) to[n] = 0.f;
  }
}

template <class T>
void rows(const LinearLayerArgs& a, int64_t begin, int64_t end, float* scratch) {
  float *x = scratch, *y = x + (int64_t)kLinearBlock * a.kp;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kLinearBlock;
    const int count = a.rows - first < kLinearBlock ? (int)(a.rows - first) : kLinearBlock;
    for (int r = 0; r < count; ++r)
      widen_row((const T*)a.x + (first + r) * a.k, x + (int64_t)r * a.kp, a.k, a.kp);
    for (int n0 = 0; n0 < a.n; n0 += kLinearColumns) {
      const int wide = a.np - n0 < kLinearColumns ? a.np - n0 : kLinearColumns;
      const int left = a.n - n0 < kLinearColumns ? a.n - n0 : kLinearColumns;
      gemm<false>(count, wide, a.k, x, a.kp, a.packed + n0, a.np, y, kLinearColumns, false);
      for (int r = 0; r < count; ++r) {
        float* row = y + (int64_t)r * kLinearColumns;
        if (a.bias != nullptr)
          for (int c = 0; c < wide; c += VL) store(row + c, load(row + c) + load(a.bias + n0 + c));
        narrow_row(row, (T*)a.y + (first + r) * a.n + n0, left);
      }
    }
  }
}

}  // namespace

void linear_pack(const LinearLayerArgs& a, int64_t begin, int64_t end) {
  FASTVDM_BY_DTYPE(a.dtype, pack, a, begin, end)
}
void linear_rows(const LinearLayerArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, rows, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
