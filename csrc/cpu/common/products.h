// Products of bf16 matrices by the best means of the object's instruction set: tile registers, or
// pairs in vectors. FASTVDM_BF16 is set if it has either.
#pragma once

#include "tiles.h"

#if FASTVDM_BF16

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

#if FASTVDM_TILES
using ProductScope = TileScope;
#else
struct ProductScope {
  ProductScope() {}
};
#endif

// C (M, N) = or += A (M, K) B. In memory M and N are rounded up to 16 and K to 32: beyond K, A or B
// is zero, and all rows of A and C exist. B is packed by pack_tiles.h. Call it inside a
// ProductScope.
FASTVDM_INLINE void bf16_gemm(int M, int N, int K, const bf16* A, int64_t lda, const bf16* B,
                              float* C, int64_t ldc, bool accumulate = false) {
#if FASTVDM_TILES
  tile_gemm(M, N, K, A, lda, B, C, ldc, accumulate);
#else
  const int depth = (K + 31) / 32 * 16;  // pairs per panel
  const Pairs right{(const uint32_t*)B, 16, (int64_t)16 * depth};
  dot_gemm<false>(M, N, (K + 1) / 2, (const uint32_t*)A, lda / 2, right, C, ldc, accumulate);
#endif
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

#endif
