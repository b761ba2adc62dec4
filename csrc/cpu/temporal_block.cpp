// Launchers of temporal_block; the contract is in fastvdm/ops/temporal_block.py.
#include "temporal_block.h"

#include <algorithm>
#include <cmath>

#include "common/attention_options.h"
#include "common/pack_tiles.h"
#include "common/packed_form.h"
#include "common/partial_sums.h"

namespace fastvdm {
namespace {

constexpr int64_t kTileRows = 64;  // rows of xn for which L1 holds q, k, v, o of one head

struct Plan {
  BlockArgs a{};
  AttnOptions options;
  int64_t heads = 0, d = 0;
  std::vector<float> norm_weight, norm_bias, qkv_bias, out_bias;
  std::optional<PackedForms> forms;
};

// Weights in fp32, one panel per head.
void make_panels(Plan& plan, const Tensor& qkv_weight, const Tensor& out_weight, bool backward) {
  BlockArgs& a = plan.a;
  const int64_t heads = plan.heads, d = plan.d, C = a.channels, cp = a.cp, dp = a.t.dp;
  const int64_t inner = heads * d;
  const auto of_qkv = [&](const auto& copy) {  // copy(panel, its rows of the weight)
    const std::vector<float> raw = floats(qkv_weight, "qkv_weight", 3 * inner * C);
    torch::stable::parallel_for(0, 3 * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) copy(i, raw.data() + (i % 3 * heads + i / 3) * d * C);
    });
  };
  const auto of_out = [&](const auto& copy) {  // copy(head, channel, its features)
    const std::vector<float> raw = floats(out_weight, "out_weight", inner * C);
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t k = 0; k < C; ++k) copy(h, k, raw.data() + k * inner + h * d);
    });
  };
  a.qkv_t = plan.forms->get<float>(qkv_weight, kTemporalQkvT, heads * 3 * C * dp, [&](float* to) {
    of_qkv([&](int64_t i, const float* from) {
      for (int64_t k = 0; k < C; ++k)
        for (int64_t c = 0; c < d; ++c) to[(i * C + k) * dp + c] = from[c * C + k];
    });
  });
  a.out_t = plan.forms->get<float>(out_weight, kTemporalOutT, heads * dp * cp, [&](float* to) {
    of_out([&](int64_t h, int64_t k, const float* from) {
      for (int64_t c = 0; c < d; ++c) to[(h * dp + c) * cp + k] = from[c];
    });
  });
  if (!backward) return;
  a.qkv = plan.forms->get<float>(qkv_weight, kTemporalQkv, heads * 3 * dp * cp, [&](float* to) {
    of_qkv([&](int64_t i, const float* from) {
      for (int64_t c = 0; c < d; ++c) std::copy_n(from + c * C, C, to + (i * dp + c) * cp);
    });
  });
  a.out = plan.forms->get<float>(out_weight, kTemporalOut, heads * C * dp, [&](float* to) {
    of_out([&](int64_t h, int64_t k, const float* from) {
      std::copy_n(from, d, to + (h * C + k) * dp);
    });
  });
}

