// Launchers of linear_attention; the contract is in fastvdm/ops/linear_attention.py.
#include "linear_attention.h"

#include <algorithm>

#include "launchers.h"

namespace fastvdm {
namespace {

LinearArgs make_args(const Tensor& qkv, double sm_scale) {
  STD_TORCH_CHECK(qkv.dim() == 7 && qkv.size(4) == 3 && qkv.size(5) > 0 && qkv.size(6) > 0 &&
                      qkv.size(6) <= 1024 && qkv.size(5) < (1 << 20),
                  "linear_attention: qkv must be (B, F, H, W, 3, heads, D), D at most 1024");
  LinearArgs a{};
  a.dtype = static_cast<int>(dtype_of(qkv));
  a.heads = static_cast<int>(qkv.size(5));
  a.d = static_cast<int>(qkv.size(6));
  a.dp = (a.d + 15) / 16 * 16;
  a.frames = qkv.size(0) * qkv.size(1);
  a.pixels = qkv.size(2) * qkv.size(3);
  a.scale = static_cast<float>(sm_scale);
  a.qkv = input(qkv, "qkv", qkv.scalar_type(), qkv.numel());
  return a;
}

// All heads of a frame together read memory in order; fewer where frames are too few to share out.
// The result of a head does not depend on it.
int heads_per_item(const LinearArgs& a) {
  const int64_t wanted = 2 * torch::stable::get_num_threads();
  return static_cast<int>(std::clamp<int64_t>(a.heads * a.frames / wanted, 1, a.heads));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(Tensor qkv, double sm_scale) {
  LinearArgs a = make_args(qkv, sm_scale);
  const int64_t heads = a.heads, d = a.d;
  Tensor out = empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3), heads, d},
                     qkv.scalar_type());
  Tensor lse = empty(qkv, {qkv.size(0), qkv.size(1), heads, d}, ScalarType::Float);
  Tensor ctx = empty(qkv, {qkv.size(0), qkv.size(1), heads, d, d}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse, ctx};
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.ctx = static_cast<float*>(ctx.mutable_data_ptr());
  a.group = heads_per_item(a);
  const int64_t items = a.frames * ceil_div(heads, a.group);
  const auto kernel = FASTVDM_PICK(linear_attention_fwd);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(linear_scratch(a) * sizeof(float))));
  });
  return {out, lse, ctx};
}

Tensor linear_attention_bwd(Tensor dout, Tensor qkv, Tensor k_lse, Tensor ctx, double sm_scale) {
  LinearArgs a = make_args(qkv, sm_scale);
  a.dout = input(dout, "dout", qkv.scalar_type(), qkv.numel() / 3);
  const int64_t rows = a.frames * a.heads * a.d;
  a.lse = static_cast<float*>(const_cast<void*>(input(k_lse, "k_lse", ScalarType::Float, rows)));
  a.ctx =
      static_cast<float*>(const_cast<void*>(input(ctx, "ctx", ScalarType::Float, rows * a.d)));
  Tensor dqkv = empty(qkv, sizes_of(qkv), qkv.scalar_type());
  a.dqkv = dqkv.mutable_data_ptr();
  if (qkv.numel() == 0) return dqkv;
  a.group = heads_per_item(a);
  const auto kernel = FASTVDM_PICK(linear_attention_bwd);
  torch::stable::parallel_for(0, a.frames * ceil_div(a.heads, a.group), 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(linear_scratch(a) * sizeof(float))));
  });
  return dqkv;
}

}  // namespace fastvdm
