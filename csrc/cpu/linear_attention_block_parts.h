// Shared by the forward and backward kernels of linear_attention_block: a chunk of pixels and the
// three products of which they consist, in fp32 or, for bf16, in bf16.
//
// Per head, features run down and pixels across, (dp, rows). A projection is then W x̂ᵀ with the
// weight in its own layout, and neither softmax (over the features of q, over the pixels of k)
// needs a transposition.
#pragma once

#include "common/exp.h"
#include "common/gemm.h"
#include "common/layer_norm.h"
#include "common/products.h"
#include "linear_attention_block.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// An operand (pixels, channels) of a chunk, (rows, cp), and its transpose (cp, rows); for tiles
// both also as right operands.
struct Operand {
  float *rows, *across;
  bf16 *rows_tiles, *across_tiles;
};

struct Scratch {
  Operand x, dy;
  float *hat, *inv;  // of the norm: x_hat (rows, cp), 1/σ (rows)
  float *t, *u;      // (dp, rows), for one head
  bf16* left;        // (dp, rows): t or u as a left operand
  bf16 *all, *all2;  // (heads dk, rows): all heads as a right operand
};

template <class T>
FASTVDM_INLINE Scratch scratch_of(const LinearBlockArgs& a, float* memory) {
  const int64_t rows = a.rows, wide = rows * a.cp, head = rows * a.dp;
  Scratch s{};
#if FASTVDM_BF16
  if (sizeof(T) == 2 && a.qk_tiles != nullptr) {
    const int64_t deep = rows * a.kp, heads = rows * a.heads * a.dk;
    s.x.rows_tiles = (bf16*)memory;
    s.x.across_tiles = s.x.rows_tiles + deep;
    s.dy.rows_tiles = s.x.across_tiles + deep;
    s.dy.across_tiles = s.dy.rows_tiles + deep;
    s.left = s.dy.across_tiles + deep;
    s.all = s.left + head;
    s.all2 = s.all + heads;
  }
#endif
  memory += linear_block_tile_scratch(a);
  s.x.rows = memory;
  s.x.across = s.x.rows + wide;
  s.dy.rows = s.x.across + wide;
  s.dy.across = s.dy.rows + wide;
  s.hat = s.dy.across + wide;
  s.t = s.hat + wide;
  s.u = s.t + head;
  s.inv = s.u + head;
  return s;
}

struct Part {
  int64_t frame, begin, end;  // pixels
};

FASTVDM_INLINE Part part_of(const LinearBlockArgs& a, int64_t item) {
  Part p;
  p.frame = item / a.splits;
  p.begin = item % a.splits * a.span;
  p.end = p.begin + a.span < a.pixels ? p.begin + a.span : a.pixels;
  return p;
}

// to (columns, ldt) = the transpose of from (rows, ldf); both extents are multiples of VL.
FASTVDM_INLINE void transpose(const float* from, int rows, int columns, int64_t ldf, float* to,
                              int64_t ldt) {
  for (int r = 0; r < rows; r += VL)
    for (int c = 0; c < columns; c += VL)
      transpose_block(from + r * ldf + c, ldf, to + c * ldt + r, ldt);
}

// Completes an operand of n pixels: clears the other rows of the chunk, then makes its transpose,
// or both forms in bf16.
FASTVDM_INLINE void finish(const LinearBlockArgs& a, const Operand& o, int n) {
  memset(o.rows + (int64_t)n * a.cp, 0, sizeof(float) * (a.rows - n) * a.cp);
#if FASTVDM_BF16
  if (o.rows_tiles != nullptr) {
    pack_pairs(o.rows, a.cp, a.rows, a.rows, a.cp, o.rows_tiles, (int64_t)16 * a.rows);
    for (int r = 0; r < a.rows; r += VL) {
      uint32_t* to = (uint32_t*)o.across_tiles + (int64_t)r / 16 * 8 * a.kp + r % 16;
      pairs_to_lanes(o.rows + (int64_t)r * a.cp, a.cp, VL, a.cp, to, 16, (bf16*)o.across);
      for (int c = a.cp / 2; c < a.kp / 2; ++c) store_words(to + 16 * c, vu{});
    }
    return;
  }
#endif
  transpose(o.rows, a.rows, a.cp, a.cp, o.across, a.rows);
}

