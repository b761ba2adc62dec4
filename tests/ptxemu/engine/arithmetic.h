// What happens within lanes: integers, floats, halves, conversions, comparisons.
#pragma once
#include "machine.h"

// -- integers and floats --------------------------------------------------------------------------

template <class T>
inline void Machine::alu_integer(int function) {
  constexpr int BITS = sizeof(T) * 8;
  constexpr bool SIGNED = std::is_signed_v<T>;
  using U = std::make_unsigned_t<T>;
  auto a = [&](int i) { return lane_of<T>(raw(0), i); };
  auto b = [&](int i) { return lane_of<T>(raw(1), i); };
  auto c = [&](int i) { return lane_of<T>(raw(2), i); };
  auto each = [&](auto f) { map<T>(I->sources, f); };
  // -2^n / -1 is itself here; a division by 0 is what GPUs give.
  auto minus_one = [&](int i) { return SIGNED && b(i) == T(-1); };
  switch (function) {
    case ADD: return each([&](int i) { return U(a(i)) + U(b(i)); });
    case SUB: return each([&](int i) { return U(a(i)) - U(b(i)); });
    case MUL: return each([&](int i) { return u64(a(i)) * u64(b(i)); });
    case MAD: return each([&](int i) { return u64(a(i)) * u64(b(i)) + u64(c(i)); });
    case MUL_HI:
      return each([&](int i) {
        using W = std::conditional_t<SIGNED, __int128, unsigned __int128>;
        return W(a(i)) * W(b(i)) >> BITS;
      });
    case MUL_WIDE:
    case MAD_WIDE:
      if constexpr (BITS < 64) {
        using S = std::conditional_t<BITS == 16, s32, s64>;
        using W = std::conditional_t<SIGNED, S, std::make_unsigned_t<S>>;
        return map<W>(I->sources, [&](int i) {
          u64 product = u64(W(a(i)) * W(b(i)));
          return function == MAD_WIDE ? product + u64(lane_of<W>(raw(2), i)) : product;
        });
      }
      return fail(UNSUPPORTED, function);
    case DIV:
      return each([&](int i) {
        return b(i) == 0 ? T(~T(0)) : minus_one(i) ? T(0 - U(a(i))) : T(a(i) / b(i));
      });
    case REM:
      return each([&](int i) { return b(i) == 0 ? a(i) : minus_one(i) ? T(0) : T(a(i) % b(i)); });
    case MIN: return each([&](int i) { return std::min(a(i), b(i)); });
    case MAX: return each([&](int i) { return std::max(a(i), b(i)); });
    case ABS: return each([&](int i) { return a(i) < T(0) ? T(0 - U(a(i))) : a(i); });
    case NEG: return each([&](int i) { return 0 - U(a(i)); });
    case AND: return each([&](int i) { return a(i) & b(i); });
    case OR: return each([&](int i) { return a(i) | b(i); });
    case XOR: return each([&](int i) { return a(i) ^ b(i); });
    case NOT: return each([&](int i) { return ~a(i); });
    case SHL:
      return each([&](int i) {
        u32 by = lane_of<u32>(raw(1), i);
        return by >= BITS ? T(0) : T(U(a(i)) << by);
      });
    case SHR:
      return each([&](int i) {
        u32 by = lane_of<u32>(raw(1), i);
        return T(a(i) >> std::min(by, u32(BITS - 1))) >> (by >= BITS && !SIGNED ? 1 : 0);
      });
    default: fail(UNSUPPORTED, function);
  }
}

// min and max return the operand that is a number; those with .NaN the other one.
template <class T>
static inline T least(T a, T b, bool nan) {
  if (a != a) return nan ? a : b;
  if (b != b) return nan ? b : a;
  return a < b ? a : b;
}
template <class T>
static inline T most(T a, T b, bool nan) {
  return -least<T>(-a, -b, nan);
}

