// Launchers of norm_act; the contract is in fastvdm/ops/norm_act.py.
#include "norm_act.h"

#include <algorithm>
#include <cmath>

#include "launchers.h"

namespace fastvdm {
namespace {

constexpr int64_t kChunkElements = 16384;  // per item: at most half a megabyte of L2 in fp32

// Shared by forward and backward: shapes, pointers and the coefficients of each instance.
struct Plan {
  NormArgs p{};
  int64_t batch = 0, instances = 0, items = 0;
  int64_t C = 0;
  std::vector<int64_t> stats_shape;
  std::vector<float> weight, bias, scale, shift;  // scale contains 1 + scale, or is empty
  std::vector<float> mu, inv, a, b;

  int64_t video(int64_t instance) const { return instance / (instances / batch); }
};

const void* optional_input(const OptTensor& t, const char* name, ScalarType dtype, int64_t numel) {
  return t.has_value() ? input(*t, name, dtype, numel) : nullptr;
}

// On a CPU the convolutions add their biases themselves; ops/norm_act.py adds a given one
// beforehand.
void refuse(const OptTensor& x_bias) {
  STD_TORCH_CHECK(!x_bias.has_value(), "norm_act: x_bias is not for the CPU's kernels");
}

Plan make_plan(const Tensor& x, const OptTensor& x2, const Tensor& weight, const OptTensor& bias,
               const OptTensor& scale, const OptTensor& shift, const OptTensor& mask, int64_t kind,
               int64_t groups, bool per_frame, double eps, bool act) {
  Plan plan;
  NormArgs& p = plan.p;
  STD_TORCH_CHECK(x.dim() == 5, "norm_act: x must be (B, F, H, W, C)");
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "norm_act: kind must be 0, 1 or 2");
  const int64_t pixels = x.size(0) * x.size(1) * x.size(2) * x.size(3);
  const int64_t c2 = x2.has_value() ? x2->size(x2->dim() - 1) : 0;
  plan.C = x.size(4) + c2;
  STD_TORCH_CHECK(plan.C > 0 && plan.C < (1 << 24), "norm_act: too many channels or none");
  STD_TORCH_CHECK(kind != 0 || (groups > 0 && plan.C % groups == 0),
                  "norm_act: groups must divide the channels");
  const ScalarType dtype = x.scalar_type();
  p.dtype = static_cast<int>(dtype_of(x));
  p.c1 = static_cast<int>(x.size(4));
  p.c2 = static_cast<int>(c2);
  p.groups = static_cast<int>(kind == 0 ? groups : 1);
  p.row_kind = static_cast<int>(kind);
  p.act = act;
  p.eps = static_cast<float>(eps);
  p.x = input(x, "x", dtype, pixels * p.c1);
  p.x2 = optional_input(x2, "x2", dtype, pixels * c2);
  if (mask.has_value()) {
    const ScalarType m = mask->scalar_type();
    STD_TORCH_CHECK(
        m == dtype || m == ScalarType::Float || m == ScalarType::Bool || m == ScalarType::Byte,
        "norm_act: dropout_mask must be bool, fp32 or of the type of x on the CPU");
    p.mask_kind = m == dtype ? 1 : m == ScalarType::Float ? 2 : 3;
    p.mask = input(*mask, "dropout_mask", m, pixels * plan.C);
  }

  plan.batch = x.size(0);
  plan.instances = plan.batch * (kind == 0 && per_frame ? x.size(1) : 1);
  plan.stats_shape = {0};
  if (kind == 0) plan.stats_shape = {plan.instances, groups};
  p.rows = plan.instances > 0 ? pixels / plan.instances : 0;
  p.chunk = std::clamp<int64_t>(kChunkElements / plan.C, 4, 1024);
  p.chunks = ceil_div(p.rows, p.chunk);
  plan.items = plan.instances * p.chunks;

  plan.weight = floats(weight, "weight", plan.C);
  if (bias.has_value()) plan.bias = floats(*bias, "bias", plan.C);
  if (scale.has_value()) {
    plan.scale = floats(*scale, "scale", plan.batch * plan.C);
    for (float& s : plan.scale) s += 1.f;
  }
  if (shift.has_value()) plan.shift = floats(*shift, "shift", plan.batch * plan.C);
  if (kind == 1)
    for (float& w : plan.weight) w *= std::sqrt(static_cast<float>(plan.C));
  return plan;
}

// a = weight (1 + scale) [rstd], b = bias (1 + scale) + shift, and mu, inv per channel for groups.
void coefficients(Plan& plan, const float* mean, const float* rstd, bool fold_rstd) {
  const int64_t C = plan.C, n = plan.instances;
  plan.a.resize(n * C);
  plan.b.resize(n * C);
  if (mean != nullptr) {
    plan.mu.resize(n * C);
    plan.inv.resize(n * C);
  }
  const int64_t per = C / plan.p.groups;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t video = plan.video(i);
    for (int64_t c = 0; c < C; ++c) {
      const float film = plan.scale.empty() ? 1.f : plan.scale[video * C + c];
      float a = plan.weight[c] * film;
      if (mean != nullptr) {
        const int64_t g = i * plan.p.groups + c / per;
        plan.mu[i * C + c] = mean[g];
        plan.inv[i * C + c] = rstd[g];
        if (fold_rstd) a *= rstd[g];
      }
      plan.a[i * C + c] = a;
      plan.b[i * C + c] = (plan.bias.empty() ? 0.f : plan.bias[c] * film) +
                          (plan.shift.empty() ? 0.f : plan.shift[video * C + c]);
    }
  }
  NormArgs& p = plan.p;
  p.a = plan.a.data();
  p.b = plan.b.data();
  p.mu = mean != nullptr ? plan.mu.data() : nullptr;
  p.inv = mean != nullptr ? plan.inv.data() : nullptr;
}

