// Launchers of the direct convolution; the contracts are in fastvdm/ops/space_conv.py.
#include "space_conv_direct.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "launchers.h"

namespace fastvdm {
namespace {

// The weight as (out, in, k, k) with its strides, in either layout.
struct Kernel {
  int64_t out, in, size, stride_out, stride_in, row, column;
};

Kernel kernel_of(const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(2) == weight.size(3),
                  "direct_conv: weight must be a square kernel on the CPU");
  const int out = transposed ? 1 : 0;
  return {weight.size(out),       weight.size(1 - out), weight.size(2),  weight.stride(out),
          weight.stride(1 - out), weight.stride(2),     weight.stride(3)};
}

// Packs the words of the sums as the kernel reads them; for bf16 these are pairs of channels.
template <class T, class Get>
void pack(const DirectArgs& a, const Kernel& k, const int (*taps)[kMaxTaps], const T* weight,
          bool pairs, void* to, const Get& get) {
  const int phases = a.up * a.up;
  const int64_t panel = a.depth * 16, channels = a.c1 + a.c2, step = pairs ? 2 : 1;
  torch::stable::parallel_for(0, phases * (a.outp / 16), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t phase = i / (a.outp / 16), first = i % (a.outp / 16) * 16;
      const int64_t lanes = std::min<int64_t>(16, a.out - first);
      for (int64_t t = 0; t < a.taps; ++t) {
        const int64_t tap = taps[phase][t] / k.size * k.row + taps[phase][t] % k.size * k.column;
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t n = 0; n < lanes; ++n) {
            const T& from = weight[(first + n) * k.stride_out + c * k.stride_in + tap];
            get(from, i * panel * step + (t * channels + c) / step * 16 * step + n * step +
                          (t * channels + c) % step);
          }
      }
    }
  });
}

Tensor weights_of(const DirectArgs& a, const Tensor& weight, const Kernel& k,
                  const int (*taps)[kMaxTaps], bool pairs) {
  const int64_t words = a.up * a.up * a.depth * a.outp;
  Tensor made = empty(weight, {words}, ScalarType::Float);
  void* to = made.mutable_data_ptr();
  std::fill_n(static_cast<float*>(to), words, 0.f);
  const auto put = [&](float value, int64_t at) {
    if (pairs)
      static_cast<uint16_t*>(to)[at] = c10::BFloat16(value).x;
    else
      static_cast<float*>(to)[at] = value;
  };
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      pack(a, k, taps, static_cast<const float*>(weight.const_data_ptr()), pairs, to,
           [&](float v, int64_t at) { put(v, at); });
      break;
    case ScalarType::BFloat16:
      pack(a, k, taps, static_cast<const c10::BFloat16*>(weight.const_data_ptr()), pairs, to,
           [&](c10::BFloat16 v, int64_t at) { put(static_cast<float>(v), at); });
      break;
    case ScalarType::Half:
      pack(a, k, taps, static_cast<const c10::Half*>(weight.const_data_ptr()), pairs, to,
           [&](c10::Half v, int64_t at) { put(static_cast<float>(v), at); });
      break;
    default: STD_TORCH_CHECK(false, "direct_conv: the weight must be fp32, bf16 or fp16");
  }
  return made;
}