template <class T>
inline void Machine::alu_float(int function) {
  auto a = [&](int i) { return lane_of<T>(raw(0), i); };
  auto b = [&](int i) { return lane_of<T>(raw(1), i); };
  auto c = [&](int i) { return lane_of<T>(raw(2), i); };
  auto each = [&](auto f) { map<T>(I->sources, f); };
  switch (function) {
    case ADD: return each([&](int i) { return a(i) + b(i); });
    case SUB: return each([&](int i) { return a(i) - b(i); });
    case MUL: return each([&](int i) { return a(i) * b(i); });
    case DIV: return each([&](int i) { return a(i) / b(i); });
    case NEG: return each([&](int i) { return -a(i); });
    case ABS: return each([&](int i) { return std::fabs(a(i)); });
    case MIN:
    case MIN_NAN: return each([&](int i) { return least(a(i), b(i), function == MIN_NAN); });
    case MAX:
    case MAX_NAN: return each([&](int i) { return most(a(i), b(i), function == MAX_NAN); });
    case FMA: return each([&](int i) { return std::fma(a(i), b(i), c(i)); });
    case EX2: return each([&](int i) { return std::exp2(a(i)); });
    case LG2: return each([&](int i) { return std::log2(a(i)); });
    case RCP: return each([&](int i) { return T(1) / a(i); });
    case SQRT: return each([&](int i) { return std::sqrt(a(i)); });
    case RSQRT: return each([&](int i) { return 1.0 / std::sqrt(f64(a(i))); });
    case SIN: return each([&](int i) { return std::sin(f64(a(i))); });
    case COS: return each([&](int i) { return std::cos(f64(a(i))); });
    case TANH: return each([&](int i) { return std::tanh(f64(a(i))); });
    case COPYSIGN: return each([&](int i) { return std::copysign(b(i), a(i)); });
    default: fail(UNSUPPORTED, function);
  }
}

// Two fp32 in 64 bits (sm_100).
inline void Machine::alu_pair(int function) {
  auto one = [&](f32 a, f32 b, f32 c) -> f32 {
    switch (function) {
      case ADD: return a + b;
      case SUB: return a - b;
      case MUL: return a * b;
      case FMA: return std::fma(a, b, c);
      default: return fail(UNSUPPORTED, function), 0;
    }
  };
  map<u64>(I->sources, [&](int i) {
    u64 v[3] = {}, r = 0;
    for (int k = 0; k < I->sources; ++k) v[k] = source<u64>(k)[i];
    for (int h = 0; h < 64; h += 32) {
      auto half = [&](int k) { return bits<f32>(u32(v[k] >> h)); };
      r |= u64(bits<u32>(one(half(0), half(1), half(2)))) << h;
    }
    return r;
  });
  u32 known[2] = {ALL, ALL};
  for (int k = 0; k < I->sources; ++k)
    for (int h = 0; h < 2; ++h) known[h] &= half_defined(k, h);
  set_defined(to(0), m, known[0], known[1]);  // LLVM leaves one half of some open
}

// Halves, alone or packed: computed in more, rounded once.
inline void Machine::alu_half(int function, bool packed, bool bf16) {
  auto value = [&](int k, int i, int h) {
    if (k >= I->sources) return 0.0;
    u16 v = u16(source<u32>(k)[i] >> 16 * h);
    return f64(bf16 ? from_bf16(v) : from_f16(v));
  };
  auto one = [&](f64 a, f64 b, f64 c) -> f64 {
    switch (function) {
      case ADD: return a + b;
      case SUB: return a - b;
      case MUL: return a * b;
      case FMA: return a * b + c;
      case NEG: return -a;
      case ABS: return std::fabs(a);
      case MIN:
      case MIN_NAN: return least(a, b, function == MIN_NAN);
      case MAX:
      case MAX_NAN: return most(a, b, function == MAX_NAN);
      case EX2: return std::exp2(a);
      default: return fail(UNSUPPORTED, function), 0;
    }
  };
  map<u32>(I->sources, [&](int i) {
    u32 r = 0;
    for (int h = 0; h <= packed; ++h) {
      f32 v = f32(one(value(0, i, h), value(1, i, h), value(2, i, h)));
      r |= u32(bf16 ? to_bf16(v) : to_f16(v)) << 16 * h;
    }
    return r;
  });
}

inline void Machine::alu() {
  int function = I->flags >> 5;
  switch (I->flags & 31) {
    case U16: return alu_integer<u16>(function);
    case S16: return alu_integer<s16>(function);
    case U32: return alu_integer<u32>(function);
    case S32: return alu_integer<s32>(function);
    case U64: return alu_integer<u64>(function);
    case S64: return alu_integer<s64>(function);
    case F32: return alu_float<f32>(function);
    case F64: return alu_float<f64>(function);
    case F16: return alu_half(function, false, false);
    case BF16: return alu_half(function, false, true);
    case F16X2: return alu_half(function, true, false);
    case BF16X2: return alu_half(function, true, true);
    case F32X2: return alu_pair(function);
    default: fail(UNSUPPORTED, I->flags & 31);
  }
}

