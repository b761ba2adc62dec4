// Tile products of csrc/cpu/common/tiles.h against plain sums, on small integers: equal to the last bit.
// Built and run by tests/ops/tiles_test.py, emulated anywhere and on the registers where a CPU has them.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/pack_tiles.h"
#include "common/tiles.h"

#if !FASTVDM_EMULATE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastvdm {
namespace FASTVDM_ISA {

// M, N, K as the callers have them: N a multiple of 16, rows of A and C up to a multiple of 16.
int check(int M, int N, int K) {
  const int rows = (M + 15) / 16 * 16, depth = (K + 31) / 32 * 32, lda = depth + 32, ldc = N + 16;
  std::vector<int> a(rows * lda), b(depth * N);
  std::vector<bf16> left(rows * lda);
  std::vector<uint16_t> right(depth * N);
  std::vector<float> c(rows * ldc, -77.f);
  for (size_t i = 0; i < a.size(); ++i) put(&left[i], (float)(a[i] = rand() % 15 - 7));
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < N; ++n) b[k * N + n] = k < K ? rand() % 15 - 7 : 0;
  pack_tiles(depth, N, right.data(), [&](int64_t k, int64_t n) { return (float)b[k * N + n]; });
  {
    const TileScope scope;
    tile_gemm(M, N, K, left.data(), lda, (const bf16*)right.data(), c.data(), ldc);
  }
  int bad = 0;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < ldc; ++n) {
      int sum = 0;
      for (int k = 0; k < depth && n < N; ++k) sum += a[m * lda + k] * b[k * N + n];
      if (c[m * ldc + n] != (n < N ? (float)sum : -77.f)) ++bad;  // beyond N nothing is written
    }
  if (bad) printf("%d x %d x %d: %d wrong\n", M, N, K, bad);
  return bad;
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm

int main() {
#if !FASTVDM_EMULATE_TILES
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    printf("no AMX\n");
    return 77;
  }
#endif
  const int shapes[][3] = {{1, 16, 5},   {16, 32, 32},  {17, 48, 64},  {64, 32, 64},  {64, 64, 256},
                           {33, 80, 96}, {48, 16, 160}, {112, 96, 33}, {15, 256, 512}};
  int bad = 0;
  for (const auto& s : shapes) bad += fastvdm::FASTVDM_ISA::check(s[0], s[1], s[2]);
  printf("%s\n", bad ? "FAILED" : "equal");
  return bad != 0;
}
