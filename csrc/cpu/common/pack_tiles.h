// The host side of tiles.h: packs matrices in the order in which the tile products read them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

namespace fastvdm {

// Packs value(k, n) of a (k, n) matrix in bf16, k a multiple of 32 and n of 16: panels of 16
// columns, each with k / 32 tiles of 16 pairs of k x 16 columns.
template <class F>
void pack_tiles(int64_t k, int64_t n, uint16_t* to, const F& value) {
  for (int64_t column = 0; column < n; column += 16)
    for (int64_t row = 0; row < k; row += 2)
      for (int64_t c = column; c < column + 16; ++c)
        for (int64_t r = row; r < row + 2; ++r) *to++ = c10::BFloat16(value(r, c)).x;
}

}  // namespace fastvdm
