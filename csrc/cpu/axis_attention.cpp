// Launchers of axis_attention; the contract is in fastvdm/ops/axis_attention.py.
#include "axis_attention.h"

#include <algorithm>

#include "common/attention_options.h"
#include "launchers.h"

namespace fastvdm {
namespace {

constexpr int64_t kTime = 1;

// Strides of t (B, F, H, W, [3,] heads, D). The last axis is dense; consecutive pixels of (H, W)
// have one stride.
AxisStrides strides_of(const Tensor& t, int64_t axis, bool packed) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) == 1,
                  "axis_attention: the last axis must have stride 1");
  const int64_t h = t.size(2), w = t.size(3);
  STD_TORCH_CHECK(h <= 1 || w <= 1 || t.stride(2) == w * t.stride(3),
                  "axis_attention: pixels must walk with one stride");
  const int64_t pixel = w > 1 ? t.stride(3) : h > 1 ? t.stride(2) : 0;
  AxisStrides s{};
  s.batch = t.stride(0);
  s.outer = axis == kTime ? pixel : t.stride(1);
  s.seq = axis == kTime ? t.stride(1) : pixel;
  s.three = packed ? t.stride(4) : 0;
  s.head = t.stride(packed ? 5 : 4);
  return s;
}

AxisStrides dense(int64_t frames, int64_t pixels, int64_t row, int64_t inner, int64_t d,
                  int64_t axis) {
  AxisStrides s{};
  s.batch = frames * pixels * row;
  s.outer = axis == kTime ? row : pixels * row;
  s.seq = axis == kTime ? pixels * row : row;
  s.three = inner;
  s.head = d;
  return s;
}

struct Plan {
  AxisArgs a{};
  AttnOptions options;
  int64_t frames = 0, heads = 0, d = 0;
};

void make_plan(Plan& plan, const Tensor& qkv, int64_t axis, const OptTensor& bias,
               const OptTensor& rel_k, const OptTensor& rel_v, const OptTensor& rotary,
               const OptTensor& focus_mask, int64_t num_images, double sm_scale) {
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 7 && qkv.size(4) == 3,
                  "axis_attention: qkv must be (B, F, H, W, 3, heads, D) on the CPU");
  STD_TORCH_CHECK(axis == 1 || axis == 2, "axis_attention: axis must be 1 (time) or 2 (space)");
  AxisArgs& a = plan.a;
  const int64_t pixels = qkv.size(2) * qkv.size(3);
  plan.heads = qkv.size(5);
  plan.d = qkv.size(6);
  plan.frames = axis == kTime ? qkv.size(1) : pixels;
  plan.options = attention_options(plan.heads, plan.d, plan.frames, num_images, sm_scale, bias,
                                   rel_k, rel_v, rotary);
  a.t = plan.options.t;
  a.dtype = static_cast<int>(dtype_of(qkv));
  a.batch = qkv.size(0);
  a.outer = axis == kTime ? pixels : qkv.size(1);
  a.frames = plan.frames;
  a.qkv = qkv.const_data_ptr();
  a.in = strides_of(qkv, axis, true);
  const int64_t inner = plan.heads * plan.d;
  a.dense_out = dense(qkv.size(1), pixels, inner, 0, plan.d, axis);
  a.dense_qkv = dense(qkv.size(1), pixels, 3 * inner, inner, plan.d, axis);
  if (focus_mask.has_value())
    a.focus =
        static_cast<const uint8_t*>(input(*focus_mask, "focus_mask", ScalarType::Bool, a.batch));
}

}  // namespace

