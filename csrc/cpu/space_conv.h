// What the launcher of the 3x3 convolution hands to its kernels: Winograd's minimal filtering
// (Lavin & Gray 2016, arXiv 1509.09308), in fp32 whatever the storage.
#pragma once

#include <algorithm>

#include "common/isa.h"

namespace fastvdm {

struct WinogradArgs {
  int dtype, weight_dtype;
  int m;             // outputs of a tile in each direction: 2 or 4
  int c1, c2, out;   // channels of x, x2, y
  int cinp, outp;    // c1 + c2 and out, rounded up to 16
  int64_t v_point, m_point, u_point;  // floats from one point to the next in v, m and u
  bool turned;       // the gradient with respect to x: the filters turned by 180 degrees
  int64_t w_in, w_out, w_row, w_column;  // strides of weight: by input and output channel, taps
  int64_t images, h, w;
  int64_t tiles_w, tiles_image, tiles;
  int block;         // tiles of an item
  const void *x, *x2, *weight, *residual;
  void* y;
  const float* bias;  // (outp), or null
  float* u;           // ((m + 2)², c1 + c2, outp): the transformed weights, in gemm.h's panels
};

inline int64_t winograd_scratch(const WinogradArgs& a) {
  const int64_t points = static_cast<int64_t>(a.m + 2) * (a.m + 2);
  return points * (a.v_point + a.m_point) + 64;
}

// Of input channels [begin, end).
FASTVDM_DECLARE(void winograd_weights(const WinogradArgs&, int64_t begin, int64_t end))
// Of tile blocks [begin, end).
FASTVDM_DECLARE(void winograd_conv(const WinogradArgs&, int64_t begin, int64_t end, float*))

}  // namespace fastvdm
