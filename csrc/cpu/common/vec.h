// fp32 vectors for the kernels, based on GCC/clang vector extensions: the -m flags turn the same
// source into AVX-512, AVX2 or baseline code. Everything here has internal linkage, and no header
// of torch or the STL is included: if objects of different instruction sets shared an inline
// function, the linker could keep the AVX-512 copy for all of them.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTVDM_VBYTES 64
#elif defined(__AVX2__)
#define FASTVDM_VBYTES 32
#else
#define FASTVDM_VBYTES 16
#endif

#define FASTVDM_INLINE static inline __attribute__((always_inline))
// For functions that several templates call: compiled once. `unused`, as not every file calls all.
#define FASTVDM_NOINLINE static __attribute__((noinline, unused))

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

constexpr int VL = FASTVDM_VBYTES / 4;
typedef float vf __attribute__((vector_size(FASTVDM_VBYTES)));
typedef int32_t vi __attribute__((vector_size(FASTVDM_VBYTES)));
typedef uint32_t vu __attribute__((vector_size(FASTVDM_VBYTES)));
typedef uint16_t vh __attribute__((vector_size(FASTVDM_VBYTES / 2)));

// Storage types.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTVDM_INLINE vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
FASTVDM_INLINE vi as_int(vf x) { return (vi)x; }
FASTVDM_INLINE vf as_float(vi x) { return (vf)x; }

// ---- loads and stores of one vector -------------------------------------------------------------
FASTVDM_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FASTVDM_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }

FASTVDM_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)  // one instruction widens; GCC 12 makes four from convertvector
  return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  vh h;
  memcpy(&h, p, sizeof(h));
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
// The bits of the nearest bf16 (ties to even) in the low half; a NaN keeps its sign and becomes
// quiet.
FASTVDM_INLINE vu bf16_bits(vf v) {
  const vu u = (vu)v, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (v == v) ? r : ((u >> 16) | 0x40u);
}
FASTVDM_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // zero below 2⁻¹²⁶
#else
  const vh h = __builtin_convertvector(bf16_bits(v), vh);
#endif
  memcpy(p, &h, sizeof(h));
}

#if defined(__AVX512F__)
FASTVDM_INLINE vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
FASTVDM_INLINE void store(f16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FASTVDM_INLINE vf load(const f16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FASTVDM_INLINE void store(f16* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// ---- one element --------------------------------------------------------------------------------
FASTVDM_INLINE float to_f32(float x) { return x; }
FASTVDM_INLINE float to_f32(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FASTVDM_INLINE float to_f32(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t u;
  float f;
  if (rest >= 0x7c00) {
    u = sign | 0x7f800000u | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    u = sign | ((rest << 13) + (112u << 23));
  } else {
    f = (float)rest * 5.9604644775390625e-08f;  // 2^-24
    memcpy(&u, &f, 4);
    u |= sign;
  }
  memcpy(&f, &u, 4);
  return f;
}
FASTVDM_INLINE void put(float* p, float x) { *p = x; }
FASTVDM_INLINE void put(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = (uint16_t)(x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
}
FASTVDM_INLINE void put(f16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  uint32_t h;
  if (mag > 0x7f800000u) {
    h = 0x7e00u;
  } else if (mag >= 0x477ff000u) {  // rounds to 65520 and above: infinity
    h = 0x7c00u;
  } else if (mag >= 0x38800000u) {
    h = (mag - (112u << 23) + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    float f;
    memcpy(&f, &mag, 4);
    f += 0.5f;
    memcpy(&h, &f, 4);
    h -= 0x3f000000u;
  }
  p->bits = (uint16_t)(h | sign);
}

#if !defined(__AVX2__) && !defined(__AVX512F__)
FASTVDM_NOINLINE vf load(const f16* p) {
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_f32(p[i]);
  return v;
}
FASTVDM_NOINLINE void store(f16* p, vf v) {
  for (int i = 0; i < VL; ++i) put(p + i, v[i]);
}
#endif

// ---- the first n < VL elements; others are neither read nor written -----------------------------
// Without masks these are loops, whose copies in unrolled code would take most of the compile time
// of a file, so the baseline calls them.
#if defined(__AVX2__) || defined(__AVX512F__)
#define FASTVDM_PARTIAL FASTVDM_INLINE
#else
#define FASTVDM_PARTIAL FASTVDM_NOINLINE
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
FASTVDM_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif
template <class T>
FASTVDM_PARTIAL vf load_n(const T* p, int n) {
#if defined(__AVX512F__)
  const __mmask16 m = (__mmask16)((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(m, p);
  alignas(64) T part[VL];
  _mm256_store_si256((__m256i*)part, _mm256_maskz_loadu_epi16(m, p));
  return load(part);
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (vf)_mm256_maskload_ps(p, first_lanes(n));
#endif
  T part[VL] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
#endif
}
template <class T>
FASTVDM_PARTIAL void store_n(T* p, vf v, int n) {
#if defined(__AVX512F__)
  const __mmask16 m = (__mmask16)((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, m, (__m512)v);
  } else {
    alignas(64) T part[VL];
    store(part, v);
    _mm256_mask_storeu_epi16(p, m, _mm256_load_si256((const __m256i*)part));
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#endif
  T part[VL];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
#endif
}

// body(offset, count) over n elements: whole vectors, then the rest.
#define FASTVDM_LOAD(p, i, n) ((n) == VL ? load((p) + (i)) : load_n((p) + (i), (n)))
#define FASTVDM_STORE(p, i, v, n)   \
  do {                              \
    if ((n) == VL)                  \
      store((p) + (i), (v));        \
    else                            \
      store_n((p) + (i), (v), (n)); \
  } while (0)

// ---- arithmetic ---------------------------------------------------------------------------------
FASTVDM_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
FASTVDM_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
FASTVDM_INLINE float hsum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0.f;
  for (int w = VL / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) v[i] += v[i + w];
  s = v[0];
  return s;
#endif
}
FASTVDM_INLINE float hmax(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  for (int w = VL / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) v[i] = v[i] > v[i + w] ? v[i] : v[i + w];
  return v[0];
#endif
}

}  // namespace
}  // namespace FASTVDM_ISA
}  // namespace fastvdm

// Runs `fn<T>(...)` for the storage type of dtype: 0 fp32, 1 bf16, 2 fp16.
#define FASTVDM_BY_DTYPE(dtype, fn, ...)   \
  switch (dtype) {                         \
    case 0: fn<float>(__VA_ARGS__); break; \
    case 1: fn<bf16>(__VA_ARGS__); break;  \
    default: fn<f16>(__VA_ARGS__);         \
  }
