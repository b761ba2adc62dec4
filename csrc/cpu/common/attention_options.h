// Host side of attention.h: the options of a call in the layouts that the kernels read, and the
// way back for their gradients. Never included by a *_kernel.cpp.
#pragma once

#include "attention.h"
#include "torch.h"

namespace fastvdm {

struct AttnOptions {
  AttnTables t{};
  std::vector<float> bias_t, rel_k, rel_v, cos, sin;
};

// frames: length of the sequence, images included, as the shapes of bias and rotary have it.
AttnOptions attention_options(int64_t heads, int64_t d, int64_t frames, int64_t images,
                              double scale, const OptTensor& bias, const OptTensor& rel_k,
                              const OptTensor& rel_v, const OptTensor& rotary);

// Partial sums of the tables' gradients, one set per part, and their reduction in the order of the
// parts, so that the result does not depend on the number of threads.
struct AttnPartials {
  AttnPartials(const AttnTables& t, int64_t parts, bool bias, bool rel_k, bool rel_v);
  AttnGrads part(int64_t i);
  // Each shaped and typed as its table; (0,) beside x where the table or the wish is missing.
  Tensor bias(const AttnTables& t, const OptTensor& like, int64_t frames, const Tensor& x) const;
  Tensor rel_k(const AttnTables& t, const OptTensor& like, const Tensor& x) const;
  Tensor rel_v(const AttnTables& t, const OptTensor& like, const Tensor& x) const;

  int64_t parts, bias_size, rel_k_size, rel_v_size;
  std::vector<float> bias_data, rel_k_data, rel_v_data;
};

}  // namespace fastvdm
