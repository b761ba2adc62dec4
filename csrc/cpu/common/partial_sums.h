// Sums of gradients that threads compute separately. They are added in fp64 in the order of the
// parts, so that their bits do not depend on the number of threads.
#pragma once

#include <algorithm>

#include "torch.h"

namespace fastvdm {

// The number of parts, each of whole items, in which `rows` rows are summed to `words` values; all
// items are separate if nothing is summed. It is enough for eight threads, more if there are enough
// rows, and at most 128 MB of sums.
int64_t parts_of_sums(int64_t items, int64_t rows, int64_t words);

class PartialSums {
 public:
  // `parts` times `size` zeros in memory allocated like x; nothing if not wanted.
  PartialSums(const Tensor& x, int64_t parts, int64_t size, bool wanted);
  float* part(int64_t i) const { return data_ == nullptr ? nullptr : data_ + i * size_; }

  // body(row, its sums in fp64) for every row of `width` values, on all threads.
  template <class Body>
  void each_row(int64_t width, const Body& body) const {
    if (size_ == 0) return;
    const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width * parts_));
    torch::stable::parallel_for(0, size_ / width, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(width);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t p = 0; p < parts_; ++p) {
          const float* from = data_ + p * size_ + row * width;
          for (int64_t i = 0; i < width; ++i) sums[i] += from[i];
        }
        body(row, sums.data());
      }
    });
  }

  // The first like.numel() sums, shaped and typed like `like`.
  Tensor sum(const Tensor& like) const;

 private:
  std::optional<Tensor> memory_;
  float* data_ = nullptr;
  int64_t parts_, size_;
};

}  // namespace fastvdm
