// The arguments of the kernels of temporal_block. An item is a part of the tiles. A tile is
// `pixels` neighbouring pixels of one video with all their frames; its rows are ordered
// [pixel][frame].
#pragma once

#include <algorithm>

#include "common/attention.h"
#include "common/isa.h"

namespace fastvdm {

// Sums over tiles, one set per part; null if not needed. The layouts are those of the weights
// below.
struct BlockGrads {
  float *norm_weight, *norm_bias;  // (cp)
  float* qkv;                      // (heads, 3, dp, cp)
  float* qkv_bias;                 // (heads, 3, dp)
  float* out;                      // (heads, dp, cp)
  float* out_bias;                 // (cp)
  AttnGrads attn;
};

struct BlockArgs {
  int dtype;
  AttnTables t;
  int channels, cp;  // cp: channels rounded up to 16
  float eps;
  int64_t batch, frames, hw;
  int pixels;                    // per tile
  int64_t tiles, tiles_a_video;  // the last tile of a video may be smaller
  int64_t parts;
  const uint8_t* focus;  // (batch), or null
  const void *x, *dy;
  void* y;                               // dx in the backward
  const float *norm_weight, *norm_bias;  // (cp); bias may be null
  const float* qkv_t;                    // (heads, 3, channels, dp)
  const float* qkv_bias;                 // (heads, 3, dp), or null
  const float* out_t;                    // (heads, dp, cp)
  const float* out_bias;                 // (cp), or null
  const float* qkv;                      // backward: (heads, 3, dp, cp)
  const float* out;                      // backward: (heads, channels, dp)
  BlockGrads* grads;                     // backward: one set per part
  // For bf16 if the CPU multiplies it (products.h), else null: the same weights packed as operand B
  int kp, dk;                  // of products of depth kp and dk: channels and dp rounded up to 32
  const uint16_t* qkv_tiles;   // xn -> q, k or v: (heads, 3) of (kp, dp)
  const uint16_t* out_tiles;   // o -> y: (heads dk, cp)
  const uint16_t* dout_tiles;  // backward, dy -> do: (heads) of (kp, dp)
  const uint16_t* dqkv_tiles;  // backward, dq, dk, dv -> dxn: (heads 3 dk, cp)
};

// Rows of a tile's buffers, with room to round up to 16.
inline int64_t block_rows(const BlockArgs& a) {
  return static_cast<int64_t>(a.pixels) * a.frames + 16;
}

// fp32 words of scratch per thread for the bf16 operands of tile products, at its start.
inline int64_t block_tile_scratch(const BlockArgs& a, bool backward) {
  if (a.qkv_tiles == nullptr) return 0;
  const int64_t wide = a.kp, heads = static_cast<int64_t>(a.t.heads) * a.dk;
  return block_rows(a) * (backward ? 4 * wide + 8 * heads : wide + heads) / 2;
}

// fp32 words of scratch per thread.
inline int64_t block_scratch(const BlockArgs& a, bool backward) {
  const int64_t rows = block_rows(a), wide = rows * a.cp, head = rows * a.t.dp;
  return block_tile_scratch(a, backward) +
         (backward ? 4 * wide + 8 * head + 2 * rows : 2 * wide + 4 * head) +
         std::max(attention_work(a.t), attention_dots_work(a.t));
}

FASTVDM_DECLARE_BF16(void temporal_block_fwd(const BlockArgs&, int64_t begin, int64_t end, float*))
FASTVDM_DECLARE_BF16(void temporal_block_bwd(const BlockArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
