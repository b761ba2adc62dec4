// Softmax attention of one head over one sequence in L1/L2. The logits are computed transposed,
// Sᵀ = K Qᵀ with VL queries in the lanes, so the softmax runs down the rows without horizontal
// operations. All keys of a column are kept, for any length.
#pragma once

#include "attention.h"
#include "exp.h"
#include "gemm.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// Rotate one row of dp features by the table; `sign` -1 rotates back.
FASTVDM_INLINE void rotate_row(const float* from, float* to, const float* cos, const float* sin,
                               int dp, float sign) {
  vi swap;
  for (int l = 0; l < VL; ++l) swap[l] = l ^ 1;
  for (int i = 0; i < dp; i += VL) {
    const vf x = load(from + i);
    const vf y = __builtin_shuffle(x, swap);
    store(to + i, x * load(cos + i) + y * (load(sin + i) * sign));
  }
}

// (VL rows from x on, dp) → (dp, VL). Rows up to a multiple of VL must exist.
FASTVDM_INLINE void to_lanes(const float* x, int dp, float* out) {
  for (int i = 0; i < dp; i += VL) transpose_block(x + i, dp, out + i * VL, VL);
}

// The row of a relative table for query `query` and key `key`.
FASTVDM_INLINE int rel_row(int key, int query, int length) {
  const int reach = length / 2, distance = key - query;
  return (distance < -reach ? -reach : distance > reach ? reach : distance) + reach;
}

// s[j][lane] += g[rel_row(j, i0 + lane)][lane]
FASTVDM_NOINLINE void add_relative(float* s, const float* g, int n, int i0, int length) {
  for (int j = 0; j < n; ++j) {
    float part[VL];
    for (int l = 0; l < VL; ++l) part[l] = g[rel_row(j, i0 + l, length) * VL + l];
    store(s + j * VL, load(s + j * VL) + load(part));
  }
}

// w[r][lane] = Σ p[j][lane] over the keys j whose row is r, for `lanes` queries.
FASTVDM_NOINLINE void bucket(const float* p, float* w, int n, int i0, int lanes, int length) {
  memset(w, 0, sizeof(float) * VL * length);
  for (int j = 0; j < n; ++j)
    for (int l = 0; l < lanes; ++l) w[rel_row(j, i0 + l, length) * VL + l] += p[j * VL + l];
}

// Logits p (n, VL), with VL queries from i0 on in the lanes, to normalised probabilities, in place.
// Scales and adds the bias first.
template <int DEGREE>
FASTVDM_INLINE void softmax_lanes(const AttnTables& t, int head, int i0, float* p) {
  const int n = t.n;
  const vf lowest = splat(-3.4028234663852886e38f);  // finite, so that -inf - m is -inf
  vf m = lowest;
  if (t.bias_t != nullptr) {
    const float* bias = t.bias_t + ((int64_t)head * n) * t.np + i0;
    for (int j = 0; j < n; ++j) {
      const vf s = load(p + j * VL) * t.scale + load(bias + (int64_t)j * t.np);
      m = vmax(m, s);
      store(p + j * VL, s);
    }
  } else {
    for (int j = 0; j < n; ++j) {
      const vf s = load(p + j * VL) * t.scale;
      m = vmax(m, s);
      store(p + j * VL, s);
    }
  }
  vf sum = {};
  if (t.bias_t == nullptr) {
    sum = vexp_rows<DEGREE>(p, VL, n, m);
  } else {  // a bias of -inf must mask exactly
    constexpr int U = 4;
    for (int j = 0; j < n; j += U) {
      vf s[U], e[U];
#pragma GCC unroll 4
      for (int i = 0; i < U; ++i) {
        s[i] = load(p + (j + i < n ? j + i : n - 1) * VL);
        e[i] = s[i] - m;
      }
      vexp_each<U, DEGREE>(e);
      for (int i = 0; i < U && j + i < n; ++i) {
        const vf kept = s[i] < lowest ? vf{} : e[i];
        sum += kept;
        store(p + (j + i) * VL, kept);
      }
    }
  }
  const vf inv = sum > 0.f || sum != sum ? 1.f / sum : vf{};
  for (int j = 0; j < n; ++j) store(p + j * VL, load(p + j * VL) * inv);
}

// Normalised probabilities p (n, VL) of queries i0 .. i0 + VL. qt: their (rotated) queries (dp,
// VL); qt_plain: the unrotated ones, for rel_k.
FASTVDM_NOINLINE void probabilities(const AttnTables& t, int head, int i0, const float* qt,
                                    const float* qt_plain, const float* k, float* p, float* g) {
  const int n = t.n;
  gemm<false>(n, VL, t.d, k, t.dp, qt, VL, p, VL, false);
  if (t.rel_k != nullptr) {
    const float* table = t.rel_k + (t.rel_k_heads > 1 ? (int64_t)head * t.rel_k_length * t.dp : 0);
    gemm<false>(t.rel_k_length, VL, t.d, table, t.dp, qt_plain, VL, g, VL, false);
    add_relative(p, g, n, i0, t.rel_k_length);
  }
  softmax_lanes<5>(t, head, i0, p);
}

