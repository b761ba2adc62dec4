// Linear attention over the pixels of a frame. The softmax of k keeps a running maximum, so it
// assumes no bound on the logits; that of q is computed transposed, with pixels in the lanes.
#include "linear_attention.h"

#include "common/exp.h"
#include "common/gemm.h"
#include "common/rows.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

constexpr int R = kLinearRows;
constexpr int RB = 16;  // pixels per chunk of the backward, so that all its heads stay in L2

// Rows [row, row + n) of q, k or v of a head, in fp32, with zeros up to a multiple of VL.
template <class T>
FASTVDM_INLINE void gather(const LinearArgs& a, int64_t frame, int64_t row, int n, int which,
                           int head, float* to) {
  const int64_t inner = (int64_t)a.heads * a.d;
  const T* from =
      (const T*)a.qkv + ((frame * a.pixels + row) * 3 + which) * inner + (int64_t)head * a.d;
  int i = 0;
  for (; i < n; ++i) widen_row(from + i * 3 * inner, to + (int64_t)i * a.dp, a.d, a.dp);
  for (; i % VL; ++i) memset(to + (int64_t)i * a.dp, 0, sizeof(float) * a.dp);
}

FASTVDM_INLINE void to_lanes(const float* x, int dp, float* out) {
  for (int i = 0; i < dp; i += VL) transpose_block(x + i, dp, out + i * VL, VL);
}
FASTVDM_INLINE void from_lanes(const float* x, int dp, float* out) {
  for (int i = 0; i < dp; i += VL) transpose_block(x + i * VL, VL, out + i, dp);
}

// Softmax down the d rows of x (dp, VL); rows beyond d become zero.
template <class T>
FASTVDM_INLINE void softmax_down(float* x, int d, int dp) {
  vf m = load(x);
  for (int c = 1; c < d; ++c) m = vmax(m, load(x + c * VL));
  const vf inv = 1.f / vexp_rows<kDegree<T>>(x, VL, d, m);
  for (int c = 0; c < d; ++c) store(x + c * VL, load(x + c * VL) * inv);
  for (int c = d; c < dp; ++c) store(x + c * VL, vf{});
}

template <class T>
void fwd(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int d = a.d, dp = a.dp;
  const int64_t size = (int64_t)dp * dp, inner = (int64_t)a.heads * d;
  const int64_t groups = (a.heads + a.group - 1) / a.group;
  float *ctx = scratch, *max = ctx + a.group * size, *sum = max + a.group * dp;
  float *k = sum + a.group * dp, *v = k + R * dp, *lanes = v + R * dp, *o = lanes + 16 * dp;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frame = item / groups;
    const int head0 = (int)(item % groups) * a.group;
    const int heads = a.heads - head0 < a.group ? a.heads - head0 : a.group;
    for (int64_t i = 0; i < heads * dp; i += VL) {
      store(max + i, splat(-3.4e38f));
      store(sum + i, vf{});
    }
    memset(ctx, 0, sizeof(float) * heads * size);
    for (int64_t row = 0; row < a.pixels; row += R) {
      const int n = a.pixels - row < R ? (int)(a.pixels - row) : R;
      for (int h = 0; h < heads; ++h) {
        gather<T>(a, frame, row, n, 1, head0 + h, k);
        gather<T>(a, frame, row, n, 2, head0 + h, v);
        float *mh = max + h * dp, *sh = sum + h * dp, *ch = ctx + h * size;
        for (int c = 0; c < dp; c += VL) {
          const vf before = load(mh + c);
          vf m = before;
          for (int i = 0; i < n; ++i) m = vmax(m, load(k + i * dp + c));
          vf s = load(sh + c);
          bool grew = false;
          float grown[VL];
          store(grown, m - before);
          for (int l = 0; l < VL; ++l) grew |= grown[l] > 0.f;
          if (grew) {  // rescale the sums so far to the new maximum
            const vf f = vexp(before - m);
            s = s * f;
            float by[VL];
            store(by, f);
            for (int l = 0; l < VL && row > 0; ++l) {
              float* line = ch + (int64_t)(c + l) * dp;
              for (int e = 0; e < dp; e += VL) store(line + e, load(line + e) * by[l]);
            }
            store(mh + c, m);
          }
          store(sh + c, s + vexp_rows<kDegree<T>>(k + c, dp, n, m));
        }
        gemm<true>(d, dp, n, k, dp, v, dp, ch, dp, true);
      }
    }
    for (int h = 0; h < heads; ++h) {
      const int64_t at = frame * a.heads + head0 + h;
      float *ch = ctx + h * size, *sh = sum + h * dp, *mh = max + h * dp;
      for (int c = 0; c < d; ++c) {
        float* line = ch + (int64_t)c * dp;
        const float inv = 1.f / sh[c];
        for (int e = 0; e < dp; e += VL) store(line + e, load(line + e) * inv);
        memcpy(a.ctx + (at * d + c) * d, line, sizeof(float) * d);
        a.lse[at * d + c] = mh[c] + __builtin_logf(sh[c]);
        for (int e = 0; e < dp; e += VL) store(line + e, load(line + e) * a.scale);
      }
    }
    for (int64_t row = 0; row < a.pixels; row += VL) {
      const int n = a.pixels - row < VL ? (int)(a.pixels - row) : VL;
      for (int h = 0; h < heads; ++h) {
        gather<T>(a, frame, row, n, 0, head0 + h, k);
        to_lanes(k, dp, lanes);
        softmax_down<T>(lanes, d, dp);
        gemm<true>(n, dp, d, lanes, VL, ctx + h * size, dp, o, dp, false);
        T* to = (T*)a.out + (frame * a.pixels + row) * inner + (int64_t)(head0 + h) * d;
        for (int i = 0; i < n; ++i) narrow_row(o + i * dp, to + i * inner, d);
      }
    }
  }
}