// The normalised x of n pixels from `row` on; for the backward also `hat` and `inv`.
template <class T>
FASTVDM_INLINE void load_x(const LinearBlockArgs& a, const Scratch& s, int64_t frame, int64_t row,
                           int n, bool backward) {
  const LayerNorm norm{a.channels, a.cp, a.eps, a.norm_weight, a.norm_bias};
  const T* x = (const T*)a.x + (frame * a.pixels + row) * a.channels;
  for (int r = 0; r < n; ++r) {
    const int64_t at = (int64_t)r * a.cp;
    const float inv = layer_norm(norm, x + (int64_t)r * a.channels, s.x.rows + at,
                                 backward ? s.hat + at : nullptr);
    if (backward) s.inv[r] = inv;
  }
  finish(a, s.x, n);
}

template <class T>
FASTVDM_INLINE void load_dy(const LinearBlockArgs& a, const Scratch& s, int64_t frame, int64_t row,
                            int n) {
  const T* dy = (const T*)a.dy + (frame * a.pixels + row) * a.channels;
  for (int r = 0; r < n; ++r)
    widen_row(dy + (int64_t)r * a.channels, s.dy.rows + (int64_t)r * a.cp, a.channels, a.cp);
}

// t (dp, rows) = w oᵀ, where w is a panel.
FASTVDM_INLINE void down(const LinearBlockArgs& a, const float* w, const uint16_t* w_tiles,
                         const Operand& o, float* t) {
#if FASTVDM_BF16
  if (o.across_tiles != nullptr) {
    bf16_gemm(a.dp, a.rows, a.channels, (const bf16*)w_tiles, a.kp, o.across_tiles, t, a.rows);
    return;
  }
#endif
  gemm<false>(a.d, a.rows, a.channels, w, a.cp, o.across, a.rows, t, a.rows, false);
}

// panel += t o over n pixels; o is zero beyond them.
FASTVDM_INLINE void outer(const LinearBlockArgs& a, const Scratch& s, const float* t, int n,
                          const Operand& o, float* panel) {
#if FASTVDM_BF16
  if (o.rows_tiles != nullptr) {
    round_rows(t, a.dp, a.rows, s.left, a.rows, a.rows);
    bf16_gemm(a.dp, a.cp, a.rows, s.left, a.rows, o.rows_tiles, panel, a.cp, true);
    return;
  }
#endif
  gemm<false>(a.d, a.cp, n, t, a.rows, o.rows, a.cp, panel, a.cp, true);
}

#if FASTVDM_BF16
// Pairs of features: t (d, width) to (dk / 2, width) words, zero beyond d.
FASTVDM_INLINE void pair_features(const LinearBlockArgs& a, const float* t, int width,
                                  uint32_t* to) {
  for (int c = 0; c < a.dk; c += 2, to += width)
    for (int i = 0; i < width; i += VL) {
      const float* at = t + (int64_t)c * width + i;
      store_words(to + i,
                  c >= a.d ? vu{} : pairs_of(load(at), c + 1 < a.d ? load(at + width) : vf{}));
    }
}
#endif

// y (n, cp) = or += tᵀ w of one head, where w is a panel. In bf16 it only stores t in `all`;
// `up_all`, called once after all heads, multiplies.
FASTVDM_INLINE void up(const LinearBlockArgs& a, int head, const float* t, int n, const float* w,
                       float* y, bool accumulate, bf16* all) {
#if FASTVDM_BF16
  if (all != nullptr) {
#if FASTVDM_TILES
    pack_pairs(t, a.rows, a.d, a.dk, a.rows, all + (int64_t)16 * head * a.dk,
               (int64_t)16 * a.heads * a.dk);
#else
    pair_features(a, t, a.rows, (uint32_t*)all + (int64_t)head * (a.dk / 2) * a.rows);
#endif
    return;
  }
#endif
  gemm<true>(n, a.cp, a.d, t, a.rows, w, a.cp, y, a.cp, accumulate);
}

