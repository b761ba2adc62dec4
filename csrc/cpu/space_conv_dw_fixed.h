// The weight gradient of bf16 in fixed point: integers of 16 bits, products and sums in 32
// (vpdpwssd), at twice the rate of fp32.
//
// Over the tiles of a product, which are summed, every channel of the two operands is scaled at
// every point to an Euclidean norm of 32760. So no sum, and no part of one, leaves 32 bits
// (Cauchy-Schwarz), and what is rounded is 1/32760 of the norm: the largest error is 7e-4 to 1.1e-3
// of max |dw| with F(4x4), 3e-4 with F(2x2), where rounding dw to bf16 costs 2e-3 to 3.5e-3 (64 to
// 512 channels, products of up to 128 tiles). The sums of products are fp32.
#pragma once

#include "space_conv_fixed.h"

#if FASTVDM_BF16

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

FASTVDM_INLINE vf square_root(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < VL; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The norms of VL columns of `count` rows, 16 apart, whatever their range; not a number where one
// of the column is none, or infinite.
FASTVDM_NOINLINE vf wide_norms(const float* from, int count) {
  vf top = {}, bad = {}, sum = {};
  for (int i = 0; i < count; ++i) {
    const vf x = load(from + 16 * i);
    top = vmax(top, vmax(x, -x));
    bad += x - x;
  }
  const vf inverse = top > 1e-30f ? 1.f / top : vf{};
  for (int i = 0; i < count; ++i) {
    const vf x = load(from + 16 * i) * inverse;
    sum += x * x;
  }
  return top * square_root(sum) + bad;
}

// Rounds `count` rows of 16 columns to integers, two rows to a word; scale undoes the scaling.
FASTVDM_NOINLINE void round_pairs(const float* from, int count, uint32_t* to, int64_t ld,
                                  float* scale) {
  for (int o = 0; o < 16; o += VL, from += VL) {
    vf sum[4] = {};
    int i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf x = load(from + 16 * (i + j));
        sum[j] += x * x;
      }
    }
    for (; i < count; ++i) sum[0] += load(from + 16 * i) * load(from + 16 * i);
    const vf squares = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const vi plain = (squares > 1e-25f) & (squares < 1e30f);
    bool all = true;
    for (int l = 0; l < VL; ++l) all &= plain[l] != 0;
    const vf norm = all ? square_root(squares) : wide_norms(from, count);
    const vf by = norm > 1e-30f ? kFixedNorm / norm : vf{};
    store(scale + o, norm <= 1e-30f ? vf{} : norm / kFixedNorm);
    for (i = 0; i + 2 <= count; i += 2) {
      const vi low = nearest(load(from + 16 * i) * by);
      const vi high = nearest(load(from + 16 * i + 16) * by);
      store_words(to + i / 2 * ld + o, ((vu)low & 0xffffu) | (vu)high << 16);
    }
    if (i < count) {
      const vi low = nearest(load(from + 16 * i) * by);
      store_words(to + i / 2 * ld + o, (vu)low & 0xffffu);
    }
  }
}

// sums = or += the integers of `found` times the scales of their row and column.
FASTVDM_INLINE void add_scaled(const float* found, int rows, int n, const float* row_scale,
                               const float* column_scale, float* sums, bool accumulate) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < n; c += VL, found += VL, sums += VL) {
      const vf x = __builtin_convertvector(as_int(load(found)), vf) * load(column_scale + c);
      store(sums, accumulate ? load(sums) + x * row_scale[r] : x * row_scale[r]);
    }
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

#endif
