// Launchers of linear attention with its projection; the contract is in
// fastvdm/ops/linear_attention_projected.py. Frames go through in chunks whose q, k and v stay in
// the outer cache: the library projects a chunk, our kernel reads it while it is there.
#include <algorithm>
#include <array>

#include "launchers.h"
#include "linear_attention.h"

namespace fastvdm {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

constexpr int64_t kChunkBytes = 8 << 20;

// out = a b, by the library or, for 16-bit types that the CPU lacks, by our own product. All
// matrices; out contiguous.
void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  const ScalarType dtype = a.scalar_type();
  const bool narrow_type = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (narrow_type && !cpu_has_native(dtype == ScalarType::BFloat16)) {
    linear_into(a, b, out);
    return;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that was returned
}

struct Shape {
  int64_t frames, pixels, channels, heads, d, features;  // features: 3 heads d
  int64_t chunk;                                          // frames that go through together
};

Shape shape_of(const Tensor& x, const Tensor& weight, int64_t heads) {
  STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 2 && weight.size(1) == x.size(4) && heads > 0 &&
                      weight.size(0) > 0 && weight.size(0) % (3 * heads) == 0 &&
                      weight.scalar_type() == x.scalar_type(),
                  "linear_attention: x must be (B, F, H, W, C) and weight (3 heads D, C), in one "
                  "type");
  input(x, "x", x.scalar_type(), x.numel());
  input(weight, "weight", x.scalar_type(), weight.numel());
  Shape s{};
  s.frames = x.size(0) * x.size(1), s.pixels = x.size(2) * x.size(3), s.channels = x.size(4);
  s.heads = heads, s.features = weight.size(0), s.d = s.features / (3 * heads);
  const int64_t bytes = std::max<int64_t>(1, s.pixels * s.features * x.element_size());
  const int64_t busy = ceil_div(2 * torch::stable::get_num_threads(), heads);  // work for everyone
  s.chunk = std::clamp<int64_t>(std::max(kChunkBytes / bytes, busy), 1, std::max<int64_t>(1, s.frames));
  return s;
}

// Rows of `frames` frames from `first` of a (rows, columns) matrix.
Tensor rows_of(const Tensor& t, const Shape& s, int64_t first, int64_t frames) {
  Tensor from = t;
  return narrow(from, 0, first * s.pixels, frames * s.pixels);
}

Tensor matrix(const Tensor& t, int64_t columns) {
  return torch::stable::view(t, std::vector<int64_t>{t.numel() / columns, columns});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_attention_projected_fwd(Tensor x, Tensor weight,
                                                                  int64_t heads, double sm_scale) {
  const Shape s = shape_of(x, weight, heads);
  const int64_t b = x.size(0), f = x.size(1);
  const ScalarType dtype = x.scalar_type();
  Tensor out = empty(x, {b, f, x.size(2), x.size(3), heads, s.d}, dtype);
  Tensor lse = empty(x, {b, f, heads, s.d}, ScalarType::Float);
  Tensor ctx = empty(x, {b, f, heads, s.d, s.d}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse, ctx};
  Tensor buffer = empty(x, {s.chunk * s.pixels, s.features}, dtype);
  Tensor flat = matrix(x, s.channels), across = transpose(weight, 0, 1);
  for (int64_t first = 0; first < s.frames; first += s.chunk) {
    const int64_t n = std::min(s.chunk, s.frames - first);
    Tensor part = rows_of(buffer, s, 0, n);
    product(rows_of(flat, s, first, n), across, part);
    linear_attention_frames(part, s.pixels, n, first, heads, s.d, sm_scale, out, lse, ctx);
  }
  return {out, lse, ctx};
}

std::tuple<Tensor, Tensor> linear_attention_projected_bwd(Tensor dout, Tensor x, Tensor weight,
                                                          Tensor lse, Tensor ctx, int64_t heads,
                                                          double sm_scale, bool need_dx,
                                                          bool need_dweight) {
  const Shape s = shape_of(x, weight, heads);
  const ScalarType dtype = x.scalar_type();
  const bool native = dtype == ScalarType::Float || cpu_has_native(dtype == ScalarType::BFloat16);
  const ScalarType wide = native ? dtype : ScalarType::Float;  // of the weight's products
  input(dout, "dout", dtype, s.frames * s.pixels * s.features / 3);
  input(lse, "lse", ScalarType::Float, s.frames * heads * s.d);
  input(ctx, "ctx", ScalarType::Float, s.frames * heads * s.d * s.d);
  Tensor dx = empty(x, need_dx ? sizes_of(x) : std::vector<int64_t>{0}, dtype);
  std::vector<double> sum(need_dweight ? weight.numel() : 0, 0.0);
  if (x.numel() != 0) {
    Tensor buffer = empty(x, {s.chunk * s.pixels, s.features}, dtype);
    Tensor gradient = empty(x, {s.chunk * s.pixels, s.features}, dtype);
    Tensor dw = empty(x, {s.features, need_dweight ? s.channels : 0}, wide);
    Tensor flat = matrix(x, s.channels), across = transpose(weight, 0, 1);
    Tensor flat_dx = need_dx ? matrix(dx, s.channels) : dx;
    for (int64_t first = 0; first < s.frames; first += s.chunk) {
      const int64_t n = std::min(s.chunk, s.frames - first);
      Tensor xs = rows_of(flat, s, first, n);
      Tensor qkv = rows_of(buffer, s, 0, n), dqkv = rows_of(gradient, s, 0, n);
      product(xs, across, qkv);
      linear_attention_frames_bwd(dout, qkv, s.pixels, n, first, heads, s.d, sm_scale, lse, ctx,
                                  dqkv);
      if (need_dx) product(dqkv, weight, rows_of(flat_dx, s, first, n));
      if (!need_dweight) continue;
      if (!native) {
        product(transpose(torch::stable::to(dqkv, wide), 0, 1), torch::stable::to(xs, wide), dw);
      } else {
        product(transpose(dqkv, 0, 1), xs, dw);
      }
      const std::vector<float> found = floats(dw, "dw", dw.numel());
      for (size_t i = 0; i < found.size(); ++i) sum[i] += found[i];
    }
  }
  Tensor dweight = need_dweight ? from_doubles(sum, weight) : empty(x, {0}, dtype);
  return {dx, dweight};
}

}  // namespace fastvdm
