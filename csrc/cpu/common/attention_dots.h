// The core of attention_kernel.h with bf16 products: the same transposed formulation, with fp32
// softmax and fp32 sums. Shaw tables are not supported; they stay in fp32.
#pragma once

#include "attention_kernel.h"
#include "dots.h"

#if FASTVDM_BF16

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

FASTVDM_INLINE bool has_dots(const AttnTables& t) {
  return t.rel_k == nullptr && t.rel_v == nullptr;
}

// Round rows of fp32 to bf16 rows of width dp.
FASTVDM_INLINE void round_head(const float* from, int rows, int dp, uint32_t* to) {
  for (int64_t i = 0; i < (int64_t)rows * dp; i += VL) store((bf16*)to + i, load(from + i));
}

// Pairs of fp32 rows: operand B of a product that sums over rows, (rows / 2, dp) words.
FASTVDM_INLINE void pair_rows(const float* from, int rows, int dp, uint32_t* to) {
  for (int r = 0; r < rows; r += 2, to += dp)
    for (int c = 0; c < dp; c += VL) {
      const float* at = from + (int64_t)r * dp + c;
      store_words(to + c, pairs_of(load(at), r + 1 < rows ? load(at + dp) : vf{}));
    }
}

FASTVDM_INLINE Pairs paired_rows(const uint32_t* data, int dp) { return {data, dp, 16}; }

// The data that the core keeps per head, in words of two bf16.
struct DotsHead {
  uint32_t *k_rows, *v_rows;                        // (n, dp / 2)
  uint32_t *q_pairs, *k_pairs, *v_pairs, *g_pairs;  // (ceil(n / 2), dp)
  uint32_t *q_lanes, *g_lanes, *p_words;            // (dp / 2, VL), (ceil(n / 2), VL)
  bf16 *tmp, *p_rows;                               // (VL, dp), (n, VL)
  float *p, *ds;                                    // (n, VL)
};

FASTVDM_INLINE DotsHead dots_head(const AttnTables& t, float* work) {
  const int64_t rows = t.np * (int64_t)t.dp / 2, lanes = t.dp * (int64_t)VL / 2;
  uint32_t* w = (uint32_t*)work;
  DotsHead h;
  const auto take = [&](int64_t words) {
    uint32_t* at = w;
    w += words;
    return at;
  };
  h.k_rows = take(rows);
  h.v_rows = take(rows);
  h.q_pairs = take(rows);
  h.k_pairs = take(rows);
  h.v_pairs = take(rows);
  h.g_pairs = take(rows);
  h.q_lanes = take(lanes);
  h.g_lanes = take(lanes);
  h.tmp = (bf16*)take(lanes);
  h.p_words = take((int64_t)t.np * VL / 2);
  h.p_rows = (bf16*)take((int64_t)t.np * VL / 2);
  h.p = (float*)take((int64_t)t.np * VL);
  h.ds = (float*)take((int64_t)t.np * VL);
  return h;
}

// Normalised probabilities (n, VL) of VL queries from row i0 of q on; k is given by rows.
FASTVDM_INLINE void dots_probabilities(const AttnTables& t, int head, int i0, const float* q,
                                       const DotsHead& m) {
  const int lanes = t.n - i0 < VL ? t.n - i0 : VL;
  pairs_to_lanes(q + (int64_t)i0 * t.dp, t.dp, lanes, t.dp, m.q_lanes, VL, m.tmp);
  dot_gemm<false>(t.n, VL, t.dp / 2, m.k_rows, t.dp / 2, {m.q_lanes, VL, 0}, m.p, VL, false);
  softmax_lanes<4>(t, head, i0, m.p);
}

// out (n, dp) of one head; q and k are rotated; rows have width dp and are zero beyond d.
FASTVDM_NOINLINE void attend_dots(const AttnTables& t, int head, const float* q, const float* k,
                                  const float* v, float* out, float* work) {
  const int n = t.n, dp = t.dp;
  const DotsHead m = dots_head(t, work);
  round_head(k, n, dp, m.k_rows);
  pair_rows(v, n, dp, m.v_pairs);
  for (int i0 = 0; i0 < n; i0 += VL) {
    dots_probabilities(t, head, i0, q, m);
    pair_rows(m.p, n, VL, m.p_words);
    dot_gemm<true>(n - i0 < VL ? n - i0 : VL, dp, (n + 1) / 2, m.p_words, VL,
                   paired_rows(m.v_pairs, dp), out + (int64_t)i0 * dp, dp, false);
  }
}

// The gradients of one head, as in attend_bwd.
FASTVDM_NOINLINE void attend_bwd_dots(const AttnTables& t, const AttnGrads& grads, int head,
                                      const float* q, const float* k, const float* v,
                                      const float* dout, float* dq, float* dk, float* dv,
                                      float* work) {
  const int n = t.n, dp = t.dp, half = dp / 2;
  const DotsHead m = dots_head(t, work);
  round_head(k, n, dp, m.k_rows);
  round_head(v, n, dp, m.v_rows);
  pair_rows(k, n, dp, m.k_pairs);
  for (int i0 = 0; i0 < n; i0 += VL) {
    const int lanes = n - i0 < VL ? n - i0 : VL;
    const int64_t row = (int64_t)i0 * dp;
    dots_probabilities(t, head, i0, q, m);
    pairs_to_lanes(dout + row, dp, lanes, dp, m.g_lanes, VL, m.tmp);
    dot_gemm<false>(n, VL, half, m.v_rows, half, {m.g_lanes, VL, 0}, m.ds, VL, false);  // dP
    vf delta = {};
    for (int j = 0; j < n; ++j) delta += load(m.p + j * VL) * load(m.ds + j * VL);
    for (int j = 0; j < n; ++j)
      store(m.ds + j * VL, load(m.p + j * VL) * (load(m.ds + j * VL) - delta));
    if (grads.bias_t != nullptr) {
      float* to = grads.bias_t + (int64_t)head * n * t.np + i0;
      for (int j = 0; j < n; ++j) {
        float* at = to + (int64_t)j * t.np;
        FASTVDM_STORE(at, 0, FASTVDM_LOAD(at, 0, lanes) + load(m.ds + j * VL), lanes);
      }
    }
    // Sums over the queries; the last block has only `lanes` of them.
    const int pairs = (lanes + 1) / 2;
    pair_rows(dout + row, lanes, dp, m.g_pairs);
    pair_rows(q + row, lanes, dp, m.q_pairs);
    round_head(m.p, n, VL, (uint32_t*)m.p_rows);
    dot_gemm<false>(n, dp, pairs, (const uint32_t*)m.p_rows, VL / 2, paired_rows(m.g_pairs, dp), dv,
                    dp, i0 > 0);
    round_head(m.ds, n, VL, (uint32_t*)m.p_rows);
    dot_gemm<false>(n, dp, pairs, (const uint32_t*)m.p_rows, VL / 2, paired_rows(m.q_pairs, dp), dk,
                    dp, i0 > 0);
    pair_rows(m.ds, n, VL, m.p_words);
    dot_gemm<true>(lanes, dp, (n + 1) / 2, m.p_words, VL, paired_rows(m.k_pairs, dp), dq + row, dp,
                   false);
  }
  for (float* x : {dq, dk}) {
    turn_back(t, x, 0, n);
    scale_rows(t, x);
  }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

#endif
