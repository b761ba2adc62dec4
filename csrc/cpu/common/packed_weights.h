// Weights in the order in which a kernel reads them, kept between calls while their content stays.
#pragma once

#include "isa.h"

namespace fastvdm {

// A weight as runs of elements `step` apart, the runs at every index of the outer dimensions.
struct WeightHashArgs {
  const void* data;
  int bytes;                     // of an element: 4 or 2
  int64_t run, step;             // elements of a run, and from one to the next
  int64_t sizes[3], strides[3];  // the outer dimensions, the last one fastest; in elements
  int64_t units;                 // of a run: kHashUnit words of 32 bits, the last one what is left
};
constexpr int kHashUnit = 512;
constexpr int64_t kHashUnits = int64_t{1} << 22;  // of a weight, at most

// Adds units [begin, end) of all runs to the two sums.
FASTVDM_DECLARE(void weight_hash(const WeightHashArgs&, int64_t begin, int64_t end,
                                 uint64_t sums[2]))

}  // namespace fastvdm
