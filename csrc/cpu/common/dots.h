// Products of bf16 matrices with fp32 sums, for operands in L1 or L2, by vdpbf16ps, which adds two
// products to every lane, at twice the rate of fp32. Compiled only into objects whose instruction
// set multiplies bf16 (FASTVDM_BF16). If the compiler lacks the instruction, two fp32 products
// replace it, so that any machine can run the tests.
//
// A pair is two consecutive values along k in one 32-bit word. A is (M, K) row-major in pairs, or
// k-major (word k * lda + m). B has the pairs of 16 columns side by side.
#pragma once

#include "gemm.h"

#if FASTVDM_BF16

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

FASTVDM_INLINE vu load_words(const uint32_t* p) {
  vu v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FASTVDM_INLINE void store_words(uint32_t* p, vu v) { memcpy(p, &v, sizeof(v)); }

// c + a₀b₀ + a₁b₁ for the pairs in each lane.
FASTVDM_INLINE vf dot(vf c, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  const vu high = ((vu){} + 0xffff0000u);
  c += (vf)(a << 16) * (vf)(b << 16);
  return c + (vf)(a & high) * (vf)(b & high);
#endif
}

// The same for 16-bit integers.
FASTVDM_INLINE vi dot(vi c, vu a, vu b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  const vi x = (vi)a, y = (vi)b;
  return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

FASTVDM_INLINE vu splat_word(uint32_t x) { return (vu){} + x; }

// The pairs (low, high) in each lane.
FASTVDM_INLINE vu pairs_of(vf low, vf high) {
#if defined(__AVX512BF16__)
  vh order[2];  // 0, 16, 1, 17, ...
  for (int i = 0; i < 16; ++i)
    for (int h = 0; h < 2; ++h) order[(2 * i + h) / 16][(2 * i + h) % 16] = (uint16_t)(i + 16 * h);
  __m512i lanes;
  memcpy(&lanes, order, sizeof(lanes));
  return (vu)_mm512_permutexvar_epi16(lanes,
                                      (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}

// Packs `rows` rows of fp32 and n columns as operand B: panels of 16 columns, `panel` elements
// apart, of pairs of rows. Rows from `rows` to `depth`, which is even, are zero.
FASTVDM_INLINE void pack_pairs(const float* from, int64_t ld, int rows, int depth, int n, bf16* to,
                               int64_t panel) {
  for (int column = 0; column < n; column += 16)
    for (int r = 0; r < depth; r += 2)
      for (int c = 0; c < 16; c += VL) {
        const float* at = from + r * ld + column + c;
        const vf low = r < rows ? load(at) : vf{}, high = r + 1 < rows ? load(at + ld) : vf{};
        store_words((uint32_t*)(to + column / 16 * panel + 16 * r + 2 * c), pairs_of(low, high));
      }
}

// Pairs of bf16 rows: operand B of a product that sums over rows, or a k-major A. (rows / 2, width)
// words; width is a multiple of 32.
FASTVDM_INLINE void interleave_rows(const bf16* from, int rows, int64_t width, uint32_t* to) {
  for (int r = 0; r < rows; r += 2, to += width)
    for (int64_t c = 0; c < width; c += VL) {
      vh low, high = {};
      memcpy(&low, from + r * width + c, sizeof(low));
      if (r + 1 < rows) memcpy(&high, from + (r + 1) * width + c, sizeof(high));
      store_words(to + c, __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu)
                                                                 << 16);
    }
}

// Pairs along the columns, transposed, for VL rows of dp columns: word r of row c at `to` (rows ldt
// apart) is columns 2c, 2c + 1 of row r. Rows from `rows` on are zero. tmp: VL * dp bf16.
FASTVDM_INLINE void pairs_to_lanes(const float* from, int64_t ld, int rows, int dp, uint32_t* to,
                                   int64_t ldt, bf16* tmp) {
  for (int r = 0; r < VL; ++r)
    for (int c = 0; c < dp; c += VL)
      store(tmp + r * dp + c, r < rows ? load(from + r * ld + c) : vf{});
  const float* words = (const float*)tmp;  // only moved, never used in arithmetic
  int c = 0;
  for (; c + VL <= dp / 2; c += VL) transpose_block(words + c, dp / 2, (float*)to + c * ldt, ldt);
  for (; c < dp / 2; ++c)
    for (int r = 0; r < VL; ++r) memcpy(to + c * ldt + r, words + r * (dp / 2) + c, 4);
}

// Operand B: the first pair of column n of step k is at data + k step + n / 16 panel + n % 16.
struct Pairs {
  const uint32_t* data;
  int64_t step, panel;
};

template <class Sum, int MR, int NR, bool KM>
FASTVDM_INLINE void dot_tile(int K, const uint32_t* A, int64_t lda, const Pairs& B, int n, float* C,
                             int64_t ldc, bool accumulate) {
  Sum c[MR][NR];
  const uint32_t* b[NR];
#pragma GCC unroll 4
  for (int j = 0; j < NR; ++j) b[j] = B.data + (n + j * VL) / 16 * B.panel + (n + j * VL) % 16;
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) c[m][j] = Sum{};
  for (int k = 0; k < K; ++k) {
    vu right[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) right[j] = load_words(b[j] + k * B.step);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const vu left = splat_word(KM ? A[m] : A[m * lda]);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) c[m][j] = dot(c[m][j], left, right[j]);
    }
    A += KM ? lda : 1;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      float* to = C + m * ldc + j * VL;
      Sum before = {};
      if (accumulate) memcpy(&before, to, sizeof(before));
      before += c[m][j];
      memcpy(to, &before, sizeof(before));
    }
}

