// x + out(attention(LayerNorm_C(x))) for a few pixels at a time. Norm, projections, attention and
// residual stay in L1/L2; only x is read and y written. The backward recomputes all of it from x.
#include "temporal_block.h"

#include "common/attention_dots.h"
#include "common/layer_norm.h"
#include "common/products.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

struct Tile {
  int64_t batch, pixel;
  int pixels, rows;
};

FASTVDM_INLINE Tile tile_of(const BlockArgs& a, int64_t i) {
  Tile t;
  t.batch = i / a.tiles_a_video;
  t.pixel = i % a.tiles_a_video * a.pixels;
  const int64_t left = a.hw - t.pixel;
  t.pixels = left < a.pixels ? (int)left : a.pixels;
  t.rows = t.pixels * (int)a.frames;
  return t;
}

// Offset of row r (pixel r / frames, frame r % frames) of a tile in x.
FASTVDM_INLINE int64_t row_at(const BlockArgs& a, const Tile& t, int r) {
  const int64_t f = r % a.frames, p = t.pixel + r / a.frames;
  return ((t.batch * a.frames + f) * a.hw + p) * a.channels;
}

// LayerNorm of the tile: xn (rows, cp), zero beyond the channels. hat receives x_hat and rstd its
// scale, unless null.
template <class T>
FASTVDM_INLINE void normalise(const BlockArgs& a, const Tile& t, float* xn, float* hat,
                              float* rstd) {
  const LayerNorm norm{a.channels, a.cp, a.eps, a.norm_weight, a.norm_bias};
  for (int r = 0; r < t.rows; ++r) {
    const int64_t at = (int64_t)r * a.cp;
    const float inv = layer_norm(norm, (const T*)a.x + row_at(a, t, r), xn + at,
                                 hat == nullptr ? nullptr : hat + at);
    if (rstd != nullptr) rstd[r] = inv;
  }
}

// The bf16 operands of products; empty if they run in fp32. Rows of the normalised x and of dy
// (rows, kp), and the outputs of all heads: o (rows, heads dk); in the backward also dq, dk, dv
// (rows, 3 heads dk). pairs: memory for pairs of rows of all of them.
struct Operands {
  bf16 *xn = nullptr, *dy = nullptr, *o = nullptr, *grads = nullptr;
  uint32_t* pairs = nullptr;
  int64_t heads = 0;  // width of o
};

// They are at the start of the scratch memory.
template <class T>
FASTVDM_INLINE Operands operands(const BlockArgs& a, float* scratch, bool backward) {
  Operands m;
#if FASTVDM_BF16
  if (sizeof(T) == 2 && a.qkv_tiles != nullptr) {
    const int64_t rows = block_rows(a);
    m.heads = (int64_t)a.t.heads * a.dk;
    m.xn = (bf16*)scratch;
    m.o = m.xn + rows * a.kp;
    if (backward) {
      m.dy = m.o + rows * m.heads;
      m.grads = m.dy + rows * a.kp;
      m.pairs = (uint32_t*)(m.grads + 3 * rows * m.heads);
    }
  }
#endif
  return m;
}

#if FASTVDM_BF16
// Gradients of `parts` weights (dp, cp) += left (rows, parts dk)ᵀ right (rows, kp), of bf16 rows.
FASTVDM_INLINE void weight_gradients(const BlockArgs& a, int rows, int parts, const bf16* left,
                                     const bf16* right, uint32_t* pairs, float* to) {
  const int64_t width = (int64_t)parts * a.dk;
  uint32_t* others = pairs + (rows + 1) / 2 * width;
  interleave_rows(left, rows, width, pairs);
  interleave_rows(right, rows, a.kp, others);
  const int whole = a.t.dp == a.dk ? 1 : parts,
            features = parts / whole * a.t.dp;  // per product
  for (int i = 0; i < whole; ++i)
    dot_gemm<true>(features, a.cp, (rows + 1) / 2, pairs + (int64_t)i * a.dk, width,
                   {others, a.kp, 16}, to + (int64_t)i * a.t.dp * a.cp, a.cp, true);
}
#endif

