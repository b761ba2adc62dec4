// The arguments of the kernels of the direct convolution: a sum over taps without a copy of the
// input (im2col); each row of a product is read at its pixel.
//
// An output is at (up * oy + phase / up, up * ox + phase % up) and its taps at (stride * oy +
// tap_y, stride * ox + tap_x). A convolution has one phase, a transposed one of stride 2 has four.
#pragma once

#include "common/isa.h"

namespace fastvdm {

constexpr int kMaxTaps = 49;

struct DirectArgs {
  int dtype;
  bool pairs;             // bf16 products: both sources have an even number of channels
  int c1, c2, out, outp;  // channels of x, x2, y; outp: out rounded up to 16
  int taps, stride, up;
  int tap_y[4][kMaxTaps], tap_x[4][kMaxTaps];  // per phase
  int64_t images, h, w, oh, ow;                // size of the input; of the outputs of a phase
  const void *x, *x2, *residual;
  void* y;
  const float* bias;    // (outp), or null
  const void* weights;  // (phases, outp / 16, depth, 16) words: fp32, or pairs of bf16
  int64_t depth;        // words per sum: taps * (c1 + c2), or half of that
  int64_t items;        // per phase
  int block;            // outputs per item
};

// Bytes of scratch per thread: the products, the rows, and a row of zeros.
inline int64_t direct_conv_scratch(const DirectArgs& a) {
  const int64_t rows = a.block + 16;
  return rows * a.outp * 4 + 2 * a.taps * rows * 8 + 4 * (a.c1 + a.c2) + 256;
}

FASTVDM_DECLARE_BF16(void direct_conv(const DirectArgs&, int64_t begin, int64_t end, void*))

}  // namespace fastvdm
