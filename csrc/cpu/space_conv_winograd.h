// The transforms of Winograd's minimal filtering, with channels in the lanes; space_conv_kernel.cpp
// gives the points.
#pragma once

#include "common/gemm.h"
#include "space_conv.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

constexpr float A = 0.75f, B = 1.25f, AA = A * A, BB = B * B;

// Bᵀ d along one direction: d and v hold m + 2 vectors at their strides.
template <int M>
FASTVDM_INLINE void input_1d(const vf* d, int ds, vf* v, int vs) {
  if constexpr (M == 2) {
    v[0] = d[2 * ds] - d[0];
    v[vs] = d[2 * ds] + d[ds];
    v[2 * vs] = d[2 * ds] - d[ds];
    v[3 * vs] = d[3 * ds] - d[ds];
  } else {
    const vf t = d[4 * ds] - BB * d[2 * ds], s = A * (d[3 * ds] - BB * d[ds]);
    const vf p = d[4 * ds] - AA * d[2 * ds], q = B * (d[3 * ds] - AA * d[ds]);
    v[0] = d[4 * ds] - (AA + BB) * d[2 * ds] + (AA * BB) * d[0];
    v[vs] = t + s;
    v[2 * vs] = t - s;
    v[3 * vs] = p + q;
    v[4 * vs] = p - q;
    v[5 * vs] = d[5 * ds] - (AA + BB) * d[3 * ds] + (AA * BB) * d[ds];
  }
}

// Aᵀ m along one direction: m + 2 vectors to m.
template <int M>
FASTVDM_INLINE void output_1d(const vf* m, int ms, vf* y, int ys) {
  if constexpr (M == 2) {
    y[0] = m[0] + m[ms] + m[2 * ms];
    y[ys] = m[ms] - m[2 * ms] + m[3 * ms];
  } else {
    const vf p = m[ms] + m[2 * ms], q = m[ms] - m[2 * ms];
    const vf r = m[3 * ms] + m[4 * ms], s = m[3 * ms] - m[4 * ms];
    y[0] = m[0] + p + r;
    y[ys] = A * q + B * s;
    y[2 * ys] = AA * p + BB * r;
    y[3 * ys] = (A * AA) * q + (B * BB) * s + m[5 * ms];
  }
}

// G g along one direction: 3 vectors to m + 2.
template <int M>
FASTVDM_INLINE void weight_1d(const vf* g, int gs, vf* u, int us) {
  if constexpr (M == 2) {
    const vf even = 0.5f * (g[0] + g[2 * gs]), odd = 0.5f * g[gs];
    u[0] = -g[0];
    u[us] = even + odd;
    u[2 * us] = even - odd;
    u[3 * us] = g[2 * gs];
  } else {
    constexpr float FA = 1.f / (2 * AA * (AA - BB)), FB = 1.f / (2 * BB * (BB - AA));
    const vf ea = FA * g[0] + (FA * AA) * g[2 * gs], oa = (FA * A) * g[gs];
    const vf eb = FB * g[0] + (FB * BB) * g[2 * gs], ob = (FB * B) * g[gs];
    u[0] = (1.f / (AA * BB)) * g[0];
    u[us] = ea + oa;
    u[2 * us] = ea - oa;
    u[3 * us] = eb + ob;
    u[4 * us] = eb - ob;
    u[5 * us] = g[2 * gs];
  }
}

// The filters of a step, kStep input channels of kLanes output channels, are first copied together:
// those of neighbouring outputs may be a multiple of 4 KiB apart, so that few of them share the L1.
constexpr int kStep = 16, kLanes = VL < 16 ? 2 * VL : 16;  // no panel starts within kLanes
static_assert(kStep * 9 % VL == 0);

