// Checks and small conversions for all launchers.
#include "torch.h"

#include <cstdlib>
#include <cstring>

namespace fastvdm {
DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "fastvdm_C: the CPU kernels take fp32, bf16 and fp16");
  }
}

const void* input(const Tensor& t, const char* name, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu(), "fastvdm_C: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.is_contiguous(), "fastvdm_C: ", name, " must be contiguous");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fastvdm_C: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.numel() == numel, "fastvdm_C: ", name, " must have ", numel, " elements, got ",
                  t.numel());
  return t.const_data_ptr();
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> out(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) out[i] = x.size(i);
  return out;
}

std::vector<float> floats(const Tensor& given, const char* name, int64_t numel) {
  const Tensor t = given.is_contiguous() ? given : torch::stable::contiguous(given);
  std::vector<float> out(numel);
  const void* data = input(t, name, t.scalar_type(), numel);
  switch (t.scalar_type()) {
    case ScalarType::Float: std::memcpy(out.data(), data, sizeof(float) * numel); break;
    case ScalarType::Double:
      for (int64_t i = 0; i < numel; ++i)
        out[i] = static_cast<float>(static_cast<const double*>(data)[i]);
      break;
    case ScalarType::BFloat16:
      for (int64_t i = 0; i < numel; ++i)
        out[i] = static_cast<float>(static_cast<const c10::BFloat16*>(data)[i]);
      break;
    case ScalarType::Half:
      for (int64_t i = 0; i < numel; ++i)
        out[i] = static_cast<float>(static_cast<const c10::Half*>(data)[i]);
      break;
    default: STD_TORCH_CHECK(false, "fastvdm_C: ", name, " must be floating");
  }
  return out;
}

std::vector<float> padded(const Tensor& given, const char* name, int64_t numel, int64_t size) {
  std::vector<float> out = floats(given, name, numel);
  out.resize(size, 0.f);
  return out;
}

Values::Values(const Tensor& like)
    : tensor_(empty(like, sizes_of(like), like.scalar_type())), data_(tensor_.mutable_data_ptr()) {}

void Values::put(int64_t first, int64_t step, const double* values, int64_t count) {
  const auto write = [&](auto* to) {
    for (int64_t i = 0; i < count; ++i)
      if constexpr (sizeof(*to) == 2)
        to[i * step] = static_cast<float>(values[i]);
      else
        to[i * step] = values[i];
  };
  switch (tensor_.scalar_type()) {
    case ScalarType::Float: return write(static_cast<float*>(data_) + first);
    case ScalarType::Double: return write(static_cast<double*>(data_) + first);
    case ScalarType::BFloat16: return write(static_cast<c10::BFloat16*>(data_) + first);
    case ScalarType::Half: return write(static_cast<c10::Half*>(data_) + first);
    default: STD_TORCH_CHECK(false, "fastvdm_C: a gradient must be floating");
  }
}

Tensor from_doubles(const std::vector<double>& values, const Tensor& like) {
  Values out(like);
  STD_TORCH_CHECK(like.numel() == static_cast<int64_t>(values.size()), "fastvdm_C: size mismatch");
  out.put(0, 1, values.data(), like.numel());
  return out.tensor();
}

int64_t megabytes_from_environment(const char* name, int64_t otherwise) {
  constexpr int64_t mib = 1 << 20;
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return otherwise * mib;
  char* end = nullptr;
  const long long given = std::strtoll(value, &end, 10);
  STD_TORCH_CHECK(*end == '\0' && given >= 0 && given < (1LL << 40), name,
                  " must be a number of MiB, got '", value, "'");
  return given * mib;
}

}  // namespace fastvdm