std::tuple<Tensor, Tensor> axis_attention_fwd(Tensor qkv, int64_t axis, OptTensor bias,
                                              OptTensor rel_k, OptTensor rel_v, OptTensor rotary,
                                              OptTensor focus_mask, int64_t num_images,
                                              double sm_scale) {
  Plan plan;
  make_plan(plan, qkv, axis, bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale);
  AxisArgs& a = plan.a;
  Tensor out = empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3), plan.heads, plan.d},
                     qkv.scalar_type());
  Tensor lse = empty(qkv, {0}, ScalarType::Float);  // the backward computes the softmax again
  a.out = out.mutable_data_ptr();
  if (out.numel() == 0) return {out, lse};

  // Short sequences take all heads at once, because their rows are adjacent in memory.
  const int64_t sequence = static_cast<int64_t>(a.t.np) * a.t.dp;
  a.group = static_cast<int>(
      std::clamp<int64_t>((128 << 10) / (4 * std::max<int64_t>(sequence, 1)), 1, plan.heads));
  const int64_t sequences = a.batch * a.outer;
  a.parts = std::min<int64_t>(sequences, 256);
  a.scratch = 5 * a.group * sequence + attention_work(a.t);
  const int64_t items = a.parts * ceil_div(plan.heads, a.group);
  const auto kernel = FASTVDM_PICK(axis_attention_fwd);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(a.scratch * sizeof(float))));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> axis_attention_bwd(
    Tensor dout, Tensor qkv, Tensor, Tensor, int64_t axis, OptTensor bias, OptTensor rel_k,
    OptTensor rel_v, OptTensor rotary, OptTensor focus_mask, int64_t num_images, double sm_scale,
    bool need_dqkv, bool need_dbias, bool need_drel_k, bool need_drel_v) {
  Plan plan;
  make_plan(plan, qkv, axis, bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale);
  AxisArgs& a = plan.a;
  STD_TORCH_CHECK(dout.is_cpu() && dout.dim() == 6 && dout.scalar_type() == qkv.scalar_type() &&
                      dout.numel() * 3 == qkv.numel(),
                  "axis_attention_bwd: dout must be (B, F, H, W, heads, D) in the type of qkv");
  a.dout = dout.const_data_ptr();
  a.grad_out = strides_of(dout, axis, false);
  Tensor dqkv = empty(qkv, need_dqkv ? sizes_of(qkv) : std::vector<int64_t>{0}, qkv.scalar_type());
  a.dqkv = need_dqkv ? dqkv.mutable_data_ptr() : nullptr;

  const int64_t sequences = a.batch * a.outer;
  const bool table = (need_dbias && bias.has_value()) || need_drel_k || need_drel_v;
  a.parts = std::min<int64_t>(sequences, 64);
  if (table) {  // at most about 64 MB of partial sums
    const int64_t words = plan.heads * (static_cast<int64_t>(a.t.n) * a.t.np +
                                        (a.t.rel_k_length + a.t.rel_v_length) * a.t.dp);
    a.parts = std::min(a.parts, std::max<int64_t>(1, (16 << 20) / std::max<int64_t>(words, 1)));
  }
  a.parts = std::max<int64_t>(a.parts, 1);
  // A shared Shaw table is summed over the heads, so all of them belong to one item.
  const bool shared =
      (need_drel_k && a.t.rel_k_heads == 1) || (need_drel_v && a.t.rel_v_heads == 1);
  a.group = shared ? static_cast<int>(plan.heads) : 1;
  AttnPartials partials(a.t, a.parts, need_dbias && bias.has_value(),
                        need_drel_k && rel_k.has_value(), need_drel_v && rel_v.has_value());
  std::vector<AttnGrads> grads(a.parts);
  for (int64_t i = 0; i < a.parts; ++i) grads[i] = partials.part(i);
  a.grads = table ? grads.data() : nullptr;
  a.scratch = 8 * static_cast<int64_t>(a.t.np) * a.t.dp + attention_work(a.t);
  const int64_t items =
      sequences > 0 && dout.numel() > 0 ? a.parts * ceil_div(plan.heads, a.group) : 0;
  const auto kernel = FASTVDM_PICK(axis_attention_bwd);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(a.scratch * sizeof(float))));
  });
  const OptTensor no;
  return {dqkv, partials.bias(a.t, need_dbias ? bias : no, plan.frames, qkv),
          partials.rel_k(a.t, need_drel_k ? rel_k : no, qkv),
          partials.rel_v(a.t, need_drel_v ? rel_v : no, qkv)};
}

}  // namespace fastvdm
