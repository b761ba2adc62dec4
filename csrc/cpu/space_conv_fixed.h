// The 3x3 convolution of bf16 in fixed point: transformed tiles and filters are 16-bit integers,
// products and sums are 32-bit (vpdpwssd), at twice the rate of fp32.
//
// Every row of the two operands along the channels, which are summed, is scaled to a Euclidean norm
// of 32760. So no sum, and no part of one, exceeds 32 bits (Cauchy-Schwarz). Rounding is by 1/32760
// of the norm: an error of 6e-4 at 64 channels, 1.2e-3 at 256, 1.7e-3 at 512 (root mean square,
// relative to y); rounding y to bf16 has 1.7e-3. With bf16 instead of integers it would be 1.4e-2.
//
// This holds if y is as large as its operands suggest, and not if a large channel or pixel meets
// small weights. So every pixel of y is compared with the noise of its tile. If one drowns in it,
// or if squares exceed fp32's range, `unfit` is set and the launcher computes everything in fp32.
#pragma once

#include "common/dots.h"
#include "space_conv_winograd.h"

#if FASTVDM_BF16

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

constexpr float kFixedNorm = 32760.f;

FASTVDM_INLINE void set_flag(int* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

// The norm of row r of G. With similar weights the filters of the points differ by these norms, so
// the product of two of them is taken out of the scale of the filters and put into that of the
// tiles.
template <int M>
FASTVDM_INLINE void point_norms(float* norms) {
  constexpr int N = M + 2;
  vf g[3], column[N];
  float sum[N] = {};
  for (int c = 0; c < 3; ++c) {
    for (int i = 0; i < 3; ++i) g[i] = splat(i == c ? 1.f : 0.f);
    weight_1d<M>(g, 1, column, 1);
    for (int r = 0; r < N; ++r) sum[r] += column[r][0] * column[r][0];
  }
  for (int p = 0; p < N * N; ++p) norms[p] = __builtin_sqrtf(sum[p / N] * sum[p % N]);
}

FASTVDM_INLINE vf vsqrt(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < VL; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
FASTVDM_INLINE bool all_within(vf v, float low, float high) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  return (_mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_GT_OQ) &
          _mm512_cmp_ps_mask(x, _mm512_set1_ps(high), _CMP_LT_OQ)) == 0xffff;
#else
  bool all = true;
  for (int i = 0; i < VL; ++i) all &= v[i] > low && v[i] < high;
  return all;
#endif
}

// The nearest integers to numbers below 2^22.
FASTVDM_INLINE vi nearest(vf v) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)v);
#else
  return as_int(v + 12582912.f) - 0x4b400000;
#endif
}
FASTVDM_INLINE void store_short(int16_t* to, vi v) {
  typedef int16_t vs __attribute__((vector_size(FASTVDM_VBYTES / 2)));
  const vs s = __builtin_convertvector(v, vs);
  memcpy(to, &s, sizeof(s));
}

