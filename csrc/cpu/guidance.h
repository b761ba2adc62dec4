// The arguments of the kernels of the guidance steps. An item is one row of W pixels of one frame
// and channel or, with a low resolution, the `factor` rows above one of its rows.
#pragma once

#include "common/isa.h"

namespace fastvdm {

// A (B, C, F, H, W) tensor of any type and strides.
struct Strided {
  const void* data;  // null: absent
  int dtype;
  int64_t b, c, f, h, w;
};

struct GuidanceArgs {
  int64_t channels, frames, height, width;
  int64_t num_known, num_low;
  int factor;
  bool clip;
  const float *z, *coef;  // contiguous; coef (B, 4) of the seed, (B, 9) of the update
  const float* known;     // (B, C, num_known, H, W)
  const int32_t* slot;    // (F,), -1 where a frame is not given
  // seed
  const float *low_res, *extra;
  const int32_t* low_slot;
  Strided out, seed;  // the network's output; the seed of its backward pass (written)
  float* x_hat;
  // update
  Strided estimate, grad, direct;
  const float *noise, *threshold;
  const int64_t* rng;  // (B, rng_columns) Philox keys, then counts added to step; or null
  int rng_columns;     // 1 or 2
  uint32_t step;
  float *x_tilde, *z_next;  // x_tilde may be null
};

// fp32 words of scratch.
inline int64_t guidance_scratch(const GuidanceArgs& a) { return (a.factor + 3) * (a.width + 16); }

FASTVDM_DECLARE(void guidance_seed(const GuidanceArgs&, int64_t begin, int64_t end, float*))
FASTVDM_DECLARE(void guidance_update(const GuidanceArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
