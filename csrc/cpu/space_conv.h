// The arguments of the kernels of the 3x3 convolution: Winograd's minimal filtering (Lavin & Gray
// 2016, arXiv 1509.09308), in fp32 or, for bf16 on CPUs with 16-bit dot products, in fixed point.
#pragma once

#include <algorithm>

#include "common/isa.h"

namespace fastvdm {

struct WinogradArgs {
  int dtype, weight_dtype;
  int m;                              // outputs per tile in each direction: 2 or 4
  int c1, c2, out;                    // channels of x, x2, y
  int cinp, outp;                     // c1 + c2 and out, rounded up to 16
  int64_t v_point, m_point, u_point;  // floats from one point to the next in v, m and u
  bool turned;  // compute the gradient of x: the filters are turned by 180 degrees
  int64_t w_in, w_out, w_row, w_column;  // strides of weight: by input and output channel, taps
  int64_t images, h, w;
  int64_t tiles_w, tiles_image, tiles;
  int block;  // tiles per item
  const void *x, *x2, *weight, *residual;
  void* y;
  const float* bias;  // (outp), or null
  float* u;           // ((m + 2)², c1 + c2, outp): the transformed weights, in gemm.h's panels
  bool fixed;         // use integers (space_conv_fixed.h): u has the layout of dots.h, and
  float* u_scale;     // (outp): the value of one integer step per output channel
  int* unfit;         // set if the values do not suit integers
};

inline int64_t winograd_scratch(const WinogradArgs& a) {
  const int64_t points = static_cast<int64_t>(a.m + 2) * (a.m + 2);
  if (a.fixed)
    return points * (a.cinp + 16 + a.v_point / 2 + a.m_point) + (points + 15) * a.block + 64;
  return points * (a.v_point + a.m_point) + 64;
}

// For input channels [begin, end).
FASTVDM_DECLARE_BF16(void winograd_weights(const WinogradArgs&, int64_t begin, int64_t end))
inline int64_t winograd_fixed_scratch(const WinogradArgs& a) {
  return static_cast<int64_t>(a.m + 2) * (a.m + 2) * (a.c1 + a.c2 + 1) * 16;
}
// For groups of 16 output channels, in fixed point.
FASTVDM_DECLARE_BF16(void winograd_fixed_weights(const WinogradArgs&, int64_t begin, int64_t end,
                                                 float*))
// For tile blocks [begin, end).
FASTVDM_DECLARE_BF16(void winograd_conv(const WinogradArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
