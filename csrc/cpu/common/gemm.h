// Small fp32 matrix products for operands in L1 or L2: C (M, N) = or += A B, with B (K, N) and C
// row-major, N a multiple of VL, and A row-major or k-major (A[k * lda + m]).
#pragma once

#include "vec.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

template <int MR, int NR, bool KM>
FASTVDM_INLINE void gemm_tile(int K, const float* A, int64_t lda, const float* B, int64_t ldb,
                              float* C, int64_t ldc, bool accumulate) {
  vf c[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) c[m][n] = vf{};
  for (int k = 0; k < K; ++k) {
    vf b[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) b[n] = load(B + n * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const vf a = splat(KM ? A[m] : A[m * lda]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) c[m][n] += a * b[n];
    }
    A += KM ? lda : 1;
    B += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      float* to = C + m * ldc + n * VL;
      store(to, accumulate ? load(to) + c[m][n] : c[m][n]);
    }
}

template <int NR, bool KM, int MR>
FASTVDM_NOINLINE void gemm_panel(int M, int K, const float* A, int64_t lda, const float* B,
                                 int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  const int64_t step = KM ? 1 : lda;
  int m = 0;
  for (; m + MR <= M; m += MR)
    gemm_tile<MR, NR, KM>(K, A + m * step, lda, B, ldb, C + m * ldc, ldc, accumulate);
  for (; MR > 4 && m + 4 <= M; m += 4)
    gemm_tile<4, NR, KM>(K, A + m * step, lda, B, ldb, C + m * ldc, ldc, accumulate);
  for (; m + 2 <= M; m += 2)
    gemm_tile<2, NR, KM>(K, A + m * step, lda, B, ldb, C + m * ldc, ldc, accumulate);
  if (m < M) gemm_tile<1, NR, KM>(K, A + m * step, lda, B, ldb, C + m * ldc, ldc, accumulate);
}

// Registers: MR * NR accumulators, NR vectors of B and one broadcast, of 32 (AVX-512) or 16.
#if defined(__AVX512F__)
constexpr int kTileM1 = 16, kTileM2 = 8, kTileM3 = 8, kTileM4 = 6;
#elif defined(__AVX2__)
constexpr int kTileM1 = 8, kTileM2 = 6, kTileM3 = 4;
#else
constexpr int kTileM1 = 8, kTileM2 = 6, kTileM3 = 4;
#endif

template <bool KM>
FASTVDM_INLINE void gemm(int M, int N, int K, const float* A, int64_t lda, const float* B,
                         int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  int n = 0;
#if defined(__AVX512F__)
  // 64 columns at once if no single vector remains; these are the most common widths.
  for (; N % (4 * VL) == 0 && n < N; n += 4 * VL)
    gemm_panel<4, KM, kTileM4>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
#endif
  // Avoid a single vector at the end, which is bound by loads: two pairs instead of three and one.
  for (; n + 3 * VL <= N && N - n != 4 * VL; n += 3 * VL)
    gemm_panel<3, KM, kTileM3>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
  for (; n + 2 * VL <= N; n += 2 * VL)
    gemm_panel<2, KM, kTileM2>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
  if (n < N) gemm_panel<1, KM, kTileM1>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
}

// The same with B in panels, each of which is read from beginning to end: columns [n, n + w) of all
// rows, w = panel_width(N, n), are contiguous at B + n * K. Rows of a wide B are 4 KiB or more
// apart, which suits neither the sets of the caches nor the prefetchers.
FASTVDM_INLINE int panel_width(int N, int n) {
#if defined(__AVX512F__)
  if (N % (4 * VL) == 0) return 4 * VL;
  return N - n < 3 * VL ? N - n : 3 * VL;
#else
  return N - n < 2 * VL ? N - n : 2 * VL;
#endif
}

FASTVDM_INLINE void gemm_panels(int M, int N, int K, const float* A, int64_t lda, const float* B,
                                float* C, int64_t ldc) {
  for (int n = 0, w; n < N; n += w) {
    w = panel_width(N, n);
    const float* b = B + (int64_t)n * K;
#if defined(__AVX512F__)
    if (w == 4 * VL)
      gemm_panel<4, false, kTileM4>(M, K, A, lda, b, w, C + n, ldc, false);
    else if (w == 3 * VL)
      gemm_panel<3, false, kTileM3>(M, K, A, lda, b, w, C + n, ldc, false);
    else
#endif
        if (w == 2 * VL)
      gemm_panel<2, false, kTileM2>(M, K, A, lda, b, w, C + n, ldc, false);
    else
      gemm_panel<1, false, kTileM1>(M, K, A, lda, b, w, C + n, ldc, false);
  }
}

// to[c][r] = from[r][c] for a VL x VL block.
FASTVDM_INLINE void transpose_block(const float* from, int64_t ldf, float* to, int64_t ldt) {
  vf r[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) r[i] = load(from + i * ldf);
#if defined(__AVX2__) && !defined(__AVX512F__)
  // The generic loop below compiles to two instructions per shuffle here and takes four times as
  // long.
  __m256 t[VL], q[VL];
#pragma GCC unroll 4
  for (int i = 0; i < VL; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < VL; i += 4) {
    q[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    q[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    q[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    q[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < VL / 2; ++i) {
    r[i] = (vf)_mm256_permute2f128_ps(q[i], q[i + VL / 2], 0x20);
    r[i + VL / 2] = (vf)_mm256_permute2f128_ps(q[i], q[i + VL / 2], 0x31);
  }
#else
  // Swap the off-diagonal s x s blocks of each pair of rows, in the lanes.
#pragma GCC unroll 4
  for (int s = 1; s < VL; s *= 2) {
    vi low, high;
    for (int l = 0; l < VL; ++l) {
      low[l] = (l & s) ? VL + (l ^ s) : l;
      high[l] = (l & s) ? VL + l : (l ^ s);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      if (i & s) continue;
      const vf a = r[i], b = r[i | s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i | s] = __builtin_shuffle(a, b, high);
    }
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) store(to + i * ldt, r[i]);
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