// out (n, dp) of one head. q and k are rotated; q_plain is not (it equals q without rotary). They
// and v have rows of width dp, zero beyond d; q and q_plain have a multiple of VL rows.
FASTVDM_NOINLINE void attend(const AttnTables& t, int head, const float* q, const float* q_plain,
                             const float* k, const float* v, float* out, float* work) {
  const int n = t.n, dp = t.dp;
  float *qt = work, *qp = qt + dp * VL, *p = qp + dp * VL, *g = p + (int64_t)n * VL;
  for (int i0 = 0; i0 < n; i0 += VL) {
    const int lanes = n - i0 < VL ? n - i0 : VL;
    to_lanes(q + (int64_t)i0 * dp, dp, qt);
    const float* plain = qt;
    if (t.rel_k != nullptr && q_plain != q) {
      to_lanes(q_plain + (int64_t)i0 * dp, dp, qp);
      plain = qp;
    }
    probabilities(t, head, i0, qt, plain, k, p, g);
    gemm<true>(lanes, dp, n, p, VL, v, dp, out + (int64_t)i0 * dp, dp, false);
    if (t.rel_v != nullptr) {
      const float* table = t.rel_v + (t.rel_v_heads > 1 ? (int64_t)head * t.rel_v_length * dp : 0);
      bucket(p, g, n, i0, lanes, t.rel_v_length);
      gemm<true>(lanes, dp, t.rel_v_length, g, VL, table, dp, out + (int64_t)i0 * dp, dp, true);
    }
  }
}

// Rotates the gradients of rows [first, last) of a rotated operand back.
FASTVDM_INLINE void turn_back(const AttnTables& t, float* x, int first, int last) {
  if (t.cos == nullptr) return;
  for (int64_t i = first * (int64_t)t.dp; i < last * (int64_t)t.dp; i += t.dp)
    rotate_row(x + i, x + i, t.cos + i, t.sin + i, t.dp, -1.f);
}

FASTVDM_INLINE void scale_rows(const AttnTables& t, float* x) {
  for (int64_t i = 0; i < (int64_t)t.n * t.dp; i += VL) store(x + i, load(x + i) * t.scale);
}

// Gradients of one head. dq, dk, dv (n, dp), with respect to the unrotated q and k, are written;
// the gradients of the tables are added to. dout has rows like q.
FASTVDM_NOINLINE void attend_bwd(const AttnTables& t, const AttnGrads& grads, int head,
                                 const float* q, const float* q_plain, const float* k,
                                 const float* v, const float* dout, float* dq, float* dk, float* dv,
                                 float* work) {
  const int n = t.n, dp = t.dp;
  float *qt = work, *qp = qt + dp * VL, *dt = qp + dp * VL, *p = dt + dp * VL;
  float *ds = p + (int64_t)n * VL, *g = ds + (int64_t)n * VL;
  const int64_t rk = t.rel_k_heads > 1 ? (int64_t)head * t.rel_k_length * dp : 0;
  const int64_t rv = t.rel_v_heads > 1 ? (int64_t)head * t.rel_v_length * dp : 0;
  float* w = g + (int64_t)(t.rel_k_length > t.rel_v_length ? t.rel_k_length : t.rel_v_length) * VL;
  for (int i0 = 0; i0 < n; i0 += VL) {
    const int lanes = n - i0 < VL ? n - i0 : VL;
    const int64_t row = (int64_t)i0 * dp;
    to_lanes(q + row, dp, qt);
    to_lanes(dout + row, dp, dt);
    const float* plain = qt;
    if (t.rel_k != nullptr && q_plain != q) {
      to_lanes(q_plain + row, dp, qp);
      plain = qp;
    }
    probabilities(t, head, i0, qt, plain, k, p, g);
    gemm<false>(n, VL, t.d, v, dp, dt, VL, ds, VL, false);  // dP
    if (t.rel_v != nullptr) {
      gemm<false>(t.rel_v_length, VL, t.d, t.rel_v + rv, dp, dt, VL, g, VL, false);
      add_relative(ds, g, n, i0, t.rel_v_length);
    }
    vf delta = {};
    for (int j = 0; j < n; ++j) delta += load(p + j * VL) * load(ds + j * VL);
    for (int j = 0; j < n; ++j) store(ds + j * VL, load(p + j * VL) * (load(ds + j * VL) - delta));

    gemm<false>(n, dp, lanes, p, VL, dout + row, dp, dv, dp, i0 > 0);
    gemm<false>(n, dp, lanes, ds, VL, q + row, dp, dk, dp, i0 > 0);
    gemm<true>(lanes, dp, n, ds, VL, k, dp, dq + row, dp, false);
    if (grads.bias_t != nullptr) {
      float* to = grads.bias_t + (int64_t)head * n * t.np + i0;
      for (int j = 0; j < n; ++j) {
        float* at = to + (int64_t)j * t.np;
        FASTVDM_STORE(at, 0, FASTVDM_LOAD(at, 0, lanes) + load(ds + j * VL), lanes);
      }
    }
    turn_back(t, dq, i0, i0 + lanes);
    if (t.rel_k != nullptr) {
      bucket(ds, w, n, i0, lanes, t.rel_k_length);
      gemm<true>(lanes, dp, t.rel_k_length, w, VL, t.rel_k + rk, dp, dq + row, dp, true);
      if (grads.rel_k != nullptr)
        gemm<false>(t.rel_k_length, dp, lanes, w, VL, q_plain + row, dp, grads.rel_k + rk, dp,
                    true);
    }
    if (grads.rel_v != nullptr) {
      bucket(p, w, n, i0, lanes, t.rel_v_length);
      gemm<false>(t.rel_v_length, dp, lanes, w, VL, dout + row, dp, grads.rel_v + rv, dp, true);
    }
  }
  turn_back(t, dk, 0, n);
  scale_rows(t, dq);
  scale_rows(t, dk);
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
