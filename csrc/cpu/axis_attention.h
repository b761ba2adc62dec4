// The arguments of the kernels of axis_attention. A sequence runs along time (one per pixel) or
// space (one per frame); `outer` is the number of sequences per video. An item is a part of the
// sequences and a group of heads.
#pragma once

#include "common/attention.h"
#include "common/isa.h"

namespace fastvdm {

// Strides in elements of a (B, F, H, W, [3,] heads, D) tensor, as (batch, outer, sequence, ...).
struct AxisStrides {
  int64_t batch, outer, seq, three, head;
};

struct AxisArgs {
  int dtype;
  AttnTables t;
  int64_t batch, outer, frames;  // frames: length of a sequence, images included
  int group;                     // heads per item
  int64_t parts;                 // parts of the batch * outer sequences
  const uint8_t* focus;          // (batch), or null
  const void *qkv, *dout;
  void *out, *dqkv;
  AxisStrides in, grad_out, dense_out, dense_qkv;
  AttnGrads* grads;  // one set per part, or null
  int64_t scratch;   // fp32 words per thread
};

FASTVDM_DECLARE(void axis_attention_fwd(const AxisArgs&, int64_t begin, int64_t end, float*))
FASTVDM_DECLARE(void axis_attention_bwd(const AxisArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
