// Launchers of the 3x3 convolution; the contract is in fastvdm/ops/space_conv.py.
#include "space_conv.h"

#include <algorithm>

#include "launchers.h"

namespace fastvdm {
namespace {

// The tile size of a convolution of x (..., H, W, C) or, turned, of dy.
//
// F(2x2) in fp32 has no larger error than the direct sum. F(4x4) has an error of 1e-6 to 3e-6 of
// the largest output, so it is for 16-bit storage only. The choice depends only on sizes, so that
// the bits of a result never depend on the cache of transformed weights.
//
// Time of F(2x2) against oneDNN in fp32, with weights kept / transformed at every call (two threads
// of an EPYC Zen 3 with AVX2, 2026-11): 0.66 / 0.66 for 16 images of 64x64x64, 0.49 / 0.53 at
// 16x16x512, 0.37 / 0.44 at 8x8x1024; for one image 0.32 / 0.38 at 8x8x512, 0.21 / 0.44 at
// 8x8x1024. F(4x4) has over twice as many weights to transform and read; against F(2x2): 0.75 /
// 1.03 for 16 images of 8x8x1024, 0.73 / 1.29 for 9, 1.0 / 1.6 for 4, 1.1 / 1.9 for one.
int64_t tile_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 4, "space_conv: weight must be (Co, C, 3, 3)");
  if (x.scalar_type() == ScalarType::Float) return 2;
  const int64_t pixels = x.numel() / std::max<int64_t>(x.size(x.dim() - 1), 1);
  return pixels < std::max(weight.size(0), weight.size(1)) ? 2 : 4;
}