// The same weights for bf16 products.
void make_tiles(Plan& plan, const Tensor& qkv_weight, const Tensor& out_weight, bool backward) {
  BlockArgs& a = plan.a;
  const int64_t heads = plan.heads, d = plan.d, C = a.channels, cp = a.cp, dp = a.t.dp;
  const int64_t kp = round_up(C, 32), dk = round_up(dp, 32), panel = kp * dp, inner = heads * d;
  a.kp = static_cast<int>(kp);
  a.dk = static_cast<int>(dk);
  // value(w, h, k, n): feature n of head h of q, k or v (w) for channel k.
  const auto qkv = [&](const std::vector<float>& raw, int64_t w, int64_t h, int64_t c, int64_t k) {
    return c < d && k < C ? raw[((w * heads + h) * d + c) * C + k] : 0.f;
  };
  const auto out = [&](const std::vector<float>& raw, int64_t h, int64_t c, int64_t k) {
    return c < d && k < C ? raw[k * inner + h * d + c] : 0.f;
  };
  const auto each = [](int64_t count, const auto& body) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  };
  const auto qkv_weights = [&] { return floats(qkv_weight, "qkv_weight", 3 * inner * C); };
  const auto out_weights = [&] { return floats(out_weight, "out_weight", inner * C); };
  a.qkv_tiles = plan.forms->get<uint16_t>(
      qkv_weight, kTemporalQkvTiles, heads * 3 * panel, [&](uint16_t* to) {
        const std::vector<float> raw = qkv_weights();
        each(3 * heads, [&](int64_t i) {
          pack_tiles(kp, dp, to + i * panel,
                     [&](int64_t k, int64_t n) { return qkv(raw, i % 3, i / 3, n, k); });
        });
      });
  // k runs over all heads (and q, k, v) here, so the columns are divided among threads.
  a.out_tiles =
      plan.forms->get<uint16_t>(out_weight, kTemporalOutTiles, heads * dk * cp, [&](uint16_t* to) {
        const std::vector<float> raw = out_weights();
        each(cp / 16, [&](int64_t i) {
          pack_tiles(heads * dk, 16, to + i * heads * dk * 16,
                     [&](int64_t k, int64_t n) { return out(raw, k / dk, k % dk, i * 16 + n); });
        });
      });
  if (!backward) return;
  a.dout_tiles =
      plan.forms->get<uint16_t>(out_weight, kTemporalDoutTiles, heads * panel, [&](uint16_t* to) {
        const std::vector<float> raw = out_weights();
        each(heads, [&](int64_t h) {
          pack_tiles(kp, dp, to + h * panel,
                     [&](int64_t k, int64_t n) { return out(raw, h, n, k); });
        });
      });
  a.dqkv_tiles = plan.forms->get<uint16_t>(
      qkv_weight, kTemporalDqkvTiles, heads * 3 * dk * cp, [&](uint16_t* to) {
        const std::vector<float> raw = qkv_weights();
        each(cp / 16, [&](int64_t i) {
          pack_tiles(3 * heads * dk, 16, to + i * 3 * heads * dk * 16, [&](int64_t k, int64_t n) {
            const int64_t part = k / dk;
            return qkv(raw, part % 3, part / 3, k % dk, i * 16 + n);
          });
        });
      });
}

