// Launchers of linear_attention; the contract is in fastvdm/ops/linear_attention.py.
#include "linear_attention.h"

#include <algorithm>

#include "launchers.h"

namespace fastvdm {
namespace {

LinearArgs make_args(const Tensor& qkv, int64_t pixels, int64_t frames, int64_t heads, int64_t d,
                     double sm_scale) {
  STD_TORCH_CHECK(heads > 0 && d > 0 && d <= 1024 && heads < (1 << 20),
                  "linear_attention: head dim must be at most 1024, got ", d);
  LinearArgs a{};
  a.dtype = static_cast<int>(dtype_of(qkv));
  a.heads = static_cast<int>(heads);
  a.d = static_cast<int>(d);
  a.dp = (a.d + 15) / 16 * 16;
  a.frames = frames;
  a.pixels = pixels;
  a.scale = static_cast<float>(sm_scale);
  a.qkv = input(qkv, "qkv", qkv.scalar_type(), frames * pixels * 3 * heads * d);
  // All heads of a frame together read memory in order; fewer where frames are too few to share
  // out. The result of a head does not depend on it.
  const int64_t wanted = 2 * torch::stable::get_num_threads();
  a.group = static_cast<int>(std::clamp<int64_t>(heads * frames / wanted, 1, heads));
  return a;
}

char* skip(const Tensor& t, int64_t elements) {
  return static_cast<char*>(t.mutable_data_ptr()) + elements * t.element_size();
}

template <class Kernel>
void run(const LinearArgs& a, Kernel kernel) {
  torch::stable::parallel_for(
      0, a.frames * ceil_div(a.heads, a.group), 1, [&](int64_t begin, int64_t end) {
        kernel(a, begin, end, static_cast<float*>(scratch(linear_scratch(a) * sizeof(float))));
      });
}

void check_packed(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 7 && qkv.size(4) == 3,
                  "linear_attention: qkv must be (B, F, H, W, 3, heads, D)");
}

}  // namespace

void linear_attention_frames(const Tensor& qkv, int64_t pixels, int64_t frames, int64_t first,
                             int64_t heads, int64_t d, double sm_scale, const Tensor& out,
                             const Tensor& lse, const Tensor& ctx) {
  LinearArgs a = make_args(qkv, pixels, frames, heads, d, sm_scale);
  a.out = skip(out, first * pixels * heads * d);
  a.lse = reinterpret_cast<float*>(skip(lse, first * heads * d));
  a.ctx = reinterpret_cast<float*>(skip(ctx, first * heads * d * d));
  run(a, FASTVDM_PICK(linear_attention_fwd));
}

void linear_attention_frames_bwd(const Tensor& dout, const Tensor& qkv, int64_t pixels,
                                 int64_t frames, int64_t first, int64_t heads, int64_t d,
                                 double sm_scale, const Tensor& lse, const Tensor& ctx,
                                 const Tensor& dqkv) {
  LinearArgs a = make_args(qkv, pixels, frames, heads, d, sm_scale);
  a.dout = skip(dout, first * pixels * heads * d);
  a.lse = reinterpret_cast<float*>(skip(lse, first * heads * d));
  a.ctx = reinterpret_cast<float*>(skip(ctx, first * heads * d * d));
  a.dqkv = dqkv.mutable_data_ptr();
  run(a, FASTVDM_PICK(linear_attention_bwd));
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(Tensor qkv, double sm_scale) {
  check_packed(qkv);
  const int64_t b = qkv.size(0), f = qkv.size(1), heads = qkv.size(5), d = qkv.size(6);
  const int64_t pixels = qkv.size(2) * qkv.size(3);
  Tensor out = empty(qkv, {b, f, qkv.size(2), qkv.size(3), heads, d}, qkv.scalar_type());
  Tensor lse = empty(qkv, {b, f, heads, d}, ScalarType::Float);
  Tensor ctx = empty(qkv, {b, f, heads, d, d}, ScalarType::Float);
  if (out.numel() != 0)
    linear_attention_frames(qkv, pixels, b * f, 0, heads, d, sm_scale, out, lse, ctx);
  return {out, lse, ctx};
}

Tensor linear_attention_bwd(Tensor dout, Tensor qkv, Tensor k_lse, Tensor ctx, double sm_scale) {
  check_packed(qkv);
  const int64_t frames = qkv.size(0) * qkv.size(1), pixels = qkv.size(2) * qkv.size(3);
  const int64_t heads = qkv.size(5), d = qkv.size(6);
  input(dout, "dout", qkv.scalar_type(), qkv.numel() / 3);
  input(k_lse, "k_lse", ScalarType::Float, frames * heads * d);
  input(ctx, "ctx", ScalarType::Float, frames * heads * d * d);
  Tensor dqkv = empty(qkv, sizes_of(qkv), qkv.scalar_type());
  if (qkv.numel() != 0)
    linear_attention_frames_bwd(dout, qkv, pixels, frames, 0, heads, d, sm_scale, k_lse, ctx, dqkv);
  return dqkv;
}

}  // namespace fastvdm
