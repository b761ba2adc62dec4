// The arguments of the kernels of the projections: 16-bit (or fp32) storage, fp32 products in L2,
// for CPUs without 16-bit arithmetic.
#pragma once

#include "common/isa.h"

namespace fastvdm {

struct LinearLayerArgs {
  int dtype;
  int64_t rows;
  int k, n, kp, np;  // kp, np: k and n rounded up to 16
  int64_t w_k, w_n;  // strides of weight, by input and output feature
  const void *x, *weight;
  void* y;
  const float* bias;  // (np), or null
  float* packed;      // (k, np) weights in fp32
};

constexpr int kLinearBlock = 64;     // rows per item
constexpr int kLinearColumns = 384;  // columns of a product in L2

inline int64_t linear_layer_scratch(const LinearLayerArgs& a) {
  return kLinearBlock * (static_cast<int64_t>(a.kp) + kLinearColumns) + 64;
}

FASTVDM_DECLARE(void linear_pack(const LinearLayerArgs&, int64_t begin, int64_t end))
FASTVDM_DECLARE(void linear_rows(const LinearLayerArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
