// Buffers of the launchers: operands of the kernels' products, and sums of gradients that the threads
// make apart and that are added in fp64.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

namespace fastvdm {

// On a cache line, so that no vector of a matrix whose width is a multiple of 16 crosses one.
template <class T>
struct OnCacheLine {
  using value_type = T;
  OnCacheLine() = default;
  template <class U>
  OnCacheLine(const OnCacheLine<U>&) {}
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const OnCacheLine&) const { return true; }
};

template <class T>
using Buffer = std::vector<T, OnCacheLine<T>>;

// One buffer of `parts` rows of `size`, or none.
struct Partial {
  Partial(int64_t parts, int64_t size, bool wanted)
      : size(wanted ? size : 0), parts(parts), data(parts * this->size, 0.f) {}
  float* part(int64_t i) { return size ? data.data() + i * size : nullptr; }
  std::vector<double> sum() const {
    std::vector<double> out(size, 0.0);
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t i = 0; i < size; ++i) out[i] += data[p * size + i];
    return out;
  }
  int64_t size, parts;
  Buffer<float> data;
};

}  // namespace fastvdm
