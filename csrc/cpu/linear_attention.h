// The arguments of the kernels of linear_attention. An item is a frame and a group of heads; every
// tensor is dense.
#pragma once

#include "common/isa.h"

namespace fastvdm {

struct LinearArgs {
  int dtype;
  int heads, d, dp;  // dp: d rounded up to 16
  int group;         // heads per item
  int64_t frames, pixels;
  float scale;
  const void *qkv, *dout;
  void *out, *dqkv;
  float *lse, *ctx;  // (frames, heads, d), (frames, heads, d, d); read in the backward
};

constexpr int kLinearRows = 64;  // pixels per chunk

inline int64_t linear_scratch(const LinearArgs& a) {
  const int64_t ctx = static_cast<int64_t>(a.dp) * a.dp, rows = kLinearRows * a.dp;
  return a.group * (3 * ctx + 2 * a.dp) + 5 * rows + 4 * 16 * a.dp;
}

FASTVDM_DECLARE(void linear_attention_fwd(const LinearArgs&, int64_t begin, int64_t end, float*))
FASTVDM_DECLARE(void linear_attention_bwd(const LinearArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
