// Launchers of the 3x3 convolution's weight gradient; the contract is in fastvdm/ops/space_conv.py.
#include "space_conv_dw.h"

#include <cstring>

#include "launchers.h"

namespace fastvdm {
namespace {

// F(4x4), except for few pixels, where the (m + 2)² sums of every filter cost more than the
// products. It takes 0.6 to 0.65 of the time of F(2x2) in fp32 and 0.6 to 0.7 in bf16 for 16 images
// of 8x8 to 64x64, but 1.05 and 1.3 for one of 8x8 with 512 channels (one thread of an EPYC Zen 4,
// 2026-11).
//
// The largest error relative to max |dw| in fp32 is 0.9e-6 to 1.5e-6 for F(4x4), 4e-7 for F(2x2),
// and 2e-7 to 2e-6 for oneDNN (64 to 512 channels, 16 images of 64x64 to 4x4, normal x and dy; less
// if they are smooth or have a mean).
int64_t tile_of(const Tensor& x) {
  const int64_t pixels = x.numel() / std::max<int64_t>(x.size(x.dim() - 1), 1);
  return pixels < 128 ? 2 : 4;
}

}  // namespace

// dw (Co, C1 + C2, 3, 3), with the strides of torch.empty_like(weight), for y = conv2d([x, x2],
// weight, padding 1). dy is (..., H, W, Co); x and x2 are dense. tile: 2 or 4. The bits of dw do
// not depend on the number of threads.
Tensor conv3x3_dw(Tensor dy, Tensor x, OptTensor x2, Tensor weight, int64_t tile) {
  STD_TORCH_CHECK(x.dim() >= 4 && dy.dim() == x.dim() && weight.dim() == 4 && weight.size(2) == 3 &&
                      weight.size(3) == 3,
                  "conv3x3_dw: dy and x must be (..., H, W, C), weight (Co, C, 3, 3)");
  STD_TORCH_CHECK(tile == 2 || tile == 4, "conv3x3_dw: tile must be 2 or 4");
  WgradArgs a{};
  const ScalarType dtype = x.scalar_type();
  const int64_t last = x.dim() - 1, c1 = x.size(last), out = dy.size(last);
  const int64_t c2 = x2.has_value() ? x2->size(x2->dim() - 1) : 0;
  int64_t pixels = 1;
  for (int64_t i = 0; i < last; ++i) pixels *= x.size(i);
  STD_TORCH_CHECK(c1 + c2 == weight.size(1) && out == weight.size(0) && c1 > 0 && out > 0 &&
                      c1 + c2 < (1 << 20) && out < (1 << 20),
                  "conv3x3_dw: the weight takes ", weight.size(1), " channels to ", weight.size(0),
                  ", the input has ", c1 + c2, ", the gradient ", out);
  a.dtype = static_cast<int>(dtype_of(x));
  a.weight_dtype = static_cast<int>(dtype_of(weight));
  a.m = static_cast<int>(tile);
  a.c1 = static_cast<int>(c1);
  a.c2 = static_cast<int>(c2);
  a.out = static_cast<int>(out);
  a.c1p = static_cast<int>(round_up(c1, 16));
  a.cinp = static_cast<int>(a.c1p + round_up(c2, 16));
  a.outp = static_cast<int>(round_up(out, 16));
  a.h = x.size(last - 2);
  a.w = x.size(last - 1);
  a.dy = input(dy, "dy", dtype, pixels * out);
  a.x = input(x, "x", dtype, pixels * c1);
  a.x2 = x2.has_value() ? input(*x2, "x2", dtype, pixels * c2) : nullptr;
  for (int64_t i = last - 2; i < last; ++i)
    STD_TORCH_CHECK(dy.size(i) == x.size(i) && (!x2.has_value() || x2->size(i) == x.size(i)),
                    "conv3x3_dw: dy, x and x2 must have the same images");
  STD_TORCH_CHECK(weight.is_cpu(), "conv3x3_dw: weight must be on the CPU");
  Tensor dw = torch::stable::empty_like(weight);
  a.dw = dw.mutable_data_ptr();
  a.w_out = dw.stride(0);
  a.w_in = dw.stride(1);
  a.w_row = dw.stride(2);
  a.w_column = dw.stride(3);
  if (pixels == 0) {
    std::memset(a.dw, 0, dw.numel() * (a.weight_dtype == 0 ? 4 : 2));
    return dw;
  }
  a.tiles_w = ceil_div(a.w, tile);
  a.tiles_h = ceil_div(a.h, tile);
  a.tiles = pixels / (a.h * a.w) * a.tiles_h * a.tiles_w;

  // A product reads 128 tiles of a panel, 32 KB, repeatedly. If 16 MB hold all tiles there is one
  // pass, whose sums need not be stored; otherwise there are passes of 4 MB, for the outer cache.
  // All of this, and so the order of a sum, depends only on the sizes; the units do not change it.
  const int64_t points = wgrad_points(a), threads = torch::stable::get_num_threads();
  a.depth = static_cast<int>(std::min<int64_t>(128, a.tiles));
  a.v_point = a.depth * a.cinp + 16;
  a.e_point = a.depth * a.outp + 16;
  const int64_t product = points * (a.v_point + a.e_point);  // floats
  const int64_t most = ceil_div(a.tiles, a.depth);
  const int64_t products =
      most * product <= (4 << 20) ? most : std::clamp<int64_t>((1 << 20) / product, 1, most);
  a.rows = kWgradPanel;
  while (a.rows > 16 && wgrad_units(a) < 2 * threads) a.rows /= 2;
  const int64_t units = wgrad_units(a);
  a.parts = static_cast<int>(units < threads ? points : 1);
  const bool kept = products < most || a.parts > 1;
  const int64_t sums = kept ? units * points * wgrad_sums_point(a) : 0;
  Tensor made = empty(x, {products * product + sums}, ScalarType::Float);
  a.v = static_cast<float*>(made.mutable_data_ptr());
  a.e = a.v + products * points * a.v_point;
  a.sums = kept ? a.v + products * product : nullptr;

  const auto transform = FASTVDM_PICK(wgrad_transform);
  const auto multiply = FASTVDM_PICK(wgrad_multiply);
  for (a.first = 0; a.first < a.tiles; a.first += a.count) {
    a.count = std::min(products * a.depth, a.tiles - a.first);
    a.last = a.first + a.count == a.tiles;
    const int64_t items = wgrad_groups(a) * wgrad_products(a);
    torch::stable::parallel_for(0, items, 1,
                                [&](int64_t begin, int64_t end) { transform(a, begin, end); });
    torch::stable::parallel_for(0, units * a.parts, 1, [&](int64_t begin, int64_t end) {
      const int64_t bytes = wgrad_multiply_scratch(a) * sizeof(float);
      multiply(a, begin, end, static_cast<float*>(scratch(bytes)));
    });
  }
  if (a.parts > 1) {
    const auto filters = FASTVDM_PICK(wgrad_filters);
    torch::stable::parallel_for(0, units, 1,
                                [&](int64_t begin, int64_t end) { filters(a, begin, end); });
  }
  return dw;
}

Tensor space_conv_dw(Tensor dy, Tensor x, OptTensor x2, Tensor weight) {
  return conv3x3_dw(dy, x, x2, weight, tile_of(x));
}

}  // namespace fastvdm
