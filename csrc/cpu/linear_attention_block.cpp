// Launchers of linear_attention_block; the contract is in fastvdm/ops/linear_attention_block.py.
// Frames are processed in chunks, to bound the memory of their matrices.
#include "linear_attention_block.h"

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/packed_form.h"
#include "common/partial_sums.h"

namespace fastvdm {
namespace {

constexpr int64_t kFrameBytes = 64 << 20;  // for the matrices of one chunk

struct Plan {
  LinearBlockArgs a{};
  int64_t inner = 0, all_frames = 0;
  std::vector<float> norm_weight, norm_bias, out_bias;
  std::optional<PackedForms> forms;
  std::optional<Tensor> frames;  // the matrices of a chunk of frames
};

uint16_t bits(float x) { return c10::BFloat16(x).x; }

// Weights in fp32, in panels of one head each.
void make_panels(Plan& plan, const Tensor& qkv_weight, const Tensor& out_weight, bool backward) {
  LinearBlockArgs& a = plan.a;
  const int64_t heads = a.heads, d = a.d, dp = a.dp, C = a.channels, cp = a.cp;
  const int64_t inner = plan.inner, panel = linear_block_panel(a);
  const auto each = [&](const auto& body) {  // body(head, feature in the head)
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t c = 0; c < d; ++c) body(h, c);
    });
  };
  const auto qkv_weights = [&] { return floats(qkv_weight, "qkv_weight", 3 * inner * C); };
  const auto out_weights = [&] { return floats(out_weight, "out_weight", inner * C); };
  PackedForms& forms = *plan.forms;
  a.qk = forms.get<float>(qkv_weight, kLinearQk, 2 * heads * panel, [&](float* to) {
    const std::vector<float> raw = qkv_weights();
    each([&](int64_t h, int64_t c) {
      for (int64_t which = 0; which < 2; ++which)
        std::copy_n(raw.data() + (which * inner + h * d + c) * C, C,
                    to + ((which * heads + h) * dp + c) * cp);
    });
  });
  a.v_t = forms.get<float>(qkv_weight, kLinearVT, heads * C * dp, [&](float* to) {
    const std::vector<float> raw = qkv_weights();
    each([&](int64_t h, int64_t c) {
      const float* from = raw.data() + (2 * inner + h * d + c) * C;
      for (int64_t k = 0; k < C; ++k) to[(h * C + k) * dp + c] = from[k];
    });
  });
  a.out = forms.get<float>(out_weight, kLinearOut, heads * panel, [&](float* to) {
    const std::vector<float> raw = out_weights();
    each([&](int64_t h, int64_t c) {
      for (int64_t k = 0; k < C; ++k) to[(h * dp + c) * cp + k] = raw[k * inner + h * d + c];
    });
  });
  if (!backward) return;
  a.v = forms.get<float>(qkv_weight, kLinearV, heads * panel, [&](float* to) {
    const std::vector<float> raw = qkv_weights();
    each([&](int64_t h, int64_t c) {
      std::copy_n(raw.data() + (2 * inner + h * d + c) * C, C, to + (h * dp + c) * cp);
    });
  });
  a.out_t = forms.get<float>(out_weight, kLinearOutT, heads * C * dp, [&](float* to) {
    const std::vector<float> raw = out_weights();
    each([&](int64_t h, int64_t c) {
      for (int64_t k = 0; k < C; ++k) to[(h * C + k) * dp + c] = raw[k * inner + h * d + c];
    });
  });
}

