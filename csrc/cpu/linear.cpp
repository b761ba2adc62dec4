// Launcher of the projections; the contract is in fastvdm/ops/linear.py.
#include "linear.h"

#include "launchers.h"

namespace fastvdm {
namespace {

// y (..., N) = x (..., K) Wᵀ + bias with weight (N, K), of any strides, in the dtype of x.
// transposed: y = x W with weight (K, N); dx of the first form is dy multiplied so.
void multiply(const Tensor& x, const Tensor& weight, const OptTensor& bias, bool transposed,
              const Tensor& y) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.is_cpu() &&
                      weight.scalar_type() == x.scalar_type(),
                  "linear: weight must be a matrix in the type of x");
  LinearLayerArgs a{};
  const int64_t k = weight.size(transposed ? 0 : 1), n = weight.size(transposed ? 1 : 0);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == k && k > 0 && n > 0 && k < (1 << 24) && n < (1 << 24),
                  "linear: the weight takes ", k, " features");
  a.dtype = static_cast<int>(dtype_of(x));
  a.rows = x.numel() / k;
  a.k = static_cast<int>(k);
  a.n = static_cast<int>(n);
  a.kp = static_cast<int>((k + 15) / 16 * 16);
  a.np = static_cast<int>((n + 15) / 16 * 16);
  a.w_k = weight.stride(transposed ? 0 : 1);
  a.w_n = weight.stride(transposed ? 1 : 0);
  a.x = input(x, "x", x.scalar_type(), x.numel());
  a.weight = weight.const_data_ptr();
  std::vector<float> wide_bias;
  if (bias.has_value()) {
    wide_bias = padded(*bias, "bias", n, a.np);
    a.bias = wide_bias.data();
  }
  input(y, "y", x.scalar_type(), a.rows * n);
  a.y = y.mutable_data_ptr();
  if (a.rows == 0) return;
  Tensor packed = empty(x, {k, a.np}, ScalarType::Float);
  a.packed = static_cast<float*>(packed.mutable_data_ptr());
  const auto pack = FASTVDM_PICK(linear_pack);
  torch::stable::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) { pack(a, begin, end); });
  const auto kernel = FASTVDM_PICK(linear_rows);
  torch::stable::parallel_for(
      0, ceil_div(a.rows, kLinearBlock), 1, [&](int64_t begin, int64_t end) {
        kernel(a, begin, end,
               static_cast<float*>(scratch(linear_layer_scratch(a) * sizeof(float))));
      });
}

Tensor result(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape = sizes_of(x);
  STD_TORCH_CHECK(!shape.empty(), "linear: x must have features");
  shape.back() = features;
  return empty(x, shape, x.scalar_type());
}

}  // namespace

Tensor linear_fwd(Tensor x, Tensor weight, OptTensor bias) {
  Tensor y = result(x, weight.size(0));
  multiply(x, weight, bias, false, y);
  return y;
}

Tensor linear_dx(Tensor dy, Tensor weight) {
  Tensor dx = result(dy, weight.size(1));
  multiply(dy, weight, std::nullopt, true, dx);
  return dx;
}

}  // namespace fastvdm
