// 3x3 convolution, stride 1, padding 1, channels last, by Winograd's F(m x m, 3 x 3). Input tiles
// are transformed with channels in the lanes, each of the (m + 2)² points is one matrix product
// over the channels, and the products of a tile are transformed back. The direct sum has 2.25
// (m = 2) or 4 (m = 4) times as many multiplications.
//
// Points 0, ±1, ∞ for m = 2: as accurate as the direct sum. 0, ±3/4, ±5/4, ∞ for m = 4: an error of
// 1.4e-6 at 64 channels and 2.8e-6 at 256 relative to max |y|, a third of that of 0, ±1, ±2, and
// far below the rounding of a 16-bit result.
#include "space_conv_fixed.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

template <class W, int M>
void weights(const WinogradArgs& a, int64_t begin, int64_t end) {
  constexpr int N = M + 2;
  const int cin = a.c1 + a.c2;
  float taps[kStep * 9 * kLanes];
  for (int co = 0, panel = 0, width = panel_width(a.outp, 0); co < a.outp; co += kLanes) {
    if (co == panel + width) width = panel_width(a.outp, panel = co);
    for (int64_t first = begin; first < end; first += kStep) {
      const int count = end - first < kStep ? (int)(end - first) : kStep;
      gather_taps<W>(a, co, first, count, taps);
      float* to = a.u + (int64_t)panel * cin + first * width + (co - panel);
      for (int i = 0; i < count; ++i, to += width)
        for (int l = 0; l < kLanes; l += VL) {
          vf u[N * N];
          filter<M>(a, taps + i * 9 * kLanes + l, u);
          for (int p = 0; p < N * N; ++p) store(to + p * a.u_point + l, u[p]);
        }
    }
  }
}

template <class T, int M>
void conv(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
  constexpr int N = M + 2;
  const int cin = a.c1 + a.c2;
  const int64_t vs = a.v_point, ms = a.m_point;
  float *v = scratch, *m = v + N * N * vs;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * a.block;
    const int count = a.tiles - first < a.block ? (int)(a.tiles - first) : a.block;
    for (int i = 0; i < count; ++i) {
      const int64_t image = (first + i) / a.tiles_image, tile = (first + i) % a.tiles_image;
      const int64_t y0 = tile / a.tiles_w * M - 1, x0 = tile % a.tiles_w * M - 1;
      const int64_t pixels = image * a.h * a.w;
      float* to = v + (int64_t)i * a.cinp;
      input_tile<T, M>((const T*)a.x + pixels * a.c1, a.h, a.w, a.c1, y0, x0, to, vs);
      if (a.c2 > 0)
        input_tile<T, M>((const T*)a.x2 + pixels * a.c2, a.h, a.w, a.c2, y0, x0, to + a.c1, vs);
    }
    for (int p = 0; p < N * N; ++p)
      gemm_panels(count, a.outp, cin, v + p * vs, a.cinp, a.u + p * a.u_point, m + p * ms, a.outp);
    for (int i = 0; i < count; ++i)
      for (int o = 0; o < a.out; o += VL) {
        const float* from = m + (int64_t)i * a.outp + o;
        vf half[M * N], line[N];
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
          for (int r = 0; r < N; ++r) line[r] = load(from + (r * N + j) * ms);
          output_1d<M>(line, 1, half + j, N);
        }
        write_tile<T, M>(a, first + i, half, splat(1.f), o);
      }
  }
}

#if FASTVDM_BF16
template <class W>
void fixed_weights_m(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
  a.m == 2 ? fixed_weights<W, 2>(a, begin, end, scratch)
           : fixed_weights<W, 4>(a, begin, end, scratch);
}
#endif

template <class W>
void weights_m(const WinogradArgs& a, int64_t begin, int64_t end) {
  a.m == 2 ? weights<W, 2>(a, begin, end) : weights<W, 4>(a, begin, end);
}
template <class T>
void conv_m(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
  a.m == 2 ? conv<T, 2>(a, begin, end, scratch) : conv<T, 4>(a, begin, end, scratch);
}

}  // namespace

void winograd_weights(const WinogradArgs& a, int64_t begin, int64_t end) {
  FASTVDM_BY_DTYPE(a.weight_dtype, weights_m, a, begin, end)
}
void winograd_fixed_weights(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
#if FASTVDM_BF16
  FASTVDM_BY_DTYPE(a.weight_dtype, fixed_weights_m, a, begin, end, scratch)
#endif
}
void winograd_conv(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
#if FASTVDM_BF16
  if (a.fixed)
    return a.m == 2 ? fixed_conv<2>(a, begin, end, scratch) : fixed_conv<4>(a, begin, end, scratch);
#endif
  FASTVDM_BY_DTYPE(a.dtype, conv_m, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
