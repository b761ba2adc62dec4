// The launchers' interface to torch: its stable ABI only. Never included by a *_kernel.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace fastvdm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// The storage type of x; throws if there are no kernels for it.
DType dtype_of(const Tensor& x);
// Throws unless t is a contiguous CPU tensor of `dtype` with `numel` elements.
const void* input(const Tensor& t, const char* name, ScalarType dtype, int64_t numel);
// A new uninitialised tensor like x, dense and of a floating type. A large one uses memory that is
// kept between calls (outputs.cpp).
Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype);
std::vector<int64_t> sizes_of(const Tensor& x);
// The values of a small tensor of any floating type and strides, in fp32; throws unless it has
// `numel` elements.
std::vector<float> floats(const Tensor& given, const char* name, int64_t numel);
// The same with zeros up to `size`.
std::vector<float> padded(const Tensor& given, const char* name, int64_t numel, int64_t size);
// A new tensor shaped and typed like `like`, to be filled.
class Values {
 public:
  explicit Values(const Tensor& like);
  const Tensor& tensor() const { return tensor_; }
  // Sets `count` elements from `first` on, `step` apart.
  void put(int64_t first, int64_t step, const double* values, int64_t count);

 private:
  Tensor tensor_;
  void* data_;
};
// The same for all values at once.
Tensor from_doubles(const std::vector<double>& values, const Tensor& like);

// A number of MiB from the environment, in bytes; throws if it is not a number.
int64_t megabytes_from_environment(const char* name, int64_t otherwise);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

}  // namespace fastvdm
