// Number formats, and lanes of a register in them.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "layout.h"

template <class T, class S>
static inline T bits(S s) {
  static_assert(sizeof(T) == sizeof(S));
  T t;
  memcpy(&t, &s, sizeof t);
  return t;
}

static inline f32 from_bf16(u16 v) { return bits<f32>(u32(v) << 16); }
static inline f32 from_f16(u16 v) { return f32(bits<f16>(v)); }
static inline u16 to_f16(f32 v) { return bits<u16>(f16(v)); }
static inline u16 to_bf16(f32 v) {  // to nearest even; a NaN is the canonical one
  u32 b = bits<u32>(v);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline f32 from_tf32(u32 b) { return bits<f32>(b & 0xffffe000u); }

// Matrix cores truncate their sums; what overflows is infinite.
static inline f32 toward_zero(f64 d) {
  f32 f = f32(d);
  u32 b = bits<u32>(f);
  return std::isfinite(f) && std::fabs(f64(f)) > std::fabs(d) ? bits<f32>(b - 1) : f;
}

// A lane of a register has 8 bytes where the register has 64 bits, else 4.
template <class T>
static inline T lane_of(const u8* p, int i) {
  if constexpr (sizeof(T) >= 4)
    return ((const T*)p)[i];
  else if constexpr (sizeof(T) == 2)
    return bits<T>(u16(((const u32*)p)[i]));
  else
    return T(((const u32*)p)[i]);
}
template <class T>
static inline void set_lane(u8* p, int i, T v) {
  if constexpr (sizeof(T) >= 4)
    ((T*)p)[i] = v;
  else if constexpr (sizeof(T) == 2)
    ((u32*)p)[i] = bits<u16>(v);
  else
    ((u32*)p)[i] = u8(v);
}