template <class T>
void bwd(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int d = a.d, dp = a.dp;
  const int64_t size = (int64_t)dp * dp, inner = (int64_t)a.heads * d;
  const int64_t groups = (a.heads + a.group - 1) / a.group;
  float *ctx = scratch, *dctx = ctx + a.group * size, *dctx_t = dctx + a.group * size;
  float *lse = dctx_t + a.group * size, *r = lse + a.group * dp;
  float *k = r + a.group * dp, *v = k + R * dp, *o = v + R * dp, *p = o + R * dp;
  float* g = p + R * dp;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frame = item / groups;
    const int head0 = (int)(item % groups) * a.group;
    const int heads = a.heads - head0 < a.group ? a.heads - head0 : a.group;
    memset(ctx, 0, sizeof(float) * 3 * a.group * size);
    memset(lse, 0, sizeof(float) * 2 * a.group * dp);
    for (int h = 0; h < heads; ++h) {
      const int64_t at = (frame * a.heads + head0 + h) * d;
      for (int c = 0; c < d; ++c)
        memcpy(ctx + h * size + (int64_t)c * dp, a.ctx + (at + c) * d, sizeof(float) * d);
      memcpy(lse + h * dp, a.lse + at, sizeof(float) * d);
    }
    T* const dqkv = (T*)a.dqkv + frame * a.pixels * 3 * inner + (int64_t)head0 * d;
    const T* const dout = (const T*)a.dout + frame * a.pixels * inner + (int64_t)head0 * d;

    // dctx = q'ᵀ dout and dq.
    for (int64_t row = 0; row < a.pixels; row += VL) {
      const int n = a.pixels - row < VL ? (int)(a.pixels - row) : VL;
      for (int h = 0; h < heads; ++h) {
        gather<T>(a, frame, row, n, 0, head0 + h, k);
        for (int i = 0; i < VL; ++i) {
          if (i < n)
            widen_row(dout + (row + i) * inner + h * d, o + i * dp, d, dp);
          else
            memset(o + i * dp, 0, sizeof(float) * dp);
        }
        to_lanes(k, dp, p);
        softmax_down<T>(p, d, dp);
        gemm<false>(d, dp, n, p, VL, o, dp, dctx + h * size, dp, true);
        to_lanes(o, dp, v);
        // ctx doutᵀ, with pixels in the lanes
        gemm<false>(d, VL, d, ctx + h * size, dp, v, VL, g, VL, false);
        vf delta = {};
        for (int c = 0; c < d; ++c) delta += load(p + c * VL) * load(g + c * VL);
        for (int c = 0; c < dp; ++c)
          store(g + c * VL, c < d ? load(p + c * VL) * (load(g + c * VL) - delta) * a.scale : vf{});
        from_lanes(g, dp, o);
        T* to = dqkv + row * 3 * inner + h * d;
        for (int i = 0; i < n; ++i) narrow_row(o + i * dp, to + i * 3 * inner, d);
      }
    }
    for (int64_t i = 0; i < heads; ++i)
      for (int c = 0; c < d; ++c) {
        float* line = dctx + i * size + (int64_t)c * dp;
        const float* other = ctx + i * size + (int64_t)c * dp;
        double dot = 0;
        for (int e = 0; e < d; ++e) {
          line[e] *= a.scale;
          dctx_t[i * size + (int64_t)e * dp + c] = line[e];
          dot += (double)line[e] * other[e];
        }
        r[i * dp + c] = (float)dot;
      }
    // dk = k' (v dctxᵀ - r), dv = k' dctx.
    for (int64_t row = 0; row < a.pixels; row += RB) {
      const int n = a.pixels - row < RB ? (int)(a.pixels - row) : RB;
      for (int h = 0; h < heads; ++h) {
        gather<T>(a, frame, row, n, 1, head0 + h, k);
        gather<T>(a, frame, row, n, 2, head0 + h, v);
        const float *lse_h = lse + h * dp, *r_h = r + h * dp;
        for (int c = 0; c < dp; c += VL) vexp_rows<kDegree<T>>(k + c, dp, n, load(lse_h + c));
        gemm<false>(n, dp, d, k, dp, dctx + h * size, dp, o, dp, false);
        gemm<false>(n, dp, d, v, dp, dctx_t + h * size, dp, p, dp, false);
        // r is also Σ k' p over all pixels. If the chunk is the whole frame, that sum cancels
        // better against p: exactly for a single pixel, whose softmax is constant.
        for (int c = 0; c < dp && n == a.pixels; c += VL) {
          vf s = {};
          for (int i = 0; i < n; ++i) s += load(k + i * dp + c) * load(p + i * dp + c);
          store(r + h * dp + c, s);
        }
        for (int i = 0; i < n; ++i) {
          for (int c = 0; c < dp; c += VL)
            store(p + i * dp + c, load(k + i * dp + c) * (load(p + i * dp + c) - load(r_h + c)));
          T* to = dqkv + (row + i) * 3 * inner + h * d;
          narrow_row(p + i * dp, to + inner, d);
          narrow_row(o + i * dp, to + 2 * inner, d);
        }
      }
    }
  }
}

}  // namespace

void linear_attention_fwd(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, fwd, a, begin, end, scratch)
}
void linear_attention_bwd(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, bwd, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
