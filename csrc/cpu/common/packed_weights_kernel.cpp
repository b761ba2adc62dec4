// A hash of a weight's bits: sums modulo 2⁶⁴ of w_i k_i over its 32-bit words, with two sets of
// keys.
//
// These changes are always detected, whatever the values:
// - one changed word, and so one changed element of any kind (a sign, -0 for 0, another NaN): the
//   first sum changes by (w' - w) k, whose factors are below 2³² and not zero;
// - two exchanged words: it changes by (w_i - w_j) (k_j - k_i), and no two keys are equal;
// - two 16-bit elements exchanged between different halves of two words: it changes by
//   (e_i - e_j) (2¹⁶ k_j - k_i), and the keys are odd.
// For any other change both sums would have to be unchanged: the probability is 2⁻¹²⁸ if all words
// change at random, and below 2⁻⁵⁰ over the choice of the keys for the smallest changes. The
// weights belong to the user, so nobody searches for collisions.
#include "packed_weights.h"

#include "vec.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

typedef uint64_t vq __attribute__((vector_size(FASTVDM_VBYTES)));

// Products of the low halves of 64-bit lanes.
FASTVDM_INLINE vq multiply_low(vq a, vq b) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Word i of unit u has the keys first[i] ^ (a mix of u in bits 1 to 22) and second[i] ^ (another
// mix in all bits). In the first set bits 23 and up are i and the lowest bit is one: so all keys
// are odd and, because the mix is a bijection, different.
struct Keys {
  alignas(64) uint32_t first[kHashUnit], second[kHashUnit];
};
static_assert(kHashUnit == 1 << 9);

constexpr uint32_t mixed(uint32_t x) {  // the finalizer of Murmur3
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

constexpr Keys make_keys() {
  Keys k{};
  for (uint32_t i = 0; i < kHashUnit; ++i) {
    k.first[i] = i << 23 | (mixed(i + 1) & 0x7fffffu) | 1u;
    k.second[i] = mixed(i + 0x9e3779b9u);
  }
  return k;
}
constexpr Keys kKeys = make_keys();

FASTVDM_INLINE uint32_t first_mix(uint64_t unit) {  // a bijection of 22 bits
  constexpr uint32_t mask = kHashUnits - 1;
  uint32_t x = (uint32_t)unit * 0x2c1b3c6du & mask;
  x = (x ^ x >> 11) * 0x297a2d39u & mask;
  return (x ^ x >> 11) << 1;
}
FASTVDM_INLINE uint32_t second_mix(uint64_t unit) { return mixed((uint32_t)unit ^ 0x5bd1e995u); }

FASTVDM_INLINE vq spread(uint32_t x) { return vq{} + ((uint64_t)x << 32 | x); }

struct Sums {
  vq first, second;
};

// Adds up to 4 * kHashUnit `bytes` of one unit.
FASTVDM_INLINE void add_unit(const char* from, int bytes, uint64_t unit, Sums& sums) {
  const vq mix1 = spread(first_mix(unit)), mix2 = spread(second_mix(unit));
  vq even1{}, odd1{}, even2{}, odd2{};
  const auto add = [&](vq w, int word) __attribute__((always_inline)) {
    vq k1, k2;
    memcpy(&k1, kKeys.first + word, sizeof(vq));
    memcpy(&k2, kKeys.second + word, sizeof(vq));
    k1 ^= mix1;
    k2 ^= mix2;
    even1 += multiply_low(w, k1);
    even2 += multiply_low(w, k2);
    w >>= 32;
    odd1 += multiply_low(w, k1 >> 32);
    odd2 += multiply_low(w, k2 >> 32);
  };
  int at = 0;
  for (; at + FASTVDM_VBYTES <= bytes; at += FASTVDM_VBYTES) {
    vq w;
    memcpy(&w, from + at, sizeof(w));
    add(w, at / 4);
  }
  if (at < bytes) {
    vq w{};
    memcpy(&w, from + at, bytes - at);
    add(w, at / 4);
  }
  sums.first += even1 + odd1;
  sums.second += even2 + odd2;
}

template <class W>
void hash(const WeightHashArgs& a, int64_t begin, int64_t end, uint64_t* total) {
  constexpr int elements = kHashUnit * 4 / (int)sizeof(W);
  Sums sums{};
  W gathered[elements];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % a.units * elements;
    const int count = a.run - first < elements ? (int)(a.run - first) : elements;
    const W* from = (const W*)a.data + first * a.step;
    int64_t index = unit / a.units;
    for (int d = 2; d >= 0; --d) {
      from += index % a.sizes[d] * a.strides[d];
      index /= a.sizes[d];
    }
    if (a.step != 1) {
      for (int i = 0; i < count; ++i) gathered[i] = from[i * a.step];
      from = gathered;
    }
    add_unit((const char*)from, count * (int)sizeof(W), unit, sums);
  }
  for (int l = 0; l < VL / 2; ++l) {
    total[0] += sums.first[l];
    total[1] += sums.second[l];
  }
}

}  // namespace

void weight_hash(const WeightHashArgs& a, int64_t begin, int64_t end, uint64_t sums[2]) {
  if (a.bytes == 4)
    hash<uint32_t>(a, begin, end, sums);
  else
    hash<uint16_t>(a, begin, end, sums);
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