// One of q, k, v (which = 0, 1, 2) of a head: (rows, dp).
FASTVDM_INLINE void project(const BlockArgs& a, const Operands& m, int rows, const float* xn,
                            int head, int which, float* to) {
  const int dp = a.t.dp;
  const int64_t at = (int64_t)head * 3 + which;
#if FASTVDM_BF16
  if (m.xn != nullptr)
    bf16_gemm(rows, dp, a.channels, m.xn, a.kp, (const bf16*)a.qkv_tiles + at * a.kp * dp, to, dp);
  else
#endif
    gemm<false>(rows, dp, a.channels, xn, a.cp, a.qkv_t + at * a.channels * dp, dp, to, dp, false);
  if (a.qkv_bias == nullptr) return;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < dp; c += VL)
      store(to + (int64_t)r * dp + c,
            load(to + (int64_t)r * dp + c) + load(a.qkv_bias + at * dp + c));
}

// Rotates in place the rows of the frames that attend.
FASTVDM_INLINE void rotate_rows(const BlockArgs& a, const Tile& t, float* x) {
  const int dp = a.t.dp;
  if (a.t.cos == nullptr) return;
  for (int p = 0; p < t.pixels; ++p)
    for (int f = 0; f < a.t.n; ++f) {
      float* row = x + ((int64_t)p * a.frames + f) * dp;
      rotate_row(row, row, a.t.cos + (int64_t)f * dp, a.t.sin + (int64_t)f * dp, dp, 1.f);
    }
}

// o = v + rel_v[distance 0] for the frames from `first` on, for every pixel.
FASTVDM_INLINE void identity(const BlockArgs& a, const Tile& t, int head, int first, const float* v,
                             float* o) {
  const AttnTables& s = a.t;
  const float* rel = nullptr;
  if (s.rel_v != nullptr)
    rel = s.rel_v +
          ((s.rel_v_heads > 1 ? (int64_t)head * s.rel_v_length : 0) + s.rel_v_length / 2) * s.dp;
  for (int p = 0; p < t.pixels; ++p)
    for (int64_t f = first; f < a.frames; ++f)
      for (int c = 0; c < s.dp; c += VL) {
        const int64_t at = (p * a.frames + f) * s.dp + c;
        const vf x = load(v + at);
        store(o + at, rel == nullptr ? x : x + load(rel + c));
      }
}

FASTVDM_INLINE void attend_tile(const BlockArgs& a, const Operands& m, const Tile& t, int head,
                                int attending, const float* q, const float* k, const float* v,
                                float* o, float* work) {
  if (attending < a.frames) identity(a, t, head, attending, v, o);
  if (attending == 0) return;
  for (int p = 0; p < t.pixels; ++p) {
    const int64_t at = (int64_t)p * a.frames * a.t.dp;
#if FASTVDM_BF16
    if (m.xn != nullptr && has_dots(a.t)) {
      attend_dots(a.t, head, q + at, k + at, v + at, o + at, work);
      continue;
    }
#endif
    attend(a.t, head, q + at, q + at, k + at, v + at, o + at, work);
  }
}