void make_plan(Plan& plan, const Tensor& x, const Tensor& norm_weight, const OptTensor& norm_bias,
               const Tensor& qkv_weight, const OptTensor& qkv_bias, const Tensor& out_weight,
               const OptTensor& out_bias, int64_t heads, double eps, const OptTensor& bias,
               const OptTensor& rel_k, const OptTensor& rel_v, const OptTensor& rotary,
               const OptTensor& focus_mask, int64_t num_images, bool backward) {
  STD_TORCH_CHECK(x.dim() == 5 && qkv_weight.dim() == 2 && out_weight.dim() == 2,
                  "temporal_block: x must be (B, F, H, W, C), the weights matrices");
  BlockArgs& a = plan.a;
  const int64_t C = x.size(4), rows3 = qkv_weight.size(0);
  STD_TORCH_CHECK(heads > 0 && rows3 > 0 && rows3 % (3 * heads) == 0 && C > 0 && C < (1 << 24),
                  "temporal_block: qkv_weight must be (3 * heads * D, C)");
  STD_TORCH_CHECK(
      (!rel_k.has_value() && !rel_v.has_value()) || (!rotary.has_value() && !bias.has_value()),
      "temporal_block: no Shaw tables beside a rotary embedding or a bias");
  plan.heads = heads;
  const int64_t d = plan.d = rows3 / (3 * heads), frames = x.size(1), inner = heads * d;
  const double scale = std::pow(static_cast<double>(d), -0.5);
  plan.options = attention_options(heads, d, frames, num_images, scale, bias, rel_k, rel_v, rotary);
  a.t = plan.options.t;
  a.dtype = static_cast<int>(dtype_of(x));
  a.x = input(x, "x", x.scalar_type(), x.numel());
  a.channels = static_cast<int>(C);
  const int64_t cp = round_up(C, 16), dp = a.t.dp;
  a.cp = static_cast<int>(cp);
  a.eps = static_cast<float>(eps);
  a.batch = x.size(0);
  a.frames = frames;
  a.hw = x.size(2) * x.size(3);
  a.pixels = static_cast<int>(
      std::clamp<int64_t>(kTileRows / std::max<int64_t>(frames, 1), 1, std::max<int64_t>(a.hw, 1)));
  a.tiles_a_video = ceil_div(a.hw, a.pixels);
  a.tiles = a.batch * a.tiles_a_video;
  if (focus_mask.has_value())
    a.focus =
        static_cast<const uint8_t*>(input(*focus_mask, "focus_mask", ScalarType::Bool, a.batch));

  plan.norm_weight = padded(norm_weight, "norm_weight", C, cp);
  a.norm_weight = plan.norm_weight.data();
  if (norm_bias.has_value()) {
    plan.norm_bias = padded(*norm_bias, "norm_bias", C, cp);
    a.norm_bias = plan.norm_bias.data();
  }
  if (out_bias.has_value()) {
    plan.out_bias = padded(*out_bias, "out_bias", C, cp);
    a.out_bias = plan.out_bias.data();
  }
  if (qkv_bias.has_value()) {
    const std::vector<float> raw = floats(*qkv_bias, "qkv_bias", 3 * inner);
    plan.qkv_bias.assign(heads * 3 * dp, 0.f);
    for (int64_t w = 0; w < 3; ++w)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t c = 0; c < d; ++c)
          plan.qkv_bias[(h * 3 + w) * dp + c] = raw[(w * heads + h) * d + c];
    a.qkv_bias = plan.qkv_bias.data();
  }

  plan.forms.emplace(heads);
  STD_TORCH_CHECK(qkv_weight.size(1) == C && out_weight.size(0) == C && out_weight.size(1) == inner,
                  "temporal_block: the weights do not fit x");
  if (isa() >= Isa::avx512_bf16 && x.scalar_type() == ScalarType::BFloat16)
    make_tiles(plan, qkv_weight, out_weight, backward);
  else
    make_panels(plan, qkv_weight, out_weight, backward);
}

}  // namespace

Tensor temporal_block_fwd(Tensor x, Tensor norm_weight, OptTensor norm_bias, Tensor qkv_weight,
                          OptTensor qkv_bias, Tensor out_weight, OptTensor out_bias, int64_t heads,
                          double eps, OptTensor bias, OptTensor rel_k, OptTensor rel_v,
                          OptTensor rotary, OptTensor focus_mask, int64_t num_images) {
  Plan plan;
  make_plan(plan, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
            bias, rel_k, rel_v, rotary, focus_mask, num_images, false);
  BlockArgs& a = plan.a;
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  a.y = y.mutable_data_ptr();
  if (x.numel() == 0) return y;
  a.parts = a.tiles;
  const int64_t words = block_scratch(a, false);
  const auto kernel = FASTVDM_PICK_BF16(temporal_block_fwd);
  torch::stable::parallel_for(0, a.parts, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(words * sizeof(float))));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
