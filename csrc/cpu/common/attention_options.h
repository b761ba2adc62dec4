// The host side of attention.h: converts the options of a call to the layouts of the kernels, and
// their gradients back. Never included by a *_kernel.cpp.
#pragma once

#include "attention.h"
#include "torch.h"

namespace fastvdm {

struct AttnOptions {
  AttnTables t{};
  std::vector<float> bias_t, rel_k, rel_v, cos, sin;
};

// frames: length of the sequence, images included, as in the shapes of bias and rotary.
AttnOptions attention_options(int64_t heads, int64_t d, int64_t frames, int64_t images,
                              double scale, const OptTensor& bias, const OptTensor& rel_k,
                              const OptTensor& rel_v, const OptTensor& rotary);

// Partial sums of the tables' gradients, one set per part. They are added in the order of the
// parts, so that the result does not depend on the number of threads.
struct AttnPartials {
  AttnPartials(const AttnTables& t, int64_t parts, bool bias, bool rel_k, bool rel_v);
  AttnGrads part(int64_t i);
  // Each is shaped and typed as its table, or (0,) if the table is missing or was not asked for.
  Tensor bias(const AttnTables& t, const OptTensor& like, int64_t frames, const Tensor& x) const;
  Tensor rel_k(const AttnTables& t, const OptTensor& like, const Tensor& x) const;
  Tensor rel_v(const AttnTables& t, const OptTensor& like, const Tensor& x) const;

  int64_t parts, bias_size, rel_k_size, rel_v_size;
  std::vector<float> bias_data, rel_k_data, rel_v_data;
};

}  // namespace fastvdm
