// Products of bf16 matrices on the tile registers of AMX, for operands in L1 or L2. Compiled only
// into objects whose instruction set has them (FASTVDM_TILES). With FASTVDM_EMULATE_TILES the five
// instructions are plain C++, so that any machine can run the tests.
//
// A tile holds 16 rows of 64 bytes: A 16 x 32 bf16, B 16 pairs of k x 16 columns, C 16 x 16 fp32.
#pragma once

#include "dots.h"

#if FASTVDM_TILES

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

constexpr int kTileK = 32;       // depth of one tile product
constexpr int kTileWords = 512;  // bf16 per tile

#if FASTVDM_EMULATE_TILES

thread_local float tile_memory[8][16][16];

// Not inlined, because the loops would be unrolled at every use.
FASTVDM_NOINLINE void emulate_product(float (*c)[16], const float (*a)[16], const float (*b)[16]) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      bf16 left[2], right[2];
      memcpy(left, &a[m][k], 4);
      for (int n = 0; n < 16; ++n) {
        memcpy(right, &b[k][n], 4);
        for (int i = 0; i < 2; ++i) c[m][n] += to_f32(left[i]) * to_f32(right[i]);
      }
    }
}
FASTVDM_NOINLINE void emulate_copy(void* to, int64_t to_row, const void* from, int64_t from_row) {
  for (int r = 0; r < 16; ++r) memcpy((char*)to + r * to_row, (const char*)from + r * from_row, 64);
}

template <int T>
FASTVDM_INLINE void tile_zero() {
  memset(tile_memory[T], 0, sizeof(tile_memory[T]));
}
template <int T>
FASTVDM_INLINE void tile_load(const void* p, int64_t stride) {
  emulate_copy(tile_memory[T], 64, p, stride);
}
template <int T>
FASTVDM_INLINE void tile_store(void* p, int64_t stride) {
  emulate_copy(p, stride, tile_memory[T], 64);
}
template <int C, int A, int B>
FASTVDM_INLINE void tile_product() {
  emulate_product(tile_memory[C], tile_memory[A], tile_memory[B]);
}
struct TileScope {
  TileScope() {}
};

#else

// In assembly: the compilers' intrinsics take no template argument for a register, and the loads of
// GCC 12 do not declare that they read memory.
template <int T>
FASTVDM_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
FASTVDM_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FASTVDM_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
FASTVDM_INLINE void tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The configuration is per thread, and the library sets another: ours lasts for one kernel call.
struct TileScope {
  TileScope() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes per row
      config[48 + t] = 16;      // rows
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { __asm__ volatile("tilerelease"); }
};

#endif

// One block of 16 MT x 16 NT of C = A B, over `steps` tiles along k.
template <int MT, int NT>
FASTVDM_INLINE void tile_block(int steps, const bf16* A, int64_t lda, const bf16* B, int64_t next_b,
                               float* C, int64_t ldc, bool accumulate) {
  const int64_t row_a = 2 * lda, row_c = 4 * ldc;
  if (accumulate) {
    tile_load<0>(C, row_c);
    if (NT > 1) tile_load<1>(C + 16, row_c);
    if (MT > 1) tile_load<2>(C + 16 * ldc, row_c);
    if (MT > 1 && NT > 1) tile_load<3>(C + 16 * ldc + 16, row_c);
  } else {
    tile_zero<0>();
    if (NT > 1) tile_zero<1>();
    if (MT > 1) tile_zero<2>();
    if (MT > 1 && NT > 1) tile_zero<3>();
  }
  for (int s = 0; s < steps; ++s) {
    tile_load<6>(B + s * kTileWords, 64);
    if (NT > 1) tile_load<7>(B + next_b + s * kTileWords, 64);
    tile_load<4>(A + s * kTileK, row_a);
    tile_product<0, 4, 6>();
    if (NT > 1) tile_product<1, 4, 7>();
    if (MT > 1) {
      tile_load<5>(A + 16 * lda + s * kTileK, row_a);
      tile_product<2, 5, 6>();
      if (NT > 1) tile_product<3, 5, 7>();
    }
  }
  tile_store<0>(C, row_c);
  if (NT > 1) tile_store<1>(C + 16, row_c);
  if (MT > 1) tile_store<2>(C + 16 * ldc, row_c);
  if (MT > 1 && NT > 1) tile_store<3>(C + 16 * ldc + 16, row_c);
}

// C (M, N) = or += A (M, K) B. In memory M and N are rounded up to 16 and K to 32: beyond K, A or B
// is zero, and all rows of A and C exist. B is packed by pack_tiles.h. Call it inside a TileScope.
FASTVDM_NOINLINE void tile_gemm(int M, int N, int K, const bf16* A, int64_t lda, const bf16* B,
                                float* C, int64_t ldc, bool accumulate = false) {
  const int steps = (K + kTileK - 1) / kTileK;
  const int64_t panel = (int64_t)steps * kTileWords;
  int n = 0;
  for (; n + 32 <= N; n += 32, B += 2 * panel) {
    int m = 0;
    for (; m + 16 < M; m += 32)
      tile_block<2, 2>(steps, A + m * lda, lda, B, panel, C + m * ldc + n, ldc, accumulate);
    if (m < M)
      tile_block<1, 2>(steps, A + m * lda, lda, B, panel, C + m * ldc + n, ldc, accumulate);
  }
  if (n < N) {
    int m = 0;
    for (; m + 16 < M; m += 32)
      tile_block<2, 1>(steps, A + m * lda, lda, B, 0, C + m * ldc + n, ldc, accumulate);
    if (m < M) tile_block<1, 1>(steps, A + m * lda, lda, B, 0, C + m * ldc + n, ldc, accumulate);
  }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

#endif
