// What happens across the lanes of a warp, but for votes.
#pragma once
#include "arithmetic.h"

inline void Machine::shuffle() {
  const u32 *a = source<u32>(0), *b = source<u32>(1), *c = source<u32>(2);
  u32 r[LANES], d = 0, inside = 0;
  for (int i = 0; i < LANES; ++i) {
    int clamp = c[i] & 31, segment = c[i] >> 8 & 31, by = b[i] & 31;
    int most = (i & segment) | (clamp & ~segment), least = i & segment, from;
    switch (I->op) {
      case OP_shfl_up: from = i - by; break;
      case OP_shfl_down: from = i + by; break;
      case OP_shfl_bfly: from = i ^ by; break;
      default: from = least | (by & ~segment);
    }
    bool ok = I->op == OP_shfl_up ? from >= most : from <= most;
    if (!ok) from = i;
    if (!(m >> from & 1)) report(DIVERGED, -2, i, from);
    r[i] = a[from];
    d |= (defined(0) >> from & 1) << i;
    inside |= u32(ok) << i;
  }
  put<u32>(0, r, d);
  if (I->destinations > 1) put_predicate(1, inside, ALL);
}

// A minimum or maximum over the lanes. flags: as alu's.
inline void Machine::reduce() {
  const f32* a = source<f32>(0);
  int function = I->flags >> 5;
  bool nan = function == MIN_NAN || function == MAX_NAN,
       low = function == MIN || function == MIN_NAN;
  if ((I->flags & 31) != F32) return fail(UNSUPPORTED, I->flags);
  f32 r[LANES], found = NAN;
  bool first = true;
  for (int i = 0; i < LANES; ++i) {
    if (!active(i)) continue;
    found = first ? a[i] : low ? least(found, a[i], nan) : most(found, a[i], nan);
    first = false;
  }
  std::fill(r, r + LANES, found);
  put<f32>(0, r, (defined(0) & m) == m ? ALL : 0);
}