template <class T>
void fwd(const BlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int C = a.channels, cp = a.cp, dp = a.t.dp;
  const int64_t rows = (int64_t)a.pixels * a.frames + 16;
  float *xn = scratch + block_tile_scratch(a, false), *y = xn + rows * cp, *q = y + rows * cp;
  float *k = q + rows * dp, *v = k + rows * dp, *o = v + rows * dp, *work = o + rows * dp;
  const Operands m = operands<T>(a, scratch, false);
#if FASTVDM_BF16
  const ProductScope scope;
#endif
  for (int64_t i = a.tiles * begin / a.parts; i < a.tiles * end / a.parts; ++i) {
    const Tile t = tile_of(a, i);
    const int attending = a.focus != nullptr && a.focus[t.batch] ? 0 : a.t.n;
    normalise<T>(a, t, xn, nullptr, nullptr);
    if (m.xn != nullptr) round_rows(xn, t.rows, cp, m.xn, a.kp, a.kp);
    for (int h = 0; h < a.t.heads; ++h) {
      if (attending > 0) {
        project(a, m, t.rows, xn, h, 0, q);
        project(a, m, t.rows, xn, h, 1, k);
        rotate_rows(a, t, q);
        rotate_rows(a, t, k);
      }
      project(a, m, t.rows, xn, h, 2, v);
      attend_tile(a, m, t, h, attending, q, k, v, o, work);
      if (m.xn != nullptr)
        round_rows(o, t.rows, dp, m.o + h * a.dk, m.heads, a.dk);
      else
        gemm<false>(t.rows, cp, a.t.d, o, dp, a.out_t + (int64_t)h * dp * cp, cp, y, cp, h > 0);
    }
#if FASTVDM_BF16
    if (m.xn != nullptr)
      bf16_gemm(t.rows, cp, (int)m.heads, m.o, m.heads, (const bf16*)a.out_tiles, y, cp);
#endif
    for (int r = 0; r < t.rows; ++r) {
      const int64_t at = row_at(a, t, r);
      add_residual((const T*)a.x + at, y + (int64_t)r * cp, a.out_bias, C, (T*)a.y + at);
    }
  }
}

