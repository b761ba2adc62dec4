// Linear attention over the pixels of a frame. The softmax of k keeps a running maximum, so no
// bound on the logits is assumed; that of q is formed transposed, pixels in the lanes.
#include "linear_attention.h"

#include "gemm.h"
#include "rows.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

constexpr int R = kLinearRows;

// Rows [row, row + n) of q, k or v of a head, in fp32; up to a multiple of VL they are zero.
template <class T>
FASTVDM_INLINE void gather(const LinearArgs& a, int64_t frame, int64_t row, int n, int which,
                           int head, float* to) {
  const int64_t inner = (int64_t)a.heads * a.d;
  const T* from = (const T*)a.qkv + ((frame * a.pixels + row) * 3 + which) * inner +
                  (int64_t)head * a.d;
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

// Softmax down the d rows of x (dp, VL); the rows beyond d become zero.
template <class T>
FASTVDM_INLINE void softmax_down(float* x, int d, int dp) {
  vf m = load(x);
  for (int c = 1; c < d; ++c) m = vmax(m, load(x + c * VL));
  vf s = {};
  for (int c = 0; c < d; ++c) {
    const vf e = vexp<kDegree<T>>(load(x + c * VL) - m);
    s += e;
    store(x + c * VL, e);
  }
  const vf inv = 1.f / s;
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
          if (grew) {  // bring what was summed so far to the new maximum
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
          for (int i = 0; i < n; ++i) {
            const vf e = vexp<kDegree<T>>(load(k + i * dp + c) - m);
            s += e;
            store(k + i * dp + c, e);
          }
          store(sh + c, s);
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
  float *ctx = scratch, *dctx = ctx + size, *dctx_t = dctx + size;  // one head at a time
  float *lse = dctx_t + size, *r = lse + dp;
  float *k = r + dp, *v = k + R * dp, *o = v + R * dp, *p = o + R * dp, *g = p + R * dp;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frame = item / a.heads;
    const int h = (int)(item % a.heads);
    memset(ctx, 0, sizeof(float) * 3 * size);
    memset(lse, 0, sizeof(float) * 2 * dp);
    for (int c = 0; c < d; ++c)
      for (int e = 0; e < d; ++e) ctx[(int64_t)c * dp + e] = a.ctx[(item * d + c) * d + e];
    memcpy(lse, a.lse + item * d, sizeof(float) * d);
    T* const dq = (T*)a.dqkv + frame * a.pixels * 3 * inner + (int64_t)h * d;
    const T* const dout = (const T*)a.dout + frame * a.pixels * inner + (int64_t)h * d;

    // dctx = q'ᵀ dout and dq.
    for (int64_t row = 0; row < a.pixels; row += VL) {
      const int n = a.pixels - row < VL ? (int)(a.pixels - row) : VL;
      gather<T>(a, frame, row, n, 0, h, k);
      for (int i = 0; i < VL; ++i) {
        if (i < n)
          widen_row(dout + (row + i) * inner, o + i * dp, d, dp);
        else
          memset(o + i * dp, 0, sizeof(float) * dp);
      }
      to_lanes(k, dp, p);
      softmax_down<T>(p, d, dp);
      gemm<false>(d, dp, n, p, VL, o, dp, dctx, dp, true);
      to_lanes(o, dp, v);
      gemm<false>(d, VL, d, ctx, dp, v, VL, g, VL, false);  // (ctx doutᵀ), pixels in the lanes
      vf delta = {};
      for (int c = 0; c < d; ++c) delta += load(p + c * VL) * load(g + c * VL);
      for (int c = 0; c < dp; ++c)
        store(g + c * VL,
              c < d ? load(p + c * VL) * (load(g + c * VL) - delta) * a.scale : vf{});
      from_lanes(g, dp, o);
      for (int i = 0; i < n; ++i) narrow_row(o + i * dp, dq + (row + i) * 3 * inner, d);
    }
    for (int c = 0; c < d; ++c) {
      float* line = dctx + (int64_t)c * dp;
      double dot = 0;
      for (int e = 0; e < d; ++e) {
        line[e] *= a.scale;
        dctx_t[(int64_t)e * dp + c] = line[e];
        dot += (double)line[e] * ctx[(int64_t)c * dp + e];
      }
      r[c] = (float)dot;
    }
    // dk = k' (v dctxᵀ - r), dv = k' dctx.
    for (int64_t row = 0; row < a.pixels; row += R) {
      const int n = a.pixels - row < R ? (int)(a.pixels - row) : R;
      gather<T>(a, frame, row, n, 1, h, k);
      gather<T>(a, frame, row, n, 2, h, v);
      for (int i = 0; i < n; ++i)
        for (int c = 0; c < dp; c += VL)
          store(k + i * dp + c, vexp(load(k + i * dp + c) - load(lse + c)));
      gemm<false>(n, dp, d, k, dp, dctx, dp, o, dp, false);
      gemm<false>(n, dp, d, v, dp, dctx_t, dp, p, dp, false);
      for (int i = 0; i < n; ++i) {
        for (int c = 0; c < dp; c += VL)
          store(p + i * dp + c, load(k + i * dp + c) * (load(p + i * dp + c) - load(r + c)));
        T* to = dq + (row + i) * 3 * inner;
        narrow_row(p + i * dp, to + inner, d);
        narrow_row(o + i * dp, to + 2 * inner, d);
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