// fixed: use fixed point if the call allows it, and fp32 after all if its values do not.
Tensor conv3x3_by(const Tensor& x, const OptTensor& x2, const Tensor& weight, const OptTensor& bias,
                  const OptTensor& residual, bool turned, int64_t tile, bool fixed) {
  STD_TORCH_CHECK(x.dim() >= 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "conv3x3: x must be (..., H, W, C), weight (Co, C, 3, 3)");
  STD_TORCH_CHECK(tile == 2 || tile == 4, "conv3x3: tile must be 2 or 4");
  WinogradArgs a{};
  const ScalarType dtype = x.scalar_type();
  const int64_t last = x.dim() - 1, c1 = x.size(last);
  const int64_t c2 = x2.has_value() ? x2->size(x2->dim() - 1) : 0;
  int64_t pixels = 1;
  for (int64_t i = 0; i < last; ++i) pixels *= x.size(i);
  const int64_t cin = weight.size(turned ? 0 : 1), out = weight.size(turned ? 1 : 0);
  STD_TORCH_CHECK(c1 + c2 == cin && cin > 0 && out > 0 && cin < (1 << 20) && out < (1 << 20),
                  "conv3x3: the weight takes ", cin, " channels, the input has ", c1 + c2);
  a.dtype = static_cast<int>(dtype_of(x));
  a.weight_dtype = static_cast<int>(dtype_of(weight));
  a.m = static_cast<int>(tile);
  a.c1 = static_cast<int>(c1);
  a.c2 = static_cast<int>(c2);
  a.out = static_cast<int>(out);
  a.cinp = static_cast<int>((cin + 15) / 16 * 16);
  a.outp = static_cast<int>((out + 15) / 16 * 16);
  a.turned = turned;
  a.w_in = weight.stride(turned ? 0 : 1);
  a.w_out = weight.stride(turned ? 1 : 0);
  a.w_row = weight.stride(2);
  a.w_column = weight.stride(3);
  a.h = x.size(last - 2);
  a.w = x.size(last - 1);
  a.images = a.h * a.w > 0 ? pixels / (a.h * a.w) : 0;
  a.fixed = fixed && isa() >= Isa::avx512_bf16 && dtype == ScalarType::BFloat16;
  a.tiles_w = ceil_div(a.w, tile);
  a.tiles_image = a.tiles_w * ceil_div(a.h, tile);
  a.tiles = a.images * a.tiles_image;
  a.x = input(x, "x", dtype, pixels * c1);
  a.x2 = x2.has_value() ? input(*x2, "x2", dtype, pixels * c2) : nullptr;
  STD_TORCH_CHECK(weight.is_cpu(), "conv3x3: weight must be on the CPU");
  a.weight = weight.const_data_ptr();
  a.residual = residual.has_value() ? input(*residual, "residual", dtype, pixels * out) : nullptr;
  std::vector<float> padded;
  if (bias.has_value()) {
    padded = floats(*bias, "bias", out);
    padded.resize(a.outp, 0.f);
    a.bias = padded.data();
  }
  std::vector<int64_t> shape = sizes_of(x);
  shape[last] = out;
  Tensor y = empty(x, shape, dtype);
  a.y = y.mutable_data_ptr();
  if (a.tiles == 0) return y;

  const int64_t points = (tile + 2) * (tile + 2);
  // The points are a power of two plus one cache line apart. A step touches one line of each, and
  // otherwise all of these would share few sets of the L1 cache.
  const int64_t depth = a.fixed ? ceil_div(cin, 2) : cin;
  a.u_point = depth * a.outp + 16;
  const Tensor u = packed_weights(weight, 2 * tile + turned + (a.fixed ? 1 << 8 : 0), [&] {
    Tensor made = empty(x, {points * a.u_point + (a.fixed ? a.outp + 1 : 0)}, ScalarType::Float);
    WinogradArgs to = a;
    to.u = static_cast<float*>(made.mutable_data_ptr());
    to.u_scale = to.u + points * a.u_point;
    if (a.fixed) {
      to.unfit = reinterpret_cast<int*>(to.u_scale + a.outp);
      *to.unfit = 0;
      const auto prepare = FASTVDM_PICK_BF16(winograd_fixed_weights);
      const int64_t bytes = winograd_fixed_scratch(a) * sizeof(float);
      torch::stable::parallel_for(0, a.outp / 16, 1, [&](int64_t begin, int64_t end) {
        prepare(to, begin, end, static_cast<float*>(scratch(bytes)));
      });
    } else {
      const auto prepare = FASTVDM_PICK_BF16(winograd_weights);
      torch::stable::parallel_for(0, cin, 16,
                                  [&](int64_t begin, int64_t end) { prepare(to, begin, end); });
    }
    return made;
  });
  a.u = static_cast<float*>(u.mutable_data_ptr());
  a.u_scale = a.u + points * a.u_point;
  int unfit = a.fixed ? *reinterpret_cast<const int*>(a.u_scale + a.outp) : 0;
  if (unfit) return conv3x3_by(x, x2, weight, bias, residual, turned, tile, false);
  a.unfit = &unfit;
  // If the weights are small, the transformed tiles and products of a block share the L2 cache with
  // them. Large weights are read once per block, so the block is as large as the threads allow. The
  // result does not depend on it, because every tile is summed in the same order.
  const int64_t tile_bytes = points * ((a.fixed ? 2 : 4) * a.cinp + 4 * a.outp);
  const int64_t weight_bytes = 4 * points * depth * a.outp;
  const int64_t threads = torch::stable::get_num_threads(), share = ceil_div(a.tiles, threads);
  int64_t block = std::clamp<int64_t>((1 << 20) / tile_bytes / 8 * 8, 16, 64);
  if (a.fixed) {  // give each thread the same number of blocks
    const int64_t most = weight_bytes > 8 << 20 ? 256 : 32;
    block = ceil_div(a.tiles, threads * ceil_div(share, most));
  } else if (weight_bytes > 3 << 19) {
    block = std::max(block, std::min<int64_t>({share, 256, (24 << 20) / tile_bytes}));
  }
  a.block = static_cast<int>(block);
  a.v_point = block * a.cinp + (a.fixed ? 32 : 16);
  a.m_point = block * a.outp + 16;
  const auto kernel = FASTVDM_PICK_BF16(winograd_conv);
  torch::stable::parallel_for(0, ceil_div(a.tiles, a.block), 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(winograd_scratch(a) * sizeof(float))));
  });
  if (unfit) return conv3x3_by(x, x2, weight, bias, residual, turned, tile, false);
  return y;
}

}  // namespace

// y (..., H, W, Co) = conv2d([x, x2], weight, padding 1) + bias + residual. x is (..., H, W, C); x2
// and residual are dense; weight is (Co, C, 3, 3) with any strides.
// turned: computes the gradient of x instead. The argument x is then dy, and weight is the
// forward's, (C, Co, 3, 3); its filters are turned by 180 degrees.
// tile: 2 or 4, the outputs of a Winograd tile along each axis. The ops below choose it.
Tensor conv3x3(Tensor x, OptTensor x2, Tensor weight, OptTensor bias, OptTensor residual,
               bool turned, int64_t tile) {
  return conv3x3_by(x, x2, weight, bias, residual, turned, tile, true);
}

Tensor space_conv_fwd(Tensor x, OptTensor x2, Tensor weight, OptTensor bias, OptTensor residual,
                      int64_t stride) {
  if (stride != 1 || weight.size(2) != 3) return direct_conv(x, x2, weight, bias, residual, stride);
  return conv3x3(x, x2, weight, bias, residual, false, tile_of(x, weight));
}

Tensor space_conv_dx(Tensor dy, Tensor weight) {
  return conv3x3(dy, {}, weight, {}, {}, true, tile_of(dy, weight));
}

}  // namespace fastvdm
