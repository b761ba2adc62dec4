// Packed forms of a block's weights, kept between calls while the content of the weight is the
// same.
#pragma once

#include <algorithm>
#include <vector>

#include "../launchers.h"

namespace fastvdm {

// The first id of a form that is made here; smaller ids belong to the 3x3 convolution.
enum WeightForm : int64_t {
  kTemporalQkvT = 512,
  kTemporalOutT,
  kTemporalQkv,
  kTemporalOut,
  kTemporalQkvTiles,
  kTemporalOutTiles,
  kTemporalDoutTiles,
  kTemporalDqkvTiles,
  kLinearQk,
  kLinearV,
  kLinearVT,
  kLinearOut,
  kLinearOutT,
  kLinearQkTiles,
  kLinearUp,
};

class PackedForms {
 public:
  explicit PackedForms(int64_t heads) : heads_(heads) {}

  // `count` values of `weight`, written by fill(to) and zero elsewhere; valid during this lifetime.
  template <class T, class Fill>
  const T* get(const Tensor& weight, WeightForm form, int64_t count, const Fill& fill) {
    STD_TORCH_CHECK(weight.is_cpu(), "fastvdm_C: a weight must be on the CPU");
    const auto make = [&] {
      const int64_t words = ceil_div(count * sizeof(T), sizeof(float));
      Tensor made = empty(weight, {words}, ScalarType::Float);
      T* to = static_cast<T*>(made.mutable_data_ptr());
      std::fill_n(to, count, T(0));
      fill(to);
      return made;
    };
    const bool known = weight.element_size() <= 4;
    forms_.push_back(known ? packed_weights(weight, heads_ << 10 | form, make) : make());
    return static_cast<const T*>(forms_.back().const_data_ptr());
  }

 private:
  int64_t heads_;  // the layout depends on it
  std::vector<Tensor> forms_;
};

}  // namespace fastvdm