// The projections of q and k as operands of bf16 products; `plan` already has them in fp32.
void make_tiles(Plan& plan, const Tensor& qkv_weight, bool backward) {
  LinearBlockArgs& a = plan.a;
  const int64_t kp = round_up(a.channels, 32), dk = round_up(a.dp, 32), depth = a.heads * dk;
  a.kp = static_cast<int>(kp);
  a.dk = static_cast<int>(dk);
  const auto each = [&](const auto& put) {  // put(which, head, feature, channel, value)
    torch::stable::parallel_for(0, a.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t h = begin; h < end; ++h)
          for (int64_t c = 0; c < a.d; ++c)
            for (int64_t k = 0; k < a.channels; ++k)
              put(which, h, c, k, bits(a.qk[((which * a.heads + h) * a.dp + c) * a.cp + k]));
    });
  };
  a.qk_tiles = plan.forms->get<uint16_t>(
      qkv_weight, kLinearQkTiles, 2 * a.heads * a.dp * kp, [&](uint16_t* to) {
        each([&](int64_t which, int64_t h, int64_t c, int64_t k, uint16_t value) {
          to[((which * a.heads + h) * a.dp + c) * kp + k] = value;
        });
      });
  if (!backward) return;
  const bool tiles = isa() == Isa::amx;
  a.q_up = plan.forms->get<uint16_t>(qkv_weight, kLinearUp, 2 * a.cp * depth, [&](uint16_t* to) {
    each([&](int64_t which, int64_t h, int64_t c, int64_t k, uint16_t value) {
      const int64_t row = h * dk + c,
                    at = tiles ? k * depth + row : (row / 2 * a.cp + k) * 2 + row % 2;
      to[which * a.cp * depth + at] = value;
    });
  });
  a.k_up = a.q_up + a.cp * depth;
}

void make_plan(Plan& plan, const Tensor& x, const Tensor& norm_weight, const OptTensor& norm_bias,
               const Tensor& qkv_weight, const Tensor& out_weight, const OptTensor& out_bias,
               int64_t heads, double eps, bool backward) {
  STD_TORCH_CHECK(x.dim() == 5 && qkv_weight.dim() == 2 && out_weight.dim() == 2,
                  "linear_attention_block: x must be (B, F, H, W, C), the weights matrices");
  LinearBlockArgs& a = plan.a;
  const int64_t C = x.size(4), features = qkv_weight.size(0);
  STD_TORCH_CHECK(heads > 0 && features > 0 && features % (3 * heads) == 0 && C > 0 &&
                      C < (1 << 20) && features < (1 << 24),
                  "linear_attention_block: qkv_weight must be (3 * heads * D, C)");
  const int64_t d = features / (3 * heads), inner = plan.inner = heads * d;
  const int64_t cp = round_up(C, 16), dp = round_up(d, 16), panel = dp * cp;
  input(x, "x", x.scalar_type(), x.numel());
  a.dtype = static_cast<int>(dtype_of(x));
  a.heads = static_cast<int>(heads);
  a.d = static_cast<int>(d);
  a.dp = static_cast<int>(dp);
  a.channels = static_cast<int>(C);
  a.cp = static_cast<int>(cp);
  a.eps = static_cast<float>(eps);
  a.scale = static_cast<float>(std::pow(static_cast<double>(d), -0.5));
  a.pixels = x.size(2) * x.size(3);
  plan.all_frames = x.size(0) * x.size(1);
  // 96 is whole panels of 24, 32 or 48 columns; x̂ and its transpose stay in the L2 cache.
  a.rows = static_cast<int>(std::clamp<int64_t>(round_up(a.pixels, 32), 32, 96));
  // Enough items for 32 threads on any machine, because the result must not depend on it.
  const int64_t wanted = ceil_div(32, std::max<int64_t>(1, plan.all_frames));
  a.span = std::max<int64_t>(round_up(ceil_div(a.pixels, wanted), a.rows), 2 * a.rows);
  a.splits = std::max<int64_t>(1, ceil_div(a.pixels, a.span));

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
  STD_TORCH_CHECK(qkv_weight.size(1) == C && out_weight.size(0) == C && out_weight.size(1) == inner,
                  "linear_attention_block: the weights do not fit x");
  plan.forms.emplace(heads);
  make_panels(plan, qkv_weight, out_weight, backward);
  if (isa() >= Isa::avx512_bf16 && x.scalar_type() == ScalarType::BFloat16)
    make_tiles(plan, qkv_weight, backward);

  // One buffer for the matrices of as many frames as the bound allows.
  const int64_t rows = heads * dp, wide = heads * panel, split = a.splits;
  const bool tiles = a.qk_tiles != nullptr;
  const int64_t left = tiles ? rows * a.kp / 2 : 0, transposed = tiles ? cp * heads * a.dk / 2 : 0;
  std::vector<std::pair<float**, int64_t>> parts{{&a.g, split * wide}, {&a.m, wide}};
  float *m_tiles, *m_up, *dg_tiles, *dg_up;
  parts.insert(parts.end(), {{&m_tiles, left}, {&m_up, transposed}});
  if (backward) {
    parts.insert(parts.end(), {{&a.ctx, rows * dp}, {&a.dm, split * wide}, {&a.dg, wide}});
    parts.insert(parts.end(), {{&a.r, rows}, {&a.dxn, a.pixels * cp}});
    parts.insert(parts.end(), {{&dg_tiles, left}, {&dg_up, transposed}});
  } else {
    parts.insert(parts.end(), {{&a.max, split * rows}, {&a.sum, split * rows}});
  }
  int64_t words = 0;
  for (const auto& part : parts) words += part.second;
  a.frames =
      std::clamp<int64_t>(kFrameBytes / (4 * words), 1, std::max<int64_t>(1, plan.all_frames));
  plan.frames = empty(x, {a.frames * words}, ScalarType::Float);
  float* next = static_cast<float*>(plan.frames->mutable_data_ptr());
  for (const auto& part : parts) {
    *part.first = next;
    next += a.frames * part.second;
  }
  if (!tiles) return;
  a.m_tiles = reinterpret_cast<uint16_t*>(m_tiles);
  a.m_up = reinterpret_cast<uint16_t*>(m_up);
  if (backward) {
    a.dg_tiles = reinterpret_cast<uint16_t*>(dg_tiles);
    a.dg_up = reinterpret_cast<uint16_t*>(dg_up);
  }
}

