// The arguments of the kernels of linear_attention_block. Everything is per frame: an item is a
// frame or a split of its pixels. A panel is a (dp, cp) fp32 matrix, the features of one head by
// channels, zero beyond d and C.
#pragma once

#include "common/isa.h"

namespace fastvdm {

// Sums over frames, one set per part; null if not needed.
struct LinearBlockGrads {
  float *norm_weight, *norm_bias, *out_bias;  // (cp)
  float* qk;                                  // panels (2, heads)
  float *v, *out;                             // panels (heads)
};

struct LinearBlockArgs {
  int dtype;
  int heads, d, dp;  // dp: d rounded up to 16
  int channels, cp;  // cp: channels rounded up to 16
  int rows;          // pixels per chunk, a multiple of 32
  int64_t frames, pixels;
  int64_t splits, span;  // a split has `span` pixels, a multiple of `rows`; the last may be smaller
  float eps, scale;
  const void *x, *dy;
  void* y;                                          // dx in the backward
  const float *norm_weight, *norm_bias, *out_bias;  // (cp); the last two may be null
  const float *qk, *v, *out;  // panels (2, heads), (heads) and, for the transposed weight, (heads)
  const float *v_t, *out_t;   // (heads, C, dp): the transposed panels of v and out
  float* max;                 // (frames, splits, heads, dp): maxima of k over a split
  float* sum;                 // (frames, splits, heads, dp): sums of exp(k - max)
  float* g;            // panels (frames, splits, heads): Σ exp(k - max) x̂, then k'ᵀ x̂ in split 0
  float* m;            // panels (frames, heads): scale ctx outᵀ
  float *g_out, *lse;  // (frames, heads, d, C), (frames, heads, d); read in the backward
  // backward
  float* ctx;  // (frames, heads, dp, dp), times scale
  float* dm;   // panels (frames, splits, heads)
  float* dg;   // panels (frames, heads)
  float* r;    // (frames, heads, dp): Σ ctx dctx over a row
  float* dxn;  // (frames, pixels, cp)
  int64_t parts;
  LinearBlockGrads* grads;
  // For bf16 if the CPU multiplies it (products.h), else null. kp, dk: C and dp rounded up to 32.
  int kp, dk;
  const uint16_t* qk_tiles;  // left operands (2, heads) of (dp, kp)
  // Operands of `up_all`: (cp, heads dk) for tiles, else pairs of features, (heads dk / 2, cp)
  // words.
  const uint16_t *q_up, *k_up;  // backward
  uint16_t *m_tiles, *m_up;     // for m: (frames, heads) of (dp, kp); (frames) like q_up
  uint16_t *dg_tiles, *dg_up;   // backward: the same for dg
};

inline int64_t linear_block_panel(const LinearBlockArgs& a) {
  return static_cast<int64_t>(a.dp) * a.cp;
}

// fp32 words of scratch per thread for the bf16 operands of tile products, at its start: pairs of
// x̂ and its transpose, of dy and its transpose, a left operand, and pairs of all heads twice.
inline int64_t linear_block_tile_scratch(const LinearBlockArgs& a) {
  if (a.qk_tiles == nullptr) return 0;
  const int64_t wide = static_cast<int64_t>(a.kp) * a.rows;
  return (4 * wide + static_cast<int64_t>(a.dp) * a.rows +
          2 * static_cast<int64_t>(a.heads) * a.dk * a.rows) /
         2;
}

// fp32 words of scratch per thread: x̂, x_hat, dy and two transposes; rows of two heads; 1/σ.
inline int64_t linear_block_scratch(const LinearBlockArgs& a) {
  const int64_t rows = a.rows;
  return linear_block_tile_scratch(a) + 5 * rows * a.cp + 2 * rows * a.dp + rows +
         static_cast<int64_t>(a.dp) * a.dp;
}

// Forward: Σ exp(k - max) x̂ of a split; ctx and m of the frame; y of a split.
FASTVDM_DECLARE_BF16(void linear_block_sum(const LinearBlockArgs&, int64_t begin, int64_t end,
                                           float*))
FASTVDM_DECLARE_BF16(void linear_block_fold(const LinearBlockArgs&, int64_t begin, int64_t end,
                                            float*))
FASTVDM_DECLARE_BF16(void linear_block_apply(const LinearBlockArgs&, int64_t begin, int64_t end,
                                             float*))
// Backward: m again from g; the gradients through q, by parts; dctx and dg; the gradients through
// k.
FASTVDM_DECLARE_BF16(void linear_block_unfold(const LinearBlockArgs&, int64_t begin, int64_t end,
                                              float*))
FASTVDM_DECLARE_BF16(void linear_block_bwd_q(const LinearBlockArgs&, int64_t begin, int64_t end,
                                             float*))
FASTVDM_DECLARE_BF16(void linear_block_bwd_fold(const LinearBlockArgs&, int64_t begin, int64_t end,
                                                float*))
FASTVDM_DECLARE_BF16(void linear_block_bwd_k(const LinearBlockArgs&, int64_t begin, int64_t end,
                                             float*))

}  // namespace fastvdm
