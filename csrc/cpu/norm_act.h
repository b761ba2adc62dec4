// The arguments of the kernels of norm_act. Rows are pixels. An instance shares statistics and
// FiLM: it is a video or a frame. Work is divided into items of `chunk` rows that never cross
// instances; the division is the same for any number of threads.
#pragma once

#include "common/isa.h"

namespace fastvdm {

struct NormArgs {
  int dtype;
  int mask_kind;  // 0 none, 1 in the storage type, 2 fp32, 3 one byte
  int row_kind;   // 0 group, 1 rms, 2 layer
  bool act;
  int c1, c2, groups;           // channels of x and of x2
  int64_t rows, chunk, chunks;  // rows per instance, rows per item, items per instance
  float eps;
  const void *x, *x2, *residual, *mask, *dy;
  void *y, *dx, *dx2;
  // (instances, C) each: y = act((x - mu) a + b). For row kinds a and b act on the normalised x.
  // Backward of groups: x_hat = (x - mu) inv, and dx = inv (a du - s1 - x_hat s2), where du is the
  // gradient with respect to a x_hat + b.
  const float *mu, *inv, *a, *b, *s1, *s2;
  // Forward of groups: (items, groups) mean and sum of squared deviations. Backward: (items, C)
  // sums of du and of du x_hat.
  float *part1, *part2;
};

FASTVDM_DECLARE_BF16(void norm_stats(const NormArgs&, int64_t begin, int64_t end, float* scratch))
FASTVDM_DECLARE_BF16(void norm_apply(const NormArgs&, int64_t begin, int64_t end))
// The first pass of the backward; for row kinds it also writes dx if wanted.
FASTVDM_DECLARE_BF16(void norm_bwd_sums(const NormArgs&, int64_t begin, int64_t end,
                                        float* scratch))
FASTVDM_DECLARE_BF16(void norm_bwd_dx(const NormArgs&, int64_t begin, int64_t end))

}  // namespace fastvdm
