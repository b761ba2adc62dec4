// Backward of linear_attention_block. With y = q' M, M = ctx W_outᵀ, ctx = scale G W_vᵀ and
// G = k'ᵀ x̂:
//   dM = q'ᵀ dy,  dq' = dy Mᵀ,  dctx = dM W_out,  dG = dctx W_v,  dk' = x̂ dGᵀ,  dx̂ += k' dG,
// and as k' sums to one over the pixels, its softmax subtracts Σ_n k' dk' = Σ ctx dctx (per row).
// So v and the output of the attention do not occur here either. q and k are recomputed.
#include "linear_attention_block_parts.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

void unfold(const LinearBlockArgs& a, int64_t begin, int64_t end) {
  const int64_t panel = linear_block_panel(a), square = (int64_t)a.dp * a.dp;
  for (int64_t frame = begin; frame < end; ++frame) {
    float *g = a.g + frame * a.splits * a.heads * panel, *m = a.m + frame * a.heads * panel;
    for (int h = 0; h < a.heads; ++h) {
      const int64_t head = frame * a.heads + h;
      const float* from = a.g_out + head * a.d * a.channels;
      for (int c = 0; c < a.d; ++c)
        widen_row(from + (int64_t)c * a.channels, g + h * panel + (int64_t)c * a.cp, a.channels,
                  a.cp);
      fold_head(a, h, g + h * panel, a.ctx + head * square, m + h * panel);
    }
    if (a.m_tiles != nullptr)
      make_operands(a, m, a.m_tiles + frame * a.heads * a.dp * a.kp,
                    a.m_up + frame * a.cp * a.heads * a.dk);
  }
}

// The first item of part `part` of `parts`.
FASTVDM_INLINE int64_t first_of(int64_t items, int64_t part, int64_t parts) {
  return items * part / parts;
}

template <class T>
void bwd_q(const LinearBlockArgs& a, int64_t begin, int64_t end, float* memory) {
  const int64_t panel = linear_block_panel(a), items = a.frames * a.splits;
  const Scratch s = scratch_of<T>(a, memory);
#if FASTVDM_BF16
  const ProductScope scope;
#endif
  for (int64_t part = begin; part < end; ++part) {
    const LinearBlockGrads grads = a.grads[part];
    const int64_t last = first_of(items, part + 1, a.parts);
    for (int64_t item = first_of(items, part, a.parts); item < last; ++item) {
      const Part p = part_of(a, item);
      const float* m = a.m + p.frame * a.heads * panel;
      float* dm = a.dm + item * a.heads * panel;
      memset(dm, 0, sizeof(float) * a.heads * panel);
      for (int64_t row = p.begin; row < p.end; row += a.rows) {
        const int n = p.end - row < a.rows ? (int)(p.end - row) : a.rows;
        load_x<T>(a, s, p.frame, row, n, false);
        load_dy<T>(a, s, p.frame, row, n);
        finish(a, s.dy, n);
        if (grads.out_bias != nullptr) add_columns(s.dy.rows, n, a.cp, grads.out_bias);
        float* dxn = a.dxn + (p.frame * a.pixels + row) * a.cp;
        for (int h = 0; h < a.heads; ++h) {
          down(a, a.qk + h * panel, a.qk_tiles + (int64_t)h * a.dp * a.kp, s.x, s.t);
          softmax_features<T>(a, s.t);
          outer(a, s, s.t, n, s.dy, dm + h * panel);
          down(a, m + h * panel, a.m_tiles + (p.frame * a.heads + h) * a.dp * a.kp, s.dy, s.u);
          for (int i = 0; i < a.rows; i += VL) {
            vf delta = {};
            for (int c = 0; c < a.d; ++c)
              delta += load(s.t + (int64_t)c * a.rows + i) * load(s.u + (int64_t)c * a.rows + i);
            for (int c = 0; c < a.d; ++c) {
              float* u = s.u + (int64_t)c * a.rows + i;
              store(u, load(s.t + (int64_t)c * a.rows + i) * (load(u) - delta));
            }
          }
          clear_beyond(a, s.u, n);
          up(a, h, s.u, n, a.qk + h * panel, dxn, h > 0, s.all);
          if (grads.qk != nullptr) outer(a, s, s.u, n, s.x, grads.qk + h * panel);
        }
        up_all(a, s.all, a.q_up, nullptr, nullptr, n, s.dy.across, s.hat, dxn, false);
      }
    }
  }
}