// taps (kStep 9, kLanes): the filters of `count` input channels from `first` on and kLanes output
// channels from `co` on, zero beyond the last.
template <class W>
FASTVDM_INLINE void gather_taps(const WinogradArgs& a, int co, int64_t first, int count,
                                float* taps) {
  const W* weight = (const W*)a.weight;
  const bool dense = a.w_column == 1 && a.w_row == 3;  // the nine taps
  float raw[kLanes][kStep * 9] = {};
  for (int l = 0; l < kLanes; ++l) {
    if (co + l >= a.out) {
      for (int k = 0; k < count * 9; ++k) raw[l][k] = 0.f;
      continue;
    }
    const W* from = weight + (co + l) * a.w_out + first * a.w_in;
    if (dense && a.w_in == 9) {
      int k = 0;
      for (; k + VL <= count * 9; k += VL) store(raw[l] + k, load(from + k));
      for (; k < count * 9; ++k) raw[l][k] = to_f32(from[k]);
    } else {
      for (int i = 0; i < count; ++i)
        for (int k = 0; k < 9; ++k)
          raw[l][i * 9 + k] = to_f32(from[i * a.w_in + k / 3 * a.w_row + k % 3 * a.w_column]);
    }
  }
  for (int l = 0; l < kLanes; l += VL)
    for (int k = 0; k < count * 9; k += VL)
      transpose_block(raw[l] + k, kStep * 9, taps + k * kLanes + l, kLanes);
}

// U of VL filters; taps are those of one input channel, (9, kLanes).
template <int M>
FASTVDM_INLINE void filter(const WinogradArgs& a, const float* taps, vf* u) {
  constexpr int N = M + 2;
  vf g[9], half[3 * N];
  for (int k = 0; k < 9; ++k) g[k] = load(taps + (a.turned ? 8 - k : k) * kLanes);
  for (int c = 0; c < 3; ++c) weight_1d<M>(g + c, 3, half + c, 3);
  for (int r = 0; r < N; ++r) weight_1d<M>(half + 3 * r, 1, u + N * r, 1);
}

// Transforms the (m + 2)² patch at (y0, x0) of an image of c channels into v, at points `stride`
// apart.
template <class T, int M>
FASTVDM_INLINE void input_tile(const T* image, int64_t h, int64_t w, int c, int64_t y0, int64_t x0,
                               float* v, int64_t stride) {
  constexpr int N = M + 2;
  const bool inside = y0 >= 0 && x0 >= 0 && y0 + N <= h && x0 + N <= w;
  for (int o = 0; o < c; o += VL) {
    const int n = c - o < VL ? c - o : VL;
    vf half[N * N], line[N];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) {  // the columns first
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        const int64_t y = y0 + i, x = x0 + j;
        if (inside || (y >= 0 && y < h && x >= 0 && x < w)) {
          const T* from = image + (y * w + x) * c;
          line[i] = FASTVDM_LOAD(from, o, n);
        } else {
          line[i] = vf{};
        }
      }
      input_1d<M>(line, 1, half + j, N);
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      input_1d<M>(half + i * N, 1, line, 1);
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) FASTVDM_STORE(v + (i * N + j) * stride, o, line[j], n);
    }
  }
}

// The m x m outputs of a tile: `half` has (m, m + 2) vectors whose columns are already transformed.
// Adds the squares of the sums, without bias and residual, to `squares` unless null.
template <class T, int M>
FASTVDM_INLINE void write_tile(const WinogradArgs& a, int64_t item, const vf* half, vf scale, int o,
                               float (*squares)[VL] = nullptr) {
  constexpr int N = M + 2;
  const int64_t image = item / a.tiles_image, tile = item % a.tiles_image;
  const int64_t y0 = tile / a.tiles_w * M, x0 = tile % a.tiles_w * M;
  const int rows = a.h - y0 < M ? (int)(a.h - y0) : M;
  const int columns = a.w - x0 < M ? (int)(a.w - x0) : M;
  const int n = a.out - o < VL ? a.out - o : VL;
  const vf bias = a.bias != nullptr ? load(a.bias + o) : vf{};
  vf y[M];
  for (int r = 0; r < rows; ++r) {
    output_1d<M>(half + r * N, 1, y, 1);
    const int64_t at = ((image * a.h + y0 + r) * a.w + x0) * a.out;
    for (int c = 0; c < columns; ++c) {
      vf s = y[c] * scale;
      if (squares != nullptr) store(squares[r * M + c], load(squares[r * M + c]) + s * s);
      s += bias;
      if (a.residual != nullptr) {
        const T* res = (const T*)a.residual + at + (int64_t)c * a.out;
        s = s + FASTVDM_LOAD(res, o, n);
      }
      T* to = (T*)a.y + at + (int64_t)c * a.out;
      FASTVDM_STORE(to, o, s, n);
    }
  }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm
