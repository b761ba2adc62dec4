#include "partial_sums.h"

#include <cstring>

namespace fastvdm {

int64_t parts_of_sums(int64_t items, int64_t rows, int64_t words) {
  if (words == 0) return items;
  const int64_t memory = std::max<int64_t>(1, (32 << 20) / words);
  // Clearing and adding a part takes about as long as the products of 128 rows.
  return std::min({items, memory, std::clamp<int64_t>(rows / 256, 8, 32)});
}

PartialSums::PartialSums(const Tensor& x, int64_t parts, int64_t size, bool wanted)
    : parts_(parts), size_(wanted ? size : 0) {
  if (parts_ * size_ == 0) return;
  memory_ = empty(x, {parts_ * size_}, ScalarType::Float);
  data_ = static_cast<float*>(memory_->mutable_data_ptr());
  torch::stable::parallel_for(0, parts_, 1, [&](int64_t begin, int64_t end) {
    std::memset(data_ + begin * size_, 0, sizeof(float) * (end - begin) * size_);
  });
}

Tensor PartialSums::sum(const Tensor& like) const {
  Values out(like);
  each_row(size_, [&](int64_t, const double* sums) { out.put(0, 1, sums, like.numel()); });
  return out.tensor();
}

}  // namespace fastvdm