// Add, subtract, multiply-add with carry. flags: which, then bits for a carry in and out.
inline void Machine::add_carry() {
  u32 r[LANES], out = 0;
  for (int i = 0; i < LANES; ++i) {
    u64 a = source<u32>(0)[i], b = source<u32>(1)[i], v;
    u64 in = I->flags >> 4 & 1 ? w->carry >> i & 1 : 0;
    int which = I->flags & 15;
    if (which < 2) {
      v = which == 0 ? a + b + in : a - b - in;
    } else {
      u64 product = a * b;
      v = (which == 2 ? u32(product) : product >> 32) + source<u32>(2)[i] + in;
    }
    r[i] = u32(v);
    out |= u32(v >> 32 & 1) << i;
  }
  if (I->flags >> 5 & 1) w->carry = (w->carry & ~m) | (out & m);
  put<u32>(0, r, all_defined());
}

// -- bits -----------------------------------------------------------------------------------------

static inline u32 extract(u32 a, u32 from, u32 length, bool is_signed) {
  from &= 255, length &= 255;
  u32 top = is_signed && length ? a >> std::min(from + length - 1, 31u) & 1 : 0, r = 0;
  for (u32 k = 0; k < 32; ++k) r |= (k < length && from + k < 32 ? a >> (from + k) & 1 : top) << k;
  return r;
}
static inline u32 insert(u32 a, u32 r, u32 from, u32 length) {
  for (u32 k = 0, at = from & 255; k < (length & 255) && at + k < 32; ++k)
    r = (r & ~(1u << (at + k))) | (a >> k & 1) << (at + k);
  return r;
}
static inline u32 permute(u32 a, u32 b, u32 selector) {
  u64 bytes = u64(b) << 32 | a;
  u32 r = 0;
  for (int k = 0; k < 4; ++k) {
    u32 s = selector >> 4 * k & 15;
    u8 x = u8(bytes >> 8 * (s & 7));
    r |= u32(s & 8 ? (x & 0x80 ? 0xff : 0) : x) << 8 * k;
  }
  return r;
}
static inline u32 reverse(u32 a) {
  u32 r = 0;
  for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
  return r;
}
static inline u32 look_up(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}

inline void Machine::select_bits() {
  auto s = [&](int k, int i) { return source<u32>(k)[i]; };
  map<u32>(I->sources, [&](int i) -> u32 {
    switch (I->op) {
      case OP_prmt: return permute(s(0, i), s(1, i), s(2, i));
      case OP_lop3: return look_up(s(0, i), s(1, i), s(2, i), u32(I->imm));
      case OP_bfe_u32: return extract(s(0, i), s(1, i), s(2, i), false);
      case OP_bfe_s32: return extract(s(0, i), s(1, i), s(2, i), true);
      case OP_bfi_b32: return insert(s(0, i), s(1, i), s(2, i), s(3, i));
      case OP_popc_b32: return __builtin_popcount(s(0, i));
      case OP_clz_b32: return s(0, i) ? __builtin_clz(s(0, i)) : 32;
      case OP_brev_b32: return reverse(s(0, i));
      default: {  // shf, of a pair of words; clamped or wrapped
        u32 by = I->flags ? std::min(s(2, i), 32u) : s(2, i) & 31;
        u64 pair = u64(s(1, i)) << 32 | s(0, i);
        return I->op == OP_shf_l ? u32((pair << by) >> 32) : u32(pair >> by);
      }
    }
  });
}

// -- comparisons and conversions ------------------------------------------------------------------

template <class T>
inline void Machine::compare(int comparison) {
  u32 v = 0;
  for (int i = 0; i < LANES; ++i) {
    auto a = lane_of<T>(raw(0), i), b = lane_of<T>(raw(1), i);
    bool nan = a != a || b != b, r = false;
    switch (comparison) {
      case EQ: r = a == b; break;
      case NE: r = !nan && a != b; break;
      case LT: r = a < b; break;
      case LE: r = a <= b; break;
      case GT: r = a > b; break;
      case GE: r = a >= b; break;
      case EQU: r = nan || a == b; break;
      case NEU: r = nan || a != b; break;
      case LTU: r = nan || a < b; break;
      case LEU: r = nan || a <= b; break;
      case GTU: r = nan || a > b; break;
      case GEU: r = nan || a >= b; break;
      case NUM: r = !nan; break;
      case NAN_: r = nan; break;
    }
    v |= u32(r) << i;
  }
  if (I->sources > 2) {  // joined to a predicate
    u32 p = *source<u32>(2);
    v = I->imm == 1 ? v & p : I->imm == 2 ? v | p : v ^ p;
  }
  u32 d = all_defined();
  put_predicate(0, v, d);
  if (I->destinations > 1) put_predicate(1, ~v, d);
}

