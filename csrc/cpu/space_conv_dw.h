// The arguments of the kernels of the 3x3 convolution's weight gradient.
#pragma once

#include <algorithm>

#include "common/isa.h"

namespace fastvdm {

// Channels per panel: the columns of a product, and its largest number of rows.
constexpr int kWgradPanel = 64;

struct WgradArgs {
  int dtype, weight_dtype;
  int m;                // gradients per tile in each direction: 2 or 4
  int c1, c2, out;      // channels of x, x2, dy
  int c1p, cinp, outp;  // c1, the channels of both sources, and out, each rounded up to 16
  int64_t h, w;
  int64_t tiles_w, tiles_h, tiles;
  int depth;                 // tiles per product
  int64_t first, count;      // tiles of this pass
  int64_t v_point, e_point;  // words from one point to the next in v and e
  int rows;                  // output channels per unit, a divisor of kWgradPanel
  int parts;                 // items per unit: its points are divided
  bool last;                 // whether this pass completes the sums
  const void *dy, *x, *x2;
  void* dw;
  int64_t w_out, w_in, w_row, w_column;  // strides of dw
  // (products, points, panels, tiles, channels of a panel): the transformed tiles of x and of dy.
  float *v, *e;
  float* sums;  // the sums of the units between passes; null: they are in scratch
};

inline int64_t wgrad_points(const WgradArgs& a) {
  return static_cast<int64_t>(a.m + 2) * (a.m + 2);
}
inline int64_t wgrad_products(const WgradArgs& a) { return (a.count + a.depth - 1) / a.depth; }
inline int64_t wgrad_groups(const WgradArgs& a) { return (a.cinp + a.outp) / 16; }
inline int64_t wgrad_panels(const WgradArgs& a) { return (a.cinp + kWgradPanel - 1) / kWgradPanel; }
inline int64_t wgrad_units(const WgradArgs& a) {
  return (a.out + a.rows - 1) / a.rows * wgrad_panels(a);
}
// The points are a power of two plus one cache line apart, as in space_conv.cpp.
inline int64_t wgrad_sums_point(const WgradArgs& a) { return a.rows * kWgradPanel + 16; }

// In floats.
inline int64_t wgrad_multiply_scratch(const WgradArgs& a) {
  return wgrad_points(a) * wgrad_sums_point(a) + kWgradPanel * kWgradPanel;
}

// For items [begin, end): 16 channels of x, x2 or dy in the tiles of a product.
FASTVDM_DECLARE(void wgrad_transform(const WgradArgs&, int64_t begin, int64_t end))
// For parts of units.
FASTVDM_DECLARE(void wgrad_multiply(const WgradArgs&, int64_t begin, int64_t end, float*))
// For units: from the sums to dw. wgrad_multiply does this itself if a unit has one part.
FASTVDM_DECLARE(void wgrad_filters(const WgradArgs&, int64_t begin, int64_t end))

}  // namespace fastvdm