Tensor run(const Tensor& x, const OptTensor& x2, const Tensor& weight, const OptTensor& bias,
           const OptTensor& residual, int64_t stride, bool transposed) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.dim() >= 4, "direct_conv: x must be (..., H, W, C)");
  const ScalarType dtype = x.scalar_type();
  const Kernel k = kernel_of(weight, transposed);
  DirectArgs a{};
  const int64_t c1 = x.size(last), c2 = x2.has_value() ? x2->size(last) : 0;
  STD_TORCH_CHECK(c1 + c2 == k.in && c1 > 0 && k.in < (1 << 20) && k.out < (1 << 20),
                  "direct_conv: the weight takes ", k.in, " channels, the input has ", c1 + c2);
  const bool pairs = a.pairs =
      dtype == ScalarType::BFloat16 && isa() >= Isa::avx512_bf16 && c1 % 2 == 0 && c2 % 2 == 0;
  a.dtype = static_cast<int>(dtype_of(x));
  a.c1 = static_cast<int>(c1);
  a.c2 = static_cast<int>(c2);
  a.out = static_cast<int>(k.out);
  a.outp = static_cast<int>(round_up(k.out, 16));
  a.h = x.size(last - 2);
  a.w = x.size(last - 1);
  int from[4][kMaxTaps];  // the weight's tap for each of them
  if (transposed) {
    STD_TORCH_CHECK(k.size == 4 && stride == 2,
                    "direct_conv: a transposed kernel is 4x4, stride 2");
    a.stride = 1;
    a.up = 2;
    a.taps = 4;
    a.oh = a.h;
    a.ow = a.w;
    // y[2i + p] = Σ_t x[i + p - t] w[1 - p + 2t] along each axis, t = 0, 1.
    for (int phase = 0; phase < 4; ++phase)
      for (int t = 0; t < 4; ++t) {
        const int py = phase / 2, px = phase % 2, ty = t / 2, tx = t % 2;
        a.tap_y[phase][t] = py - ty;
        a.tap_x[phase][t] = px - tx;
        from[phase][t] = (1 - py + 2 * ty) * 4 + (1 - px + 2 * tx);
      }
  } else {
    const int pad = static_cast<int>(k.size % 2 ? k.size / 2 : k.size / 2 - 1);
    STD_TORCH_CHECK(k.size * k.size <= kMaxTaps && stride >= 1 &&
                        std::min(x.size(last - 2), x.size(last - 1)) + 2 * pad >= k.size,
                    "direct_conv: the kernel is too large");
    a.stride = static_cast<int>(stride);
    a.up = 1;
    a.taps = static_cast<int>(k.size * k.size);
    a.oh = (a.h + 2 * pad - k.size) / stride + 1;
    a.ow = (a.w + 2 * pad - k.size) / stride + 1;
    for (int t = 0; t < a.taps; ++t) {
      a.tap_y[0][t] = t / static_cast<int>(k.size) - pad;
      a.tap_x[0][t] = t % static_cast<int>(k.size) - pad;
      from[0][t] = t;
    }
  }
  int64_t pixels = 1;
  for (int64_t i = 0; i < last; ++i) pixels *= x.size(i);
  a.images = a.h * a.w > 0 ? pixels / (a.h * a.w) : 0;
  a.x = input(x, "x", dtype, pixels * c1);
  a.x2 = x2.has_value() ? input(*x2, "x2", dtype, pixels * c2) : nullptr;
  std::vector<int64_t> shape = sizes_of(x);
  shape[last] = k.out;
  shape[last - 2] = a.oh * a.up;
  shape[last - 1] = a.ow * a.up;
  const int64_t outputs = a.images * a.oh * a.ow;
  a.residual = residual.has_value()
                   ? input(*residual, "residual", dtype, outputs * a.up * a.up * k.out)
                   : nullptr;
  std::vector<float> wide_bias;
  if (bias.has_value()) {
    wide_bias = padded(*bias, "bias", k.out, a.outp);
    a.bias = wide_bias.data();
  }
  Tensor y = empty(x, shape, dtype);
  a.y = y.mutable_data_ptr();
  if (outputs == 0) return y;
  a.depth = a.taps * (c1 + c2) / (pairs ? 2 : 1);
  // c1 and c2 decide where a pair or a source begins, so the form of a kept weight includes them.
  const int64_t form = (c1 << 12 | static_cast<int64_t>(pairs) << 11 |
                        static_cast<int64_t>(transposed) << 10 | 1 << 9)
                       << 20;
  const Tensor kept =
      packed_weights(weight, form, [&] { return weights_of(a, weight, k, from, pairs); });
  a.weights = kept.const_data_ptr();
  // 48 outputs are eight tiles of 6 rows, or six of 8. Use more if the weights come from an outer
  // cache, and fewer if there are few outputs.
  const int64_t share = ceil_div(outputs * a.up * a.up, 4 * torch::stable::get_num_threads());
  const int64_t wanted = a.depth * a.outp * 4 > (1 << 19) ? 192 : 48;
  a.block = static_cast<int>(std::clamp<int64_t>(ceil_div(share, 24) * 24, 24, wanted));
  a.items = ceil_div(outputs, a.block);
  const auto kernel = FASTVDM_PICK_BF16(direct_conv);
  torch::stable::parallel_for(0, a.items * a.up * a.up, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, scratch(direct_conv_scratch(a)));
  });
  return y;
}

}  // namespace

Tensor direct_conv(Tensor x, OptTensor x2, Tensor weight, OptTensor bias, OptTensor residual,
                   int64_t stride) {
  return run(x, x2, weight, bias, residual, stride, false);
}

Tensor direct_conv_transpose(Tensor x, Tensor weight, OptTensor bias, OptTensor residual) {
  return run(x, {}, weight, bias, residual, 2, true);
}

}  // namespace fastvdm
