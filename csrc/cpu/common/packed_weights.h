// Weights in a kernel's own order, kept between calls while their content is the same.
#pragma once

#include "isa.h"

namespace fastvdm {

// A weight as runs of elements `step` apart, one run per index of the outer dimensions.
struct WeightHashArgs {
  const void* data;
  int bytes;                     // per element: 4 or 2
  int64_t run, step;             // elements per run, and the stride within a run
  int64_t sizes[3], strides[3];  // the outer dimensions, the last one fastest; in elements
  int64_t units;                 // per run: kHashUnit 32-bit words each; the last one is the rest
};
constexpr int kHashUnit = 512;
constexpr int64_t kHashUnits = int64_t{1} << 22;  // most units per weight

// Adds units [begin, end) of all runs to the two sums.
FASTVDM_DECLARE(void weight_hash(const WeightHashArgs&, int64_t begin, int64_t end,
                                 uint64_t sums[2]))

}  // namespace fastvdm
