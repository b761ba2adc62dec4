// Launchers of guidance_seed and guidance_update; the contract is in fastvdm/ops/guidance.py.
#include "guidance.h"

#include <algorithm>

#include "launchers.h"

namespace fastvdm {
namespace {

Strided strided(const Tensor& t, const Tensor& z, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 5, "guidance: ", name, " must be a 5-d CPU tensor");
  for (int64_t i = 0; i < 5; ++i)
    STD_TORCH_CHECK(t.size(i) == z.size(i), "guidance: ", name, " and z differ in size");
  const auto s = t.strides();
  return {t.const_data_ptr(), static_cast<int>(dtype_of(t)), s[0], s[1], s[2], s[3], s[4]};
}

const float* dense(const Tensor& t, const char* name, int64_t numel) {
  return static_cast<const float*>(input(t, name, ScalarType::Float, numel));
}

// The slots of the frames; each must be below `places`, or negative.
const int32_t* slots(const OptTensor& slot, const char* name, int64_t frames, int64_t places) {
  STD_TORCH_CHECK(slot.has_value(), "guidance: ", name, " is missing");
  const auto* data = static_cast<const int32_t*>(input(*slot, name, ScalarType::Int, frames));
  for (int64_t i = 0; i < frames; ++i)
    STD_TORCH_CHECK(data[i] < places, "guidance: ", name, " names frame ", data[i], " of ", places);
  return data;
}

GuidanceArgs make_args(const Tensor& z, const Tensor& coef, int64_t columns, const OptTensor& known,
                       const OptTensor& slot, bool clip) {
  STD_TORCH_CHECK(z.dim() == 5, "guidance: z must be (B, C, F, H, W)");
  GuidanceArgs a{};
  a.channels = z.size(1), a.frames = z.size(2), a.height = z.size(3), a.width = z.size(4);
  STD_TORCH_CHECK(a.width < (1 << 24), "guidance: rows of at most 2^24 pixels");
  a.factor = 1;
  a.clip = clip;
  a.z = dense(z, "z", z.numel());
  a.coef = dense(coef, "coef", z.size(0) * columns);
  if (known.has_value()) {
    STD_TORCH_CHECK(known->dim() == 5, "guidance: known must be (B, C, K, H, W)");
    a.num_known = known->size(2);
    a.known = dense(*known, "known", z.size(0) * a.channels * a.num_known * a.height * a.width);
    a.slot = slots(slot, "slot", a.frames, a.num_known);
  }
  return a;
}

template <class Kernel>
void run(const GuidanceArgs& a, int64_t batch, Kernel kernel) {
  const int64_t items = batch * a.channels * a.frames * (a.height / a.factor);
  const int64_t grain = std::max<int64_t>(1, 8192 / (a.width * a.factor));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, static_cast<float*>(scratch(guidance_scratch(a) * sizeof(float))));
  });
}

}  // namespace

std::tuple<Tensor, Tensor> guidance_seed_fwd(Tensor z, Tensor model_out, Tensor coef,
                                             OptTensor known, OptTensor slot, OptTensor low_res,
                                             OptTensor low_slot, OptTensor extra, bool clip) {
  GuidanceArgs a = make_args(z, coef, 4, known, slot, clip);
  Tensor x_hat = empty(z, sizes_of(z), ScalarType::Float);
  Tensor seed = torch::stable::empty_like(model_out);
  a.out = strided(model_out, z, "model_out");
  a.seed = strided(seed, z, "seed");
  if (z.numel() == 0) return {x_hat, seed};
  if (low_res.has_value()) {
    STD_TORCH_CHECK(low_res->dim() == 5 && low_res->size(3) > 0,
                    "guidance: low_res must be (B, C, L, H/k, W/k)");
    a.factor = static_cast<int>(a.height / low_res->size(3));
    STD_TORCH_CHECK(a.factor > 0 && low_res->size(3) * a.factor == a.height &&
                        low_res->size(4) * a.factor == a.width,
                    "guidance: low_res must divide z by one factor");
    a.num_low = low_res->size(2);
    a.low_res = dense(*low_res, "low_res",
                      z.size(0) * a.channels * a.num_low * low_res->size(3) * low_res->size(4));
    a.low_slot = slots(low_slot, "low_slot", a.frames, a.num_low);
  }
  if (extra.has_value()) a.extra = dense(*extra, "extra", z.numel());
  a.x_hat = static_cast<float*>(x_hat.mutable_data_ptr());
  run(a, z.size(0), FASTVDM_PICK(guidance_seed));
  return {x_hat, seed};
}

std::tuple<Tensor, Tensor> guidance_update_fwd(Tensor z, Tensor estimate, Tensor coef,
                                               OptTensor grad, OptTensor seed, OptTensor known,
                                               OptTensor slot, OptTensor noise, OptTensor rng,
                                               OptTensor threshold, int64_t step, bool clip,
                                               bool want_x) {
  GuidanceArgs a = make_args(z, coef, 9, known, slot, clip);
  Tensor z_next = empty(z, sizes_of(z), ScalarType::Float);
  Tensor x_tilde = empty(z, want_x ? sizes_of(z) : std::vector<int64_t>{0}, ScalarType::Float);
  a.estimate = strided(estimate, z, "estimate");
  if (grad.has_value()) a.grad = strided(*grad, z, "grad");
  if (seed.has_value()) a.direct = strided(*seed, z, "seed");
  if (noise.has_value()) a.noise = dense(*noise, "noise", z.numel());
  if (rng.has_value()) {
    a.rng_columns = rng->dim() == 2 ? 2 : 1;
    a.rng = static_cast<const int64_t*>(
        input(*rng, "rng", ScalarType::Long, z.size(0) * a.rng_columns));
  }
  if (threshold.has_value()) a.threshold = dense(*threshold, "threshold", z.size(0));
  a.step = static_cast<uint32_t>(step);
  if (z.numel() == 0) return {x_tilde, z_next};
  a.x_tilde = want_x ? static_cast<float*>(x_tilde.mutable_data_ptr()) : nullptr;
  a.z_next = static_cast<float*>(z_next.mutable_data_ptr());
  run(a, z.size(0), FASTVDM_PICK(guidance_update));
  return {x_tilde, z_next};
}

}  // namespace fastvdm