template <class Sum, int NR, bool KM, int MR>
FASTVDM_NOINLINE void dot_panel(int M, int K, const uint32_t* A, int64_t lda, const Pairs& B, int n,
                                float* C, int64_t ldc, bool accumulate) {
  const int64_t step = KM ? 1 : lda;
  int m = 0;
  for (; m + MR <= M; m += MR)
    dot_tile<Sum, MR, NR, KM>(K, A + m * step, lda, B, n, C + m * ldc, ldc, accumulate);
  for (; MR > 4 && m + 4 <= M; m += 4)
    dot_tile<Sum, 4, NR, KM>(K, A + m * step, lda, B, n, C + m * ldc, ldc, accumulate);
  for (; m + 2 <= M; m += 2)
    dot_tile<Sum, 2, NR, KM>(K, A + m * step, lda, B, n, C + m * ldc, ldc, accumulate);
  if (m < M) dot_tile<Sum, 1, NR, KM>(K, A + m * step, lda, B, n, C + m * ldc, ldc, accumulate);
}

// C (M, N) = or += A B over K pairs, N a multiple of 16, lda in words. Sum is vf for bf16, or vi
// for integers; C then contains 32-bit integers.
template <bool KM, class Sum = vf>
FASTVDM_INLINE void dot_gemm(int M, int N, int K, const uint32_t* A, int64_t lda, const Pairs& B,
                             float* C, int64_t ldc, bool accumulate) {
  int n = 0;
  for (; N % (4 * VL) == 0 && n < N; n += 4 * VL)
    dot_panel<Sum, 4, KM, 6>(M, K, A, lda, B, n, C + n, ldc, accumulate);
  for (; n + 3 * VL <= N && N - n != 4 * VL; n += 3 * VL)
    dot_panel<Sum, 3, KM, 8>(M, K, A, lda, B, n, C + n, ldc, accumulate);
  for (; n + 2 * VL <= N; n += 2 * VL)
    dot_panel<Sum, 2, KM, 8>(M, K, A, lda, B, n, C + n, ldc, accumulate);
  if (n < N) dot_panel<Sum, 1, KM, 16>(M, K, A, lda, B, n, C + n, ldc, accumulate);
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

#endif
