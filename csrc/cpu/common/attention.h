// Shared by host and kernels: softmax attention over one sequence, for axis_attention and the fused
// temporal_block.
#pragma once

#include <cstdint>

namespace fastvdm {

// The options of one call in the fp32 layouts of the kernels. n: number of positions that attend to
// each other; np, dp: n and the head dimension rounded up to 16 lanes.
struct AttnTables {
  int heads, d, dp, n, np;
  float scale;
  const float* bias_t;             // (heads, n, np): [key][query], or null
  const float *rel_k, *rel_v;      // (1 or heads, length, dp), or null
  int rel_k_heads, rel_v_heads;    // 1 or heads
  int rel_k_length, rel_v_length;  // 2R + 1
  const float *cos, *sin;          // (n, dp): factors of x and, signed, of its swapped pair
};

// fp32 words of scratch that the core needs besides q, k, v.
inline int64_t attention_work(const AttnTables& t) {
  const int lanes = 16;
  const int64_t rel = t.rel_k_length > t.rel_v_length ? t.rel_k_length : t.rel_v_length;
  return 3 * static_cast<int64_t>(t.dp) * lanes + 2 * static_cast<int64_t>(t.n) * lanes +
         3 * rel * lanes + 4 * lanes;
}

// The same for the core with bf16 products.
inline int64_t attention_dots_work(const AttnTables& t) {
  const int64_t lanes = 16, np = t.np, dp = t.dp;
  return 3 * np * dp + 2 * dp * lanes + 3 * np * lanes;
}

// Gradients summed over sequences, in the layouts of the kernels; null if not needed.
struct AttnGrads {
  float* bias_t;  // (heads, n, np)
  float* rel_k;   // (rel_k_heads, length, dp)
  float* rel_v;
};

}  // namespace fastvdm