template <class T>
void bwd(const BlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int C = a.channels, cp = a.cp, dp = a.t.dp;
  const int64_t rows = (int64_t)a.pixels * a.frames + 16, wide = rows * cp, head = rows * dp;
  float *xn = scratch + block_tile_scratch(a, true), *hat = xn + wide, *dy = hat + wide;
  float *dxn = dy + wide, *q = dxn + wide, *k = q + head, *v = k + head, *o = v + head;
  float *dout = o + head, *dq = dout + head, *dk = dq + head, *dv = dk + head, *rstd = dv + head;
  float* work = rstd + 2 * rows;
  const Operands m = operands<T>(a, scratch, true);
#if FASTVDM_BF16
  const ProductScope scope;
#endif
  for (int64_t part = begin; part < end; ++part) {
    const BlockGrads g = a.grads[part];
    for (int64_t i = a.tiles * part / a.parts; i < a.tiles * (part + 1) / a.parts; ++i) {
      const Tile t = tile_of(a, i);
      const int attending = a.focus != nullptr && a.focus[t.batch] ? 0 : a.t.n;
      normalise<T>(a, t, xn, hat, rstd);
      for (int r = 0; r < t.rows; ++r)
        widen_row((const T*)a.dy + row_at(a, t, r), dy + (int64_t)r * cp, C, cp);
      if (g.out_bias != nullptr) add_columns(dy, t.rows, cp, g.out_bias);
      if (m.xn != nullptr) {
        round_rows(xn, t.rows, cp, m.xn, a.kp, a.kp);
        round_rows(dy, t.rows, cp, m.dy, a.kp, a.kp);
      }
      for (int h = 0; h < a.t.heads; ++h) {
        if (attending > 0) {
          project(a, m, t.rows, xn, h, 0, q);
          project(a, m, t.rows, xn, h, 1, k);
          rotate_rows(a, t, q);
          rotate_rows(a, t, k);
        }
        project(a, m, t.rows, xn, h, 2, v);
#if FASTVDM_BF16
        if (m.xn != nullptr)
          bf16_gemm(t.rows, dp, C, m.dy, a.kp, (const bf16*)a.dout_tiles + (int64_t)h * a.kp * dp,
                    dout, dp);
        else
#endif
          gemm<false>(t.rows, dp, C, dy, cp, a.out + (int64_t)h * C * dp, dp, dout, dp, false);
        if (g.out != nullptr) {
          attend_tile(a, m, t, h, attending, q, k, v, o, work);
          if (m.xn != nullptr)
            round_rows(o, t.rows, dp, m.o + h * a.dk, m.heads, a.dk);
          else
            gemm<true>(dp, cp, t.rows, o, dp, dy, cp, g.out + (int64_t)h * dp * cp, cp, true);
        }
        if (attending < a.frames) {
          memset(dq, 0, sizeof(float) * (int64_t)t.rows * dp);
          memset(dk, 0, sizeof(float) * (int64_t)t.rows * dp);
          memcpy(dv, dout, sizeof(float) * (int64_t)t.rows * dp);
          if (g.attn.rel_v != nullptr) {
            float* to = g.attn.rel_v + ((a.t.rel_v_heads > 1 ? (int64_t)h * a.t.rel_v_length : 0) +
                                        a.t.rel_v_length / 2) *
                                           dp;
            for (int p = 0; p < t.pixels; ++p)
              add_columns(dout + ((int64_t)p * a.frames + attending) * dp,
                          (int)a.frames - attending, dp, to);
          }
        }
        if (attending > 0)
          for (int p = 0; p < t.pixels; ++p) {
            const int64_t at = (int64_t)p * a.frames * dp;
#if FASTVDM_BF16
            if (m.xn != nullptr && has_dots(a.t)) {
              attend_bwd_dots(a.t, g.attn, h, q + at, k + at, v + at, dout + at, dq + at, dk + at,
                              dv + at, work);
              continue;
            }
#endif
            attend_bwd(a.t, g.attn, h, q + at, q + at, k + at, v + at, dout + at, dq + at, dk + at,
                       dv + at, work);
          }
        float* const parts[3] = {dq, dk, dv};
        for (int w = attending > 0 || m.xn != nullptr ? 0 : 2; w < 3; ++w) {
          const int64_t at = (int64_t)h * 3 + w;
          const bool first = h == 0 && w == (attending > 0 ? 0 : 2);
          if (m.xn != nullptr)
            round_rows(parts[w], t.rows, dp, m.grads + at * a.dk, 3 * m.heads, a.dk);
          else
            gemm<false>(t.rows, cp, a.t.d, parts[w], dp, a.qkv + at * dp * cp, cp, dxn, cp, !first);
          if (g.qkv != nullptr && m.xn == nullptr)
            gemm<true>(dp, cp, t.rows, parts[w], dp, xn, cp, g.qkv + at * dp * cp, cp, true);
          if (g.qkv_bias != nullptr) add_columns(parts[w], t.rows, dp, g.qkv_bias + at * dp);
        }
      }
#if FASTVDM_BF16
      if (m.xn != nullptr) {
        const int64_t width = 3 * m.heads;
        bf16_gemm(t.rows, cp, (int)width, m.grads, width, (const bf16*)a.dqkv_tiles, dxn, cp);
        if (g.qkv != nullptr)
          weight_gradients(a, t.rows, 3 * a.t.heads, m.grads, m.xn, m.pairs, g.qkv);
        if (g.out != nullptr) weight_gradients(a, t.rows, a.t.heads, m.o, m.dy, m.pairs, g.out);
      }
#endif
      const LayerNorm norm{C, cp, a.eps, a.norm_weight, a.norm_bias};
      for (int r = 0; r < t.rows; ++r) {
        const int64_t at = (int64_t)r * cp;
        layer_norm_bwd(norm, dxn + at, hat + at, rstd[r], dy + at, g.norm_weight, g.norm_bias,
                       (T*)a.y + row_at(a, t, r));
      }
    }
  }
}

}  // namespace

void temporal_block_fwd(const BlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, fwd, a, begin, end, scratch)
}
void temporal_block_bwd(const BlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, bwd, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