// Calls body(args) for each chunk of frames, with its pointers into the tensors advanced.
template <class Body>
void each_chunk(const Plan& plan, const Tensor& x, const void* dy, const Tensor& y, const Tensor& g,
                const Tensor& lse, const Body& body) {
  const int64_t bytes = plan.a.pixels * plan.a.channels * x.element_size();
  const int64_t rows = plan.inner;
  for (int64_t first = 0; first < plan.all_frames; first += plan.a.frames) {
    LinearBlockArgs a = plan.a;
    a.frames = std::min(a.frames, plan.all_frames - first);
    a.x = static_cast<const char*>(x.const_data_ptr()) + first * bytes;
    if (dy != nullptr) a.dy = static_cast<const char*>(dy) + first * bytes;
    a.y = static_cast<char*>(y.mutable_data_ptr()) + first * bytes;
    a.g_out = static_cast<float*>(g.mutable_data_ptr()) + first * rows * a.channels;
    a.lse = static_cast<float*>(lse.mutable_data_ptr()) + first * rows;
    body(a);
  }
}

template <class Kernel>
void run(const LinearBlockArgs& a, int64_t items, Kernel kernel) {
  const int64_t bytes = linear_block_scratch(a) * sizeof(float);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(bytes)));
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_attention_block_fwd(Tensor x, Tensor norm_weight,
                                                              OptTensor norm_bias,
                                                              Tensor qkv_weight, Tensor out_weight,
                                                              OptTensor out_bias, int64_t heads,
                                                              double eps) {
  Plan plan;
  make_plan(plan, x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, heads, eps, false);
  const int64_t b = x.size(0), f = x.size(1), d = plan.a.d;
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  Tensor g = empty(x, {b, f, heads, d, x.size(4)}, ScalarType::Float);
  Tensor lse = empty(x, {b, f, heads, d}, ScalarType::Float);
  if (x.numel() == 0) return {y, g, lse};
  const auto sum = FASTVDM_PICK_BF16(linear_block_sum), fold = FASTVDM_PICK_BF16(linear_block_fold);
  const auto apply = FASTVDM_PICK_BF16(linear_block_apply);
  each_chunk(plan, x, nullptr, y, g, lse, [&](const LinearBlockArgs& a) {
    run(a, a.frames * a.splits, sum);
    run(a, a.frames, fold);
    run(a, a.frames * a.splits, apply);
  });
  return {y, g, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_block_bwd(
    Tensor dy, Tensor x, Tensor norm_weight, OptTensor norm_bias, Tensor qkv_weight,
    Tensor out_weight, OptTensor out_bias, Tensor g, Tensor lse, int64_t heads, double eps,
    bool need_norm, bool need_qkv, bool need_out) {
  Plan plan;
  make_plan(plan, x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, heads, eps, true);
  LinearBlockArgs& p = plan.a;
  const int64_t C = x.size(4), cp = p.cp, inner = plan.inner;
  const int64_t wide = heads * linear_block_panel(p), frames = plan.all_frames;
  const void* gradient = input(dy, "dy", x.scalar_type(), x.numel());
  input(g, "g", ScalarType::Float, frames * inner * C);
  input(lse, "lse", ScalarType::Float, frames * inner);
  Tensor dx = empty(x, sizes_of(x), x.scalar_type());

  const int64_t words =
      (need_qkv ? 3 * wide : 0) + (need_out ? wide : 0) + (need_norm || need_out ? 3 * cp : 0);
  const int64_t items = x.numel() == 0 ? 0 : p.frames * p.splits;
  p.parts = parts_of_sums(items, plan.all_frames * p.pixels, words);
  const auto sums = [&](int64_t size, bool need) { return PartialSums(x, p.parts, size, need); };
  const PartialSums dnw = sums(cp, need_norm), dnb = sums(cp, need_norm && norm_bias.has_value());
  const PartialSums dqk = sums(2 * wide, need_qkv), dv = sums(wide, need_qkv);
  const PartialSums dout = sums(wide, need_out);
  const PartialSums dob = sums(cp, need_out && out_bias.has_value());
  std::vector<LinearBlockGrads> grads(p.parts);
  for (int64_t i = 0; i < p.parts; ++i)
    grads[i] = {dnw.part(i), dnb.part(i), dob.part(i), dqk.part(i), dv.part(i), dout.part(i)};
  p.grads = grads.data();
  const auto unfold = FASTVDM_PICK_BF16(linear_block_unfold);
  const auto bwd_q = FASTVDM_PICK_BF16(linear_block_bwd_q);
  const auto fold = FASTVDM_PICK_BF16(linear_block_bwd_fold);
  const auto bwd_k = FASTVDM_PICK_BF16(linear_block_bwd_k);
  if (items > 0)
    each_chunk(plan, x, gradient, dx, g, lse, [&](const LinearBlockArgs& a) {
      run(a, a.frames, unfold);
      run(a, a.parts, bwd_q);
      run(a, a.parts, fold);
      run(a, a.parts, bwd_k);
    });

  const auto none = [&] { return empty(x, {0}, x.scalar_type()); };
  const auto channels = [&](const PartialSums& sums, const OptTensor& like, bool need) {
    return need && like.has_value() ? sums.sum(*like) : none();
  };
  Tensor dqkv_weight = none(), dout_weight = none();
  const int64_t d = p.d, dp = p.dp;
  if (need_qkv) {  // rows are (q and k or v, head, feature)
    Values w(qkv_weight);
    const auto rows_of = [&](const PartialSums& from, int64_t first) {
      from.each_row(cp, [&](int64_t row, const double* sums) {
        if (row % dp < d) w.put((first + row / dp * d + row % dp) * C, 1, sums, C);
      });
    };
    rows_of(dqk, 0);
    rows_of(dv, 2 * inner);
    dqkv_weight = w.tensor();
  }
  if (need_out) {
    Values w(out_weight);
    dout.each_row(cp, [&](int64_t row, const double* sums) {
      if (row % dp < d) w.put(row / dp * d + row % dp, inner, sums, C);
    });
    dout_weight = w.tensor();
  }
  return {dx,
          channels(dnw, norm_weight, need_norm),
          channels(dnb, norm_bias, need_norm),
          dqkv_weight,
          dout_weight,
          channels(dob, out_bias, need_out)};
}

}  // namespace fastvdm