temporal_block_bwd(Tensor dy, Tensor x, Tensor norm_weight, OptTensor norm_bias, Tensor qkv_weight,
                   OptTensor qkv_bias, Tensor out_weight, OptTensor out_bias, int64_t heads,
                   double eps, OptTensor bias, OptTensor rel_k, OptTensor rel_v, OptTensor rotary,
                   OptTensor focus_mask, int64_t num_images, bool need_norm, bool need_qkv,
                   bool need_out, bool need_bias, bool need_rel) {
  Plan plan;
  make_plan(plan, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
            bias, rel_k, rel_v, rotary, focus_mask, num_images, true);
  BlockArgs& a = plan.a;
  a.dy = input(dy, "dy", x.scalar_type(), x.numel());
  Tensor dx = empty(x, sizes_of(x), x.scalar_type());
  a.y = dx.mutable_data_ptr();
  const int64_t C = a.channels, cp = a.cp, dp = a.t.dp, d = plan.d, inner = heads * d;

  const int64_t panel = heads * dp * cp;
  const int64_t tables = need_bias || need_rel ? heads * static_cast<int64_t>(a.t.n) * a.t.np : 0;
  const int64_t words =
      (need_qkv ? 3 * panel : 0) + (need_out ? panel : 0) + (need_norm ? cp : 0) + tables;
  a.parts = parts_of_sums(x.numel() == 0 ? 0 : a.tiles, a.batch * a.frames * a.hw, words);
  const auto sums = [&](int64_t size, bool wanted) {
    return PartialSums(x, a.parts, size, wanted);
  };
  const PartialSums dnw = sums(cp, need_norm), dnb = sums(cp, need_norm && norm_bias.has_value());
  const PartialSums dqkv = sums(3 * panel, need_qkv), dout = sums(panel, need_out);
  const PartialSums dqb = sums(heads * 3 * dp, need_qkv && qkv_bias.has_value());
  const PartialSums dob = sums(cp, need_out && out_bias.has_value());
  AttnPartials attn(a.t, a.parts, need_bias && bias.has_value(), need_rel && rel_k.has_value(),
                    need_rel && rel_v.has_value());
  std::vector<BlockGrads> grads(a.parts);
  for (int64_t i = 0; i < a.parts; ++i)
    grads[i] = {dnw.part(i),  dnb.part(i), dqkv.part(i), dqb.part(i),
                dout.part(i), dob.part(i), attn.part(i)};
  a.grads = grads.data();
  const int64_t scratch_words = block_scratch(a, true);
  const auto kernel = FASTVDM_PICK_BF16(temporal_block_bwd);
  torch::stable::parallel_for(0, a.parts, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(scratch_words * sizeof(float))));
  });

  const auto none = [&] { return empty(x, {0}, x.scalar_type()); };
  const auto channels = [&](const PartialSums& sums, const OptTensor& like, bool need) {
    return need && like.has_value() ? sums.sum(*like) : none();
  };
  // Row (h, which, c) of the sums is row (which, h, c) of the weight.
  const auto feature = [&](int64_t part, int64_t c) {
    return (part % 3 * heads + part / 3) * d + c;
  };
  Tensor dqkv_weight = none(), dqkv_bias = none(), dout_weight = none();
  if (need_qkv) {
    Values w(qkv_weight);
    dqkv.each_row(cp, [&](int64_t row, const double* sums) {
      if (row % dp < d) w.put(feature(row / dp, row % dp) * C, 1, sums, C);
    });
    dqkv_weight = w.tensor();
  }
  if (need_qkv && qkv_bias.has_value()) {
    Values b(*qkv_bias);
    dqb.each_row(dp,
                 [&](int64_t part, const double* sums) { b.put(feature(part, 0), 1, sums, d); });
    dqkv_bias = b.tensor();
  }
  if (need_out) {
    Values w(out_weight);
    dout.each_row(cp, [&](int64_t row, const double* sums) {
      if (row % dp < d) w.put(row / dp * d + row % dp, inner, sums, C);
    });
    dout_weight = w.tensor();
  }
  const OptTensor no;
  return {dx,
          channels(dnw, norm_weight, need_norm),
          channels(dnb, norm_bias, need_norm),
          dqkv_weight,
          dqkv_bias,
          dout_weight,
          channels(dob, out_bias, need_out),
          attn.bias(a.t, need_bias ? bias : no, x.size(1), x),
          attn.rel_k(a.t, need_rel ? rel_k : no, x),
          attn.rel_v(a.t, need_rel ? rel_v : no, x)};
}

}  // namespace fastvdm
