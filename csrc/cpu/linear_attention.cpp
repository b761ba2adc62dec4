// Launchers of linear_attention; the contract is in fastvdm/ops/linear_attention.py.
#include "linear_attention.h"

#include <algorithm>

#include "launchers.h"

namespace fastvdm {
namespace {

LinearArgs make_args(const Tensor& qkv, double sm_scale) {
  STD_TORCH_CHECK(qkv.dim() == 7 && qkv.size(4) == 3,
                  "linear_attention: qkv must be (B, F, H, W, 3, heads, D)");
  const int64_t heads = qkv.size(5), d = qkv.size(6);
  STD_TORCH_CHECK(heads > 0 && d > 0 && d <= 1024 && heads < (1 << 20),
                  "linear_attention: head dim must be at most 1024, got ", d);
  LinearArgs a{};
  a.dtype = static_cast<int>(dtype_of(qkv));
  a.heads = static_cast<int>(heads);
  a.d = static_cast<int>(d);
  a.dp = (a.d + 15) / 16 * 16;
  a.frames = qkv.size(0) * qkv.size(1);
  a.pixels = qkv.size(2) * qkv.size(3);
  a.scale = static_cast<float>(sm_scale);
  a.qkv = input(qkv, "qkv", qkv.scalar_type(), qkv.numel());
  // All heads of a frame together read memory in order. There are fewer per item if there are too
  // few frames to share out. The result of a head does not depend on it.
  const int64_t wanted = 2 * torch::stable::get_num_threads();
  a.group = static_cast<int>(std::clamp<int64_t>(heads * a.frames / wanted, 1, heads));
  return a;
}

template <class Kernel>
void run(const LinearArgs& a, Kernel kernel) {
  torch::stable::parallel_for(
      0, a.frames * ceil_div(a.heads, a.group), 1, [&](int64_t begin, int64_t end) {
        kernel(a, begin, end, static_cast<float*>(scratch(linear_scratch(a) * sizeof(float))));
      });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(Tensor qkv, double sm_scale) {
  LinearArgs a = make_args(qkv, sm_scale);
  const int64_t b = qkv.size(0), f = qkv.size(1), heads = a.heads, d = a.d;
  Tensor out = empty(qkv, {b, f, qkv.size(2), qkv.size(3), heads, d}, qkv.scalar_type());
  Tensor lse = empty(qkv, {b, f, heads, d}, ScalarType::Float);
  Tensor ctx = empty(qkv, {b, f, heads, d, d}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.ctx = static_cast<float*>(ctx.mutable_data_ptr());
  if (out.numel() != 0) run(a, FASTVDM_PICK(linear_attention_fwd));
  return {out, lse, ctx};
}

Tensor linear_attention_bwd(Tensor dout, Tensor qkv, Tensor k_lse, Tensor ctx, double sm_scale) {
  LinearArgs a = make_args(qkv, sm_scale);
  const int64_t rows = a.frames * a.heads * a.d;
  a.dout = input(dout, "dout", qkv.scalar_type(), qkv.numel() / 3);
  input(k_lse, "k_lse", ScalarType::Float, rows);
  input(ctx, "ctx", ScalarType::Float, rows * a.d);
  a.lse = static_cast<float*>(k_lse.mutable_data_ptr());
  a.ctx = static_cast<float*>(ctx.mutable_data_ptr());
  Tensor dqkv = empty(qkv, sizes_of(qkv), qkv.scalar_type());
  a.dqkv = dqkv.mutable_data_ptr();
  if (qkv.numel() != 0) run(a, FASTVDM_PICK(linear_attention_bwd));
  return dqkv;
}

}  // namespace fastvdm