// For bf16: y (n, cp) = or += the product of `all` with the panels `w` of all heads, and of `all2`
// with `w2` unless null. work: (cp, rows) and (rows, cp), for tiles.
FASTVDM_INLINE void up_all(const LinearBlockArgs& a, const bf16* all, const uint16_t* w,
                           const bf16* all2, const uint16_t* w2, int n, float* work,
                           float* transposed, float* y, bool accumulate) {
#if FASTVDM_TILES
  if (all == nullptr) return;
  const int depth = a.heads * a.dk;
  tile_gemm(a.cp, a.rows, depth, (const bf16*)w, depth, all, work, a.rows);
  if (all2 != nullptr)
    tile_gemm(a.cp, a.rows, depth, (const bf16*)w2, depth, all2, work, a.rows, true);
  transpose(work, a.cp, a.rows, a.rows, transposed, a.cp);
  for (int64_t i = 0; i < (int64_t)n * a.cp; i += VL)
    store(y + i, accumulate ? load(y + i) + load(transposed + i) : load(transposed + i));
#elif FASTVDM_BF16
  if (all == nullptr) return;
  const int pairs = a.heads * a.dk / 2;
  dot_gemm<true>(n, a.cp, pairs, (const uint32_t*)all, a.rows, {(const uint32_t*)w, a.cp, 16}, y,
                 a.cp, accumulate);
  if (all2 != nullptr)
    dot_gemm<true>(n, a.cp, pairs, (const uint32_t*)all2, a.rows, {(const uint32_t*)w2, a.cp, 16},
                   y, a.cp, true);
#endif
}

// The softmax over the features of q, in place: t (dp, rows), zero beyond d.
template <class T>
FASTVDM_INLINE void softmax_features(const LinearBlockArgs& a, float* t) {
  const int64_t ld = a.rows;
  for (int n = 0; n < a.rows; n += VL) {
    float* x = t + n;
    vf m = load(x);
    for (int c = 1; c < a.d; ++c) m = vmax(m, load(x + c * ld));
    const vf inv = 1.f / vexp_rows<kDegree<T>>(x, ld, a.d, m);
    for (int c = 0; c < a.d; ++c) store(x + c * ld, load(x + c * ld) * inv);
    for (int c = a.d; c < a.dp; ++c) store(x + c * ld, vf{});
  }
}

// Clears pixels from n to the end of the chunk, and features from d to dp.
FASTVDM_INLINE void clear_beyond(const LinearBlockArgs& a, float* t, int n) {
  for (int c = 0; c < a.d && n < a.rows; ++c)
    memset(t + (int64_t)c * a.rows + n, 0, sizeof(float) * (a.rows - n));
  memset(t + (int64_t)a.d * a.rows, 0, sizeof(float) * (a.dp - a.d) * a.rows);
}

// The two forms of a frame's panels as bf16 operands: left operands as they are, and those of
// `up_all`: for tiles left operands of the transpose, (cp, heads dk), else pairs of features.
FASTVDM_INLINE void make_operands(const LinearBlockArgs& a, const float* panels, uint16_t* tiles,
                                  uint16_t* transposed) {
#if FASTVDM_BF16
  const int64_t panel = linear_block_panel(a);
#if FASTVDM_TILES
  const int64_t depth = (int64_t)a.heads * a.dk;
  memset(transposed, 0, sizeof(bf16) * a.cp * depth);
#endif
  for (int h = 0; h < a.heads; ++h) {
    const float* from = panels + h * panel;
    round_rows(from, a.dp, a.cp, (bf16*)tiles + (int64_t)h * a.dp * a.kp, a.kp, a.kp);
#if FASTVDM_TILES
    for (int c = 0; c < a.d; ++c)
      for (int k = 0; k < a.cp; ++k)
        put((bf16*)transposed + k * depth + (int64_t)h * a.dk + c, from[c * a.cp + k]);
#else
    pair_features(a, from, a.cp, (uint32_t*)transposed + (int64_t)h * (a.dk / 2) * a.cp);
#endif
  }
#endif
}

// ctx (dp, dp) = scale g vᵀ and m = ctx outᵀ of one head, where g is a panel.
FASTVDM_INLINE void fold_head(const LinearBlockArgs& a, int head, const float* g, float* ctx,
                              float* m) {
  const int64_t panel = linear_block_panel(a);
  gemm<false>(a.d, a.dp, a.channels, g, a.cp, a.v_t + (int64_t)head * a.channels * a.dp, a.dp, ctx,
              a.dp, false);
  for (int64_t i = 0; i < (int64_t)a.d * a.dp; i += VL) store(ctx + i, load(ctx + i) * a.scale);
  gemm<false>(a.d, a.cp, a.d, ctx, a.dp, a.out + head * panel, a.cp, m, a.cp, false);
  memset(m + (int64_t)a.d * a.cp, 0, sizeof(float) * (a.dp - a.d) * a.cp);
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