static inline f64 rounded(f64 v, int mode) {
  return mode == 1   ? std::trunc(v)
         : mode == 2 ? std::floor(v)
         : mode == 3 ? std::ceil(v)
                     : std::nearbyint(v);
}
// To an integer type, clamped as PTX does it; NaN is 0.
template <class T>
static inline u64 to_integer(f64 v, int mode) {
  constexpr f64 LOW = f64(std::numeric_limits<T>::min());
  constexpr f64 HIGH = f64(std::numeric_limits<T>::max());
  f64 r = rounded(v, mode);
  if (r != r) return 0;
  return u64(r >= HIGH  ? std::numeric_limits<T>::max()
             : r <= LOW ? std::numeric_limits<T>::min()
                        : T(r));
}

// flags: type to, type of, rounding mode, saturation, to an integral value.
inline void Machine::convert() {
  int into = I->flags & 31, from = I->flags >> 5 & 31, mode = I->flags >> 10 & 7;
  bool saturate = I->flags >> 13 & 1, integral = I->flags >> 14 & 1;
  bool is_float = from == F16 || from == BF16 || from == F32 || from == F64;
  u64 r[LANES];
  for (int i = 0; i < LANES; ++i) {
    u64 v = wide_source(0, i), n = v;  // a wider register counts by its low part
    f64 x = 0;
    switch (from) {
      case U8: n = u8(v); break;
      case S8: n = u64(s64(int8_t(v))); break;
      case U16: n = u16(v); break;
      case S16: n = u64(s64(s16(v))); break;
      case U32: n = u32(v); break;
      case S32: n = u64(s64(s32(v))); break;
      case F16: x = from_f16(u16(v)); break;
      case BF16: x = from_bf16(u16(v)); break;
      case F32: x = bits<f32>(u32(v)); break;
      case F64: x = bits<f64>(v); break;
    }
    if (!is_float) x = from == U64 ? f64(n) : f64(s64(n));
    switch (into) {
      case U8: r[i] = u8(is_float ? to_integer<u8>(x, mode) : n); break;
      case S8: r[i] = u32(int8_t(is_float ? to_integer<int8_t>(x, mode) : n)); break;
      case U16: r[i] = u16(is_float ? to_integer<u16>(x, mode) : n); break;
      case S16: r[i] = u16(is_float ? to_integer<s16>(x, mode) : n); break;
      case U32: r[i] = u32(is_float ? to_integer<u32>(x, mode) : n); break;
      case S32: r[i] = u32(is_float ? to_integer<s32>(x, mode) : n); break;
      case U64: r[i] = is_float ? to_integer<u64>(x, mode) : n; break;
      case S64: r[i] = is_float ? to_integer<s64>(x, mode) : n; break;
      case F16: r[i] = bits<u16>(f16(x)); break;
      case BF16: r[i] = to_bf16(f32(x)); break;
      case F32: {
        f32 v32 = !is_float   ? (from == U64 ? f32(n) : f32(s64(n)))
                  : integral  ? f32(rounded(x, mode))
                  : mode == 1 ? toward_zero(x)
                              : f32(x);
        if (saturate) v32 = v32 > 0 ? std::min(v32, 1.0f) : 0;
        r[i] = bits<u32>(v32);
        break;
      }
      case F64: r[i] = bits<u64>(integral ? rounded(x, mode) : x); break;
      case TF32: r[i] = (bits<u32>(f32(x)) + 0x1000) & 0xffffe000u; break;  // half away from zero
      default: return fail(UNSUPPORTED, into);
    }
    if (to(0).width == 8 && into == S32) r[i] = u64(s64(s32(r[i])));
    if (to(0).width == 8 && into == S16) r[i] = u64(s64(s16(r[i])));
  }
  bool low = !is_float && to(0).width == 4;  // the rest of a wider register is not asked
  put_lanes(0, r, low ? half_defined(0, false) : defined(0));
}

inline void Machine::convert_pair(u16 (*round)(f32)) {
  const f32 *a = source<f32>(0), *b = source<f32>(1);
  map<u32>(2, [&](int i) { return u32(round(a[i])) << 16 | round(b[i]); });
}