// For groups of 16 output channels. scratch: ((m + 2)², cin + 1, 16).
template <class W, int M>
void fixed_weights(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
  constexpr int P = (M + 2) * (M + 2);
  static_assert(kLanes == 16);
  const int cin = a.c1 + a.c2, depth = (cin + 1) / 2;
  float norms[P], taps[kStep * 9 * kLanes];
  point_norms<M>(norms);
  const auto at = [&](int p, int64_t k) { return scratch + (p * 2 * depth + k) * 16; };
  for (int64_t group = begin; group < end; ++group) {
    const int co = (int)group * 16;
    float squares[P][16] = {}, tops[16] = {};
    for (int p = 0; p < P; ++p) memset(at(p, 2 * depth - 1), 0, sizeof(float) * 16);
    for (int64_t first = 0; first < cin; first += kStep) {
      const int count = cin - first < kStep ? (int)(cin - first) : kStep;
      gather_taps<W>(a, co, first, count, taps);
      for (int i = 0; i < count; ++i)
        for (int l = 0; l < 16; l += VL) {
          vf u[P];
          filter<M>(a, taps + i * 9 * kLanes + l, u);
          for (int p = 0; p < P; ++p) {
            store(at(p, first + i) + l, u[p]);
            store(tops + l, vmax(load(tops + l), vmax(u[p], -u[p])));
            store(squares[p] + l, load(squares[p] + l) + u[p] * u[p]);
          }
        }
    }
    for (int l = 0; l < 16; l += VL) {
      vf top = {}, all = {};
      for (int p = 0; p < P; ++p) {
        const vf s = load(squares[p] + l) / (norms[p] * norms[p]);
        top = vmax(top, s);
        all += s;
      }
      float scale[VL], back[VL];
      store(scale, top);
      store(back, all);
      for (int i = 0; i < VL; ++i) {
        // The squares exceed fp32's range, or are NaN, or are too small without being zero.
        if (!(back[i] < 1e30f) || (back[i] < 1e-25f && tops[l + i] > 0.f)) set_flag(a.unfit);
        const float norm = __builtin_sqrtf(scale[i]);
        scale[i] = norm > 0.f ? kFixedNorm / norm : 0.f;
        back[i] = norm / kFixedNorm;
      }
      memcpy(a.u_scale + co + l, back, sizeof(back));
      for (int p = 0; p < P; ++p) {
        const vf by = load(scale) / norms[p];
        uint32_t* to = (uint32_t*)a.u + p * a.u_point + (int64_t)co * depth + l;
        for (int k = 0; k < depth; ++k) {
          const vi low = nearest(load(at(p, 2 * k) + l) * by);
          const vi high = nearest(load(at(p, 2 * k + 1) + l) * by);
          store_words(to + 16 * k, ((vu)low & 0xffffu) | (vu)high << 16);
        }
      }
    }
  }
}

// Whether a row is all zeros.
FASTVDM_NOINLINE bool all_zero(const float* v, int n) {
  bool zero = true;
  for (int c = 0; c < n; ++c) zero &= v[c] == 0.f;
  return zero;
}

// Rounds the transformed tile (points, channels) to integers; back[p] undoes the scales.
template <int P>
FASTVDM_INLINE void round_tile(const WinogradArgs& a, const float* tile, int64_t stride,
                               const float* worth, int16_t* v, int64_t v_point, float* back) {
  constexpr int PP = (P + 15) / 16 * 16;
  float squares[PP], scale[PP];
  for (int p = P; p < PP; ++p) squares[p] = 1.f;
  for (int p = 0; p < P; ++p) {
    const float* from = tile + p * stride;
    vf sum = {};
    for (int c = 0; c < a.cinp; c += VL) sum += load(from + c) * load(from + c);
    squares[p] = hsum(sum);
  }
  bool plain = true;
  for (int p = 0; p < PP; p += VL) {
    const vf all = load(squares + p);
    plain &= all_within(all, 1e-25f, 1e30f);
    const vf norm = vsqrt(all);
    store(scale + p, kFixedNorm / norm);
    store(back + p, norm * load(worth + p));
  }
  for (int p = 0; !plain && p < P; ++p) {
    if (squares[p] > 1e-25f && squares[p] < 1e30f) continue;
    if (!all_zero(tile + p * stride, a.cinp)) set_flag(a.unfit);
    scale[p] = back[p] = 0.f;
  }
  for (int p = 0; p < P; ++p) {
    const float* from = tile + p * stride;
    int16_t* to = v + p * v_point;
    const vf by = splat(scale[p]);
    for (int c = 0; c < a.cinp; c += VL) store_short(to + c, nearest(load(from + c) * by));
  }
}

// The mean over the outputs of a tile of their squared weights: the variance in y of noise of
// variance 1 at a point.
template <int M>
FASTVDM_INLINE void noise_weights(float* weights) {
  constexpr int N = M + 2;
  float sum[N];
  for (int r = 0; r < N; ++r) {
    vf m[N], y[M];
    for (int i = 0; i < N; ++i) m[i] = splat(i == r ? 1.f : 0.f);
    output_1d<M>(m, 1, y, 1);
    sum[r] = 0.f;
    for (int i = 0; i < M; ++i) sum[r] += y[i][0] * y[i][0] / M;
  }
  for (int p = 0; p < N * N; ++p) weights[p] = sum[p / N] * sum[p % N];
}