void bwd_fold(const LinearBlockArgs& a, int64_t begin, int64_t end, float* memory) {
  const int64_t panel = linear_block_panel(a), square = (int64_t)a.dp * a.dp;
  float* dctx = memory;
  for (int64_t part = begin; part < end; ++part) {
    const LinearBlockGrads grads = a.grads[part];
    const int64_t last = first_of(a.frames, part + 1, a.parts);
    for (int64_t frame = first_of(a.frames, part, a.parts); frame < last; ++frame) {
      float* dm = a.dm + frame * a.splits * a.heads * panel;
      for (int64_t s = 1; s < a.splits; ++s)
        for (int64_t i = 0; i < a.heads * panel; i += VL)
          store(dm + i, load(dm + i) + load(dm + s * a.heads * panel + i));
      float* dg = a.dg + frame * a.heads * panel;
      for (int h = 0; h < a.heads; ++h) {
        const float* ctx = a.ctx + (frame * a.heads + h) * square;
        const float* g = a.g + (frame * a.splits * a.heads + h) * panel;
        float *dm_h = dm + h * panel, *dg_h = dg + h * panel;
        float* r = a.r + (frame * a.heads + h) * a.dp;
        gemm<false>(a.d, a.dp, a.channels, dm_h, a.cp, a.out_t + (int64_t)h * a.channels * a.dp,
                    a.dp, dctx, a.dp, false);
        if (grads.out != nullptr)
          gemm<true>(a.d, a.cp, a.d, ctx, a.dp, dm_h, a.cp, grads.out + h * panel, a.cp, true);
        for (int c = 0; c < a.d; ++c) {
          double dot = 0;
          for (int e = 0; e < a.d; ++e)
            dot += (double)dctx[(int64_t)c * a.dp + e] * ctx[(int64_t)c * a.dp + e];
          r[c] = (float)dot;
        }
        for (int64_t i = 0; i < (int64_t)a.d * a.dp; i += VL)
          store(dctx + i, load(dctx + i) * a.scale);
        gemm<false>(a.d, a.cp, a.d, dctx, a.dp, a.v + h * panel, a.cp, dg_h, a.cp, false);
        memset(dg_h + (int64_t)a.d * a.cp, 0, sizeof(float) * (a.dp - a.d) * a.cp);
        if (grads.v != nullptr)
          gemm<true>(a.d, a.cp, a.d, dctx, a.dp, g, a.cp, grads.v + h * panel, a.cp, true);
      }
      if (a.dg_tiles != nullptr)
        make_operands(a, dg, a.dg_tiles + frame * a.heads * a.dp * a.kp,
                      a.dg_up + frame * a.cp * a.heads * a.dk);
    }
  }
}

template <class T>
void bwd_k(const LinearBlockArgs& a, int64_t begin, int64_t end, float* memory) {
  const int64_t panel = linear_block_panel(a), items = a.frames * a.splits;
  const Scratch s = scratch_of<T>(a, memory);
  const LayerNorm norm{a.channels, a.cp, a.eps, a.norm_weight, a.norm_bias};
#if FASTVDM_BF16
  const ProductScope scope;
#endif
  for (int64_t part = begin; part < end; ++part) {
    const LinearBlockGrads grads = a.grads[part];
    const int64_t last = first_of(items, part + 1, a.parts);
    for (int64_t item = first_of(items, part, a.parts); item < last; ++item) {
      const Part p = part_of(a, item);
      const float* dg = a.dg + p.frame * a.heads * panel;
      for (int64_t row = p.begin; row < p.end; row += a.rows) {
        const int n = p.end - row < a.rows ? (int)(p.end - row) : a.rows;
        load_x<T>(a, s, p.frame, row, n, true);
        float* dxn = a.dxn + (p.frame * a.pixels + row) * a.cp;
        for (int h = 0; h < a.heads; ++h) {
          const int64_t w = a.heads + h, head = p.frame * a.heads + h;
          down(a, a.qk + w * panel, a.qk_tiles + w * a.dp * a.kp, s.x, s.t);
          down(a, dg + h * panel, a.dg_tiles + head * a.dp * a.kp, s.x, s.u);
          for (int c = 0; c < a.d; ++c) {
            float *k = s.t + (int64_t)c * a.rows, *dk = s.u + (int64_t)c * a.rows;
            const float lse = a.lse[head * a.d + c];
            vexp_rows<kDegree<T>>(k, VL, a.rows / VL, splat(lse));
            float r = a.r[head * a.dp + c];
            // If the chunk is the whole frame, the sum of k' dk' itself cancels better: exactly for
            // a single pixel, whose softmax is constant.
            if (n == a.pixels) {
              r = 0.f;
              for (int i = 0; i < n; ++i) r += k[i] * dk[i];
            }
            for (int i = 0; i < a.rows; i += VL) store(dk + i, load(k + i) * (load(dk + i) - r));
          }
          clear_beyond(a, s.t, n);
          clear_beyond(a, s.u, n);
          up(a, h, s.t, n, dg + h * panel, dxn, true, s.all);
          up(a, h, s.u, n, a.qk + w * panel, dxn, true, s.all2);
          if (grads.qk != nullptr) outer(a, s, s.u, n, s.x, grads.qk + w * panel);
        }
        up_all(a, s.all, a.dg_up + p.frame * a.cp * a.heads * a.dk, s.all2, a.k_up, n, s.dy.across,
               s.dy.rows, dxn, true);
        load_dy<T>(a, s, p.frame, row, n);
        T* dx = (T*)a.y + (p.frame * a.pixels + row) * a.channels;
        for (int r = 0; r < n; ++r) {
          const int64_t at = (int64_t)r * a.cp;
          layer_norm_bwd(norm, dxn + at, s.hat + at, s.inv[r], s.dy.rows + at, grads.norm_weight,
                         grads.norm_bias, dx + (int64_t)r * a.channels);
        }
      }
    }
  }
}

}  // namespace

void linear_block_unfold(const LinearBlockArgs& a, int64_t begin, int64_t end, float*) {
  unfold(a, begin, end);
}
void linear_block_bwd_q(const LinearBlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, bwd_q, a, begin, end, scratch)
}
void linear_block_bwd_fold(const LinearBlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  bwd_fold(a, begin, end, scratch);
}
void linear_block_bwd_k(const LinearBlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, bwd_k, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