void compute_stats(Plan& plan, float* mean, float* rstd, double eps) {
  NormArgs& p = plan.p;
  const int64_t groups = p.groups, per = plan.C / groups;
  std::vector<float> means(plan.items * groups), m2s(plan.items * groups);
  p.part1 = means.data();
  p.part2 = m2s.data();
  const auto kernel = FASTVDM_PICK_BF16(norm_stats);
  torch::stable::parallel_for(0, plan.items, 1, [&](int64_t begin, int64_t end) {
    kernel(p, begin, end, static_cast<float*>(scratch(3 * plan.C * sizeof(float))));
  });
  // Chan's formula over the chunks, always in the same order.
  for (int64_t i = 0; i < plan.instances; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      double n = 0, m = 0, m2 = 0;
      for (int64_t k = 0; k < p.chunks; ++k) {
        const double nk = static_cast<double>(std::min(p.chunk, p.rows - k * p.chunk) * per);
        const int64_t at = (i * p.chunks + k) * groups + g;
        const double delta = means[at] - m, total = n + nk;
        m += delta * (nk / total);
        m2 += m2s[at] + delta * delta * (n * nk / total);
        n = total;
      }
      mean[i * groups + g] = static_cast<float>(m);
      rstd[i * groups + g] = static_cast<float>(1.0 / std::sqrt(m2 / n + eps));
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_act_fwd(Tensor x, OptTensor x2, OptTensor x_bias,
                                                Tensor weight, OptTensor bias, OptTensor scale,
                                                OptTensor shift, OptTensor residual,
                                                OptTensor dropout_mask, OptTensor mean,
                                                OptTensor rstd, int64_t kind, int64_t groups,
                                                bool per_frame, double eps, bool act) {
  refuse(x_bias);
  Plan plan =
      make_plan(x, x2, weight, bias, scale, shift, dropout_mask, kind, groups, per_frame, eps, act);
  NormArgs& p = plan.p;
  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> shape = sizes_of(x);
  shape[4] = plan.C;
  Tensor y = empty(x, shape, dtype);
  p.y = y.mutable_data_ptr();
  p.residual = optional_input(residual, "residual", dtype, y.numel());

  STD_TORCH_CHECK(mean.has_value() == rstd.has_value(), "norm_act: give mean and rstd, or neither");
  const bool given = mean.has_value();
  const std::vector<int64_t> saved = given ? std::vector<int64_t>{0} : plan.stats_shape;
  Tensor mean_out = empty(x, saved, ScalarType::Float);
  Tensor rstd_out = empty(x, saved, ScalarType::Float);
  const float *m = nullptr, *r = nullptr;
  if (kind == 0 && given) {
    const int64_t n = plan.instances * groups;
    m = static_cast<const float*>(input(*mean, "mean", ScalarType::Float, n));
    r = static_cast<const float*>(input(*rstd, "rstd", ScalarType::Float, n));
  } else if (kind == 0) {
    m = static_cast<const float*>(mean_out.const_data_ptr());
    r = static_cast<const float*>(rstd_out.const_data_ptr());
    compute_stats(plan, static_cast<float*>(mean_out.mutable_data_ptr()),
                  static_cast<float*>(rstd_out.mutable_data_ptr()), eps);
  }
  coefficients(plan, m, r, /*fold_rstd=*/true);
  const auto kernel = FASTVDM_PICK_BF16(norm_apply);
  torch::stable::parallel_for(0, plan.items, 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, mean_out, rstd_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_bwd(
    Tensor dy, Tensor x, OptTensor x2, OptTensor x_bias, Tensor weight, OptTensor bias,
    OptTensor scale, OptTensor shift, OptTensor dropout_mask, OptTensor mean, OptTensor rstd,
    int64_t kind, int64_t groups, bool per_frame, double eps, bool act, bool need_dx,
    bool need_dx_bias, bool need_dweight, bool need_dfilm) {
  refuse(x_bias);
  (void)need_dx_bias;
  Plan plan =
      make_plan(x, x2, weight, bias, scale, shift, dropout_mask, kind, groups, per_frame, eps, act);
  NormArgs& p = plan.p;
  const ScalarType dtype = x.scalar_type();
  const int64_t C = plan.C, pixels = x.numel() / p.c1;
  p.dy = input(dy, "dy", dtype, pixels * C);

  const auto none = [&] { return empty(x, {0}, dtype); };
  Tensor dx = need_dx ? empty(x, sizes_of(x), dtype) : none();
  Tensor dx2 = need_dx && x2.has_value() ? empty(x, sizes_of(*x2), dtype) : none();
  p.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  p.dx2 = need_dx && x2.has_value() ? dx2.mutable_data_ptr() : nullptr;

  const float *m = nullptr, *r = nullptr;
  if (kind == 0) {
    STD_TORCH_CHECK(mean.has_value() && rstd.has_value(),
                    "norm_act_bwd: groups need the mean and rstd of the forward");
    const int64_t n = plan.instances * groups;
    m = static_cast<const float*>(input(*mean, "mean", ScalarType::Float, n));
    r = static_cast<const float*>(input(*rstd, "rstd", ScalarType::Float, n));
  }
  coefficients(plan, m, r, /*fold_rstd=*/false);

  std::vector<float> part_g(plan.items * C), part_gx(plan.items * C);
  p.part1 = part_g.data();
  p.part2 = part_gx.data();
  const auto sums = FASTVDM_PICK_BF16(norm_bwd_sums);
  torch::stable::parallel_for(0, plan.items, 1, [&](int64_t begin, int64_t end) {
    sums(p, begin, end, static_cast<float*>(scratch(2 * C * sizeof(float))));
  });

  // Sums of du and du x_hat over each instance, with its chunks in order.
  std::vector<double> g(plan.instances * C, 0.0), gx(plan.instances * C, 0.0);
  for (int64_t i = 0; i < plan.items; ++i) {
    double* to_g = g.data() + i / p.chunks * C;
    double* to_gx = gx.data() + i / p.chunks * C;
    for (int64_t c = 0; c < C; ++c) {
      to_g[c] += part_g[i * C + c];
      to_gx[c] += part_gx[i * C + c];
    }
  }

  if (kind == 0 && need_dx) {
    std::vector<float> s1(plan.instances * C), s2(plan.instances * C);
    const int64_t per = C / groups;
    const double n = static_cast<double>(p.rows * per);
    for (int64_t i = 0; i < plan.instances; ++i) {
      for (int64_t gr = 0; gr < groups; ++gr) {
        double t1 = 0, t2 = 0;
        for (int64_t c = gr * per; c < (gr + 1) * per; ++c) {
          t1 += plan.a[i * C + c] * g[i * C + c];
          t2 += plan.a[i * C + c] * gx[i * C + c];
        }
        for (int64_t c = gr * per; c < (gr + 1) * per; ++c) {
          s1[i * C + c] = static_cast<float>(t1 / n);
          s2[i * C + c] = static_cast<float>(t2 / n);
        }
      }
    }
    p.s1 = s1.data();
    p.s2 = s2.data();
    const auto kernel = FASTVDM_PICK_BF16(norm_bwd_dx);
    torch::stable::parallel_for(0, plan.items, 1,
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  Tensor dweight = none(), dbias = none(), dscale = none(), dshift = none();
  const double unit = kind == 1 ? std::sqrt(static_cast<double>(C)) : 1.0;
  if (need_dweight) {
    std::vector<double> dw(C, 0.0), db(C, 0.0);
    for (int64_t i = 0; i < plan.instances; ++i) {
      const int64_t video = plan.video(i);
      for (int64_t c = 0; c < C; ++c) {
        const double film = plan.scale.empty() ? 1.0 : plan.scale[video * C + c];
        dw[c] += film * unit * gx[i * C + c];
        db[c] += film * g[i * C + c];
      }
    }
    dweight = from_doubles(dw, weight);
    if (bias.has_value()) dbias = from_doubles(db, *bias);
  }
  if (need_dfilm && (scale.has_value() || shift.has_value())) {
    std::vector<double> ds(plan.batch * C, 0.0), dsh(plan.batch * C, 0.0);
    for (int64_t i = 0; i < plan.instances; ++i) {
      const int64_t video = plan.video(i);
      for (int64_t c = 0; c < C; ++c) {
        const double b = plan.bias.empty() ? 0.0 : plan.bias[c];  // for rms the weight includes √C
        ds[video * C + c] += plan.weight[c] * gx[i * C + c] + b * g[i * C + c];
        dsh[video * C + c] += g[i * C + c];
      }
    }
    if (scale.has_value()) dscale = from_doubles(ds, *scale);
    if (shift.has_value()) dshift = from_doubles(dsh, *shift);
  }
  return {dx, dx2, none(), dweight, dbias, dscale, dshift};
}

}  // namespace fastvdm