// Rounding two rows of norm 32760 to integers causes this variance in their product.
constexpr float kNoise = 2 * kFixedNorm * kFixedNorm / 12;
constexpr float kMostNoise = 6e-3f;  // relative to a pixel of y, root mean square over channels

// Whether the sum of squares of any pixel of the tile is below `least`.
template <int M>
FASTVDM_INLINE bool drowned(const WinogradArgs& a, int64_t item, const float (&squares)[M * M][VL],
                            float least) {
  const int64_t tile = item % a.tiles_image;
  const int64_t y0 = tile / a.tiles_w * M, x0 = tile % a.tiles_w * M;
  bool found = false;
  for (int r = 0; r < M && y0 + r < a.h; ++r)
    for (int c = 0; c < M && x0 + c < a.w; ++c) found |= hsum(load(squares[r * M + c])) < least;
  return found;
}

template <int M>
void fixed_conv(const WinogradArgs& a, int64_t begin, int64_t end, float* scratch) {
  constexpr int N = M + 2, P = N * N, PP = (P + 15) / 16 * 16;
  const int depth = (a.c1 + a.c2 + 1) / 2;
  const int64_t stride = a.cinp + 16, vs = a.v_point, ms = a.m_point;
  float *tile = scratch, *back = tile + P * stride, *m = back + a.block * PP;
  int16_t* v = (int16_t*)(m + P * ms);
  float worth[PP] = {};  // the scale that the filters left, times the integers' norm
  point_norms<M>(worth);
  for (int p = 0; p < P; ++p) worth[p] /= kFixedNorm;
  float weights[PP] = {};
  noise_weights<M>(weights);
  float all_scales = 0.f;  // Σ of the squared scales
  for (int o = 0; o < a.out; ++o) all_scales += a.u_scale[o] * a.u_scale[o];
  const float limit = all_scales * kNoise / (kMostNoise * kMostNoise);
  memset(tile, 0, sizeof(float) * P * stride);  // beyond the channels it stays zero
  for (int64_t item = begin; item < end; ++item) {
    if (__atomic_load_n(a.unfit, __ATOMIC_RELAXED)) return;
    const int64_t first = item * a.block;
    const int count = a.tiles - first < a.block ? (int)(a.tiles - first) : a.block;
    for (int i = 0; i < count; ++i) {
      const int64_t image = (first + i) / a.tiles_image, t = (first + i) % a.tiles_image;
      const int64_t y0 = t / a.tiles_w * M - 1, x0 = t % a.tiles_w * M - 1;
      const int64_t pixels = image * a.h * a.w;
      input_tile<bf16, M>((const bf16*)a.x + pixels * a.c1, a.h, a.w, a.c1, y0, x0, tile, stride);
      if (a.c2 > 0)
        input_tile<bf16, M>((const bf16*)a.x2 + pixels * a.c2, a.h, a.w, a.c2, y0, x0, tile + a.c1,
                            stride);
      round_tile<P>(a, tile, stride, worth, v + (int64_t)i * a.cinp, vs, back + i * PP);
    }
    for (int p = 0; p < P; ++p)
      dot_gemm<false, vi>(count, a.outp, depth, (const uint32_t*)(v + p * vs), a.cinp / 2,
                          {(const uint32_t*)a.u + p * a.u_point, 16, (int64_t)16 * depth},
                          m + p * ms, a.outp, false);
    for (int i = 0; i < count; ++i) {
      float squares[M * M][VL] = {};  // of y
      for (int o = 0; o < a.out; o += VL) {
        const float* from = m + (int64_t)i * a.outp + o;
        vf half[M * N], line[N];
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
          for (int r = 0; r < N; ++r) {
            const vi sum = as_int(load(from + (r * N + j) * ms));
            line[r] = __builtin_convertvector(sum, vf) * back[i * PP + r * N + j];
          }
          output_1d<M>(line, 1, half + j, N);
        }
        write_tile<bf16, M>(a, first + i, half, load(a.u_scale + o), o, squares);
      }
      vf noise = {};
      for (int p = 0; p < PP; p += VL) {
        const vf b = load(back + i * PP + p);
        noise += load(weights + p) * b * b;
      }
      if (drowned<M>(a, first + i, squares, hsum(noise) * limit)) set_flag(a.unfit);
    }
  }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

#endif
