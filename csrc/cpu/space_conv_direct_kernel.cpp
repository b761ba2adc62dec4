// The direct convolution: small products whose rows are pixels of the input, in fp32, or in pairs
// of bf16 if the CPU multiplies them. A block of sums stays in registers over all taps and both
// sources.
#include "space_conv_direct.h"

#include "common/dots.h"
#include "common/gemm.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// The data that one step of a sum reads from a row and the weights: a value, or a pair of bf16.
template <class T, bool PAIRS>
struct Step {
  typedef T left;
  typedef float right;
  typedef vf vector;
  FASTVDM_INLINE vf add(vf c, T a, vf b) { return c + splat(to_f32(a)) * b; }
};
#if FASTVDM_BF16
template <>
struct Step<bf16, true> {
  typedef uint32_t left, right;
  typedef vu vector;
  FASTVDM_INLINE vf add(vf c, uint32_t a, vu b) { return dot(c, splat_word(a), b); }
};
#endif

struct Rows {
  const void** at;         // (segments, rows): a segment is a tap of a source
  int64_t count;           // rows
  int segments, depth[2];  // words of a row of x and of x2
};

template <class S, int MR, int NR>
FASTVDM_NOINLINE void tile(const Rows& rows, int sources, int m0, const typename S::right* B,
                           int64_t panel, float* C, int64_t ldc) {
  typedef typename S::left A;
  typedef typename S::vector V;
  vf c[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) c[m][n] = vf{};
  for (int s = 0; s < rows.segments; ++s) {
    const A* a[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) a[m] = (const A*)rows.at[s * rows.count + m0 + m];
    const int depth = rows.depth[sources == 2 ? s & 1 : 0];
    for (int k = 0; k < depth; ++k, B += 16) {
      V b[NR];
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) memcpy(&b[n], B + n * VL / 16 * panel + n * VL % 16, sizeof(V));
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) c[m][n] = S::add(c[m][n], a[m][k], b[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) store(C + m * ldc + n * VL, c[m][n]);
}

// 16 NP columns, for MR of the rows at a time.
template <class S, int NP, int MR>
FASTVDM_INLINE void columns(const Rows& rows, int sources, int count, const typename S::right* B,
                            int64_t panel, float* C, int64_t ldc) {
  constexpr int NR = NP * 16 / VL;
  int m = 0;
  for (; m + MR <= count; m += MR) tile<S, MR, NR>(rows, sources, m, B, panel, C + m * ldc, ldc);
  for (; MR > 2 && m + 2 <= count; m += 2)
    tile<S, 2, NR>(rows, sources, m, B, panel, C + m * ldc, ldc);
  for (; m < count; ++m) tile<S, 1, NR>(rows, sources, m, B, panel, C + m * ldc, ldc);
}

// The position of output `i` of a phase, and of the following ones.
struct Output {
  int64_t image, y, x;
  Output(const DirectArgs& a, int64_t i)
      : image(i / (a.oh * a.ow)), y(i / a.ow % a.oh), x(i % a.ow) {}
  void next(const DirectArgs& a) {
    if (++x < a.ow) return;
    x = 0;
    if (++y < a.oh) return;
    y = 0;
    ++image;
  }
};

template <class T, bool PAIRS>
void conv(const DirectArgs& a, int64_t begin, int64_t end, void* scratch) {
  typedef Step<T, PAIRS> S;
  const int sources = a.c2 > 0 ? 2 : 1, limit = a.block + 16;
  Rows rows{(const void**)scratch, limit, a.taps * sources, {}};
  rows.depth[0] = a.c1 / (PAIRS ? 2 : 1);
  rows.depth[1] = a.c2 / (PAIRS ? 2 : 1);
  float* c = (float*)(rows.at + (int64_t)2 * a.taps * limit);
  c = (float*)(((uintptr_t)c + 63) / 64 * 64);
  const T* zeros = (const T*)(c + (int64_t)limit * a.outp);
  memset((void*)zeros, 0, sizeof(T) * (a.c1 + a.c2));
  const int64_t all = a.images * a.oh * a.ow, panel = a.depth * 16;
  for (int64_t i = begin; i < end; ++i) {
    const int phase = (int)(i / a.items);
    const int64_t first = i % a.items * a.block;
    const int count = all - first < a.block ? (int)(all - first) : a.block;
    Output o(a, first);
    for (int r = 0; r < count; ++r, o.next(a)) {
      for (int t = 0; t < a.taps; ++t) {
        const int64_t y = o.y * a.stride + a.tap_y[phase][t],
                      x = o.x * a.stride + a.tap_x[phase][t];
        const bool inside = y >= 0 && y < a.h && x >= 0 && x < a.w;
        const int64_t pixel = (o.image * a.h + y) * a.w + x;
        const void** at = rows.at + (int64_t)t * sources * limit + r;
        at[0] = inside ? (const T*)a.x + pixel * a.c1 : zeros;
        if (sources == 2) at[limit] = inside ? (const T*)a.x2 + pixel * a.c2 : zeros;
      }
    }
    const auto* weights = (const typename S::right*)a.weights + phase * (a.outp / 16) * panel;
#if defined(__AVX512F__)
    int n = 0;
    for (; n + 64 <= a.outp; n += 64)
      columns<S, 4, 6>(rows, sources, count, weights + n / 16 * panel, panel, c + n, a.outp);
    for (; n + 32 <= a.outp; n += 32)
      columns<S, 2, 8>(rows, sources, count, weights + n / 16 * panel, panel, c + n, a.outp);
    if (n < a.outp)
      columns<S, 1, 14>(rows, sources, count, weights + n / 16 * panel, panel, c + n, a.outp);
#else
    for (int n = 0; n < a.outp; n += 16)
      columns<S, 1, VL == 8 ? 6 : 2>(rows, sources, count, weights + n / 16 * panel, panel, c + n,
                                     a.outp);
#endif
    o = Output(a, first);
    for (int r = 0; r < count; ++r, o.next(a)) {
      const int64_t row = (o.image * a.oh + o.y) * a.up + phase / a.up;
      const int64_t at = ((row * a.ow + o.x) * a.up + phase % a.up) * a.out;
      for (int i = 0; i < a.out; i += VL) {
        const int n = a.out - i < VL ? a.out - i : VL;
        vf v = load(c + (int64_t)r * a.outp + i);
        if (a.bias != nullptr) v += load(a.bias + i);
        if (a.residual != nullptr) {
          const T* from = (const T*)a.residual + at;
          v += FASTVDM_LOAD(from, i, n);
        }
        T* to = (T*)a.y + at;
        FASTVDM_STORE(to, i, v, n);
      }
    }
  }
}

template <class T>
void plain(const DirectArgs& a, int64_t begin, int64_t end, void* scratch) {
  conv<T, false>(a, begin, end, scratch);
}

}  // namespace

void direct_conv(const DirectArgs& a, int64_t begin, int64_t end, void* scratch) {
#if FASTVDM_BF16
  if (a.pairs) return conv<bf16, true>(a, begin, end, scratch);
#endif
  FASTVDM_BY_DTYPE(a.dtype, plain, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
