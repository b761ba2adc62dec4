// norm_act: norm → affine → FiLM → SiLU → dropout → + residual, forward and backward.
// Group kind: one pass for the statistics (shifted sums of each channel in a chunk, merged by
// Chan's formula), one to apply them. Row kinds (rms, layer): one pass; the row stays in L1.
#include "norm_act.h"

#include "common/exp.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

struct Item {
  int64_t instance, row, rows;  // row: the first one, counted over the whole tensor
};

FASTVDM_INLINE Item item_of(const NormArgs& p, int64_t i) {
  const int64_t instance = i / p.chunks, k = i % p.chunks;
  const int64_t first = k * p.chunk;
  const int64_t left = p.rows - first;
  return {instance, instance * p.rows + first, left < p.chunk ? left : p.chunk};
}

constexpr int kRows = 4;  // rows whose statistics are interleaved; each is a dependency chain

// Interleaved vectors of the backward; more would not fit the sixteen registers of AVX2.
constexpr int kBackward = VL == 16 ? 4 : 1;

// body<vectors>(offset, count) over the n elements of a segment: N vectors at a time, whose
// activations are interleaved, then single vectors, of which the last has `count` elements.
template <int N, class Body>
FASTVDM_INLINE void in_groups(int n, Body body) {
  int i = 0;
  for (; N > 1 && i + N * VL <= n; i += N * VL) body.template operator()<N>(i, VL);
  for (; i + VL <= n; i += VL) body.template operator()<1>(i, VL);
  if (i < n) body.template operator()<1>(i, n - i);
}

// body(offset, count) over the n elements of a segment.
template <class Body>
FASTVDM_INLINE void each(int n, Body body) {
  int i = 0;
  for (; i + VL <= n; i += VL) body(i, VL);
  if (i < n) body(i, n - i);
}

template <class T>
FASTVDM_INLINE vf mask_at(const NormArgs& p, int64_t at, int n) {
  if (p.mask_kind == 1) return FASTVDM_LOAD((const T*)p.mask, at, n);
  if (p.mask_kind == 2) return FASTVDM_LOAD((const float*)p.mask, at, n);
  const uint8_t* m = (const uint8_t*)p.mask + at;
  float f[VL] = {};
  for (int i = 0; i < n; ++i) f[i] = (float)m[i];
  return load(f);
}

// Whether a channel's mean is further from the shift than its spread, so that q - s²/rows cancels.
FASTVDM_INLINE bool far_off(const float* s, const float* q, int n, int64_t rows) {
  for (int i = 0; i < n; ++i) {
    if (s[i] * s[i] > 0.5f * q[i] * (float)rows) return true;
  }
  return false;
}

// Mean and M2 of each group of an item. Values are shifted by the mean of the first rows, so that a
// large mean costs no digits. If these rows were not representative (an outlier, an edge), it is
// repeated with the mean that was found.
template <class T>
void stats(const NormArgs& p, int64_t begin, int64_t end, float* scratch) {
  const int C = p.c1 + p.c2;
  float *k = scratch, *s = scratch + C, *q = scratch + 2 * C;
  for (int64_t i = begin; i < end; ++i) {
    const Item it = item_of(p, i);
    for (int seg = 0; seg < 2; ++seg) {
      const int c = seg ? p.c2 : p.c1, c0 = seg ? p.c1 : 0;
      if (c == 0) continue;
      const T* x = (const T*)(seg ? p.x2 : p.x) + it.row * c;
      each(c, [&](int o, int n) {
        const vf first = FASTVDM_LOAD(x, o, n);
        FASTVDM_STORE(k + c0, o, first, n);
        FASTVDM_STORE(s + c0, o, vf{}, n);
        FASTVDM_STORE(q + c0, o, vf{}, n);
      });
      const int64_t head = it.rows < 16 ? it.rows : 16;
      for (int64_t r = 1; r < head; ++r) {
        each(c, [&](int o, int n) {
          const vf d = FASTVDM_LOAD(x + r * c, o, n) - FASTVDM_LOAD(x, o, n);
          FASTVDM_STORE(k + c0, o, FASTVDM_LOAD(k + c0, o, n) + d * (1.f / (float)head), n);
        });
      }
      for (int attempt = 0; attempt < 2; ++attempt) {
        int64_t r = 0;
        for (; r + 4 <= it.rows; r += 4) {
          const T* row = x + r * c;
          each(c, [&](int o, int n) {
            const vf shift = FASTVDM_LOAD(k + c0, o, n);
            const vf d0 = FASTVDM_LOAD(row, o, n) - shift;
            const vf d1 = FASTVDM_LOAD(row + c, o, n) - shift;
            const vf d2 = FASTVDM_LOAD(row + 2 * (int64_t)c, o, n) - shift;
            const vf d3 = FASTVDM_LOAD(row + 3 * (int64_t)c, o, n) - shift;
            const vf sum = FASTVDM_LOAD(s + c0, o, n) + ((d0 + d1) + (d2 + d3));
            const vf sq = FASTVDM_LOAD(q + c0, o, n) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3));
            FASTVDM_STORE(s + c0, o, sum, n);
            FASTVDM_STORE(q + c0, o, sq, n);
          });
        }
        for (; r < it.rows; ++r) {
          const T* row = x + r * c;
          each(c, [&](int o, int n) {
            const vf d = FASTVDM_LOAD(row, o, n) - FASTVDM_LOAD(k + c0, o, n);
            FASTVDM_STORE(s + c0, o, FASTVDM_LOAD(s + c0, o, n) + d, n);
            FASTVDM_STORE(q + c0, o, FASTVDM_LOAD(q + c0, o, n) + d * d, n);
          });
        }
        if (attempt == 1 || !far_off(s + c0, q + c0, c, it.rows)) break;
        each(c, [&](int o, int n) {
          const vf more = FASTVDM_LOAD(s + c0, o, n) * (1.f / (float)it.rows);
          FASTVDM_STORE(k + c0, o, FASTVDM_LOAD(k + c0, o, n) + more, n);
          FASTVDM_STORE(s + c0, o, vf{}, n);
          FASTVDM_STORE(q + c0, o, vf{}, n);
        });
      }
    }
    const int per = C / p.groups;
    const double n = (double)it.rows;
    for (int g = 0; g < p.groups; ++g) {
      double mean = 0, m2 = 0;
      for (int c = g * per; c < (g + 1) * per; ++c) mean += (double)k[c] + s[c] / n;
      mean /= per;
      for (int c = g * per; c < (g + 1) * per; ++c) {
        const double d = (double)k[c] + s[c] / n - mean;
        const double own = (double)q[c] - (double)s[c] * s[c] / n;
        m2 += (own > 0 ? own : 0) + n * d * d;
      }
      p.part1[i * p.groups + g] = (float)mean;
      p.part2[i * p.groups + g] = (float)m2;
    }
  }
}

// mean and 1/std of a row of both segments, or 0 and 1/norm. `clamped`: the norm is below eps.
template <class T>
FASTVDM_INLINE void row_stats(const NormArgs& p, const T* x, const T* x2, float* mean, float* inv,
                              bool* clamped) {
  const int C = p.c1 + p.c2;
  float m = 0.f;
  if (p.row_kind == 2) {
    vf s = {};
    each(p.c1, [&](int o, int n) { s += FASTVDM_LOAD(x, o, n); });
    each(p.c2, [&](int o, int n) { s += FASTVDM_LOAD(x2, o, n); });
    m = hsum(s) / (float)C;
  }
  vf q = {};
  const auto square = [&](const T* row, int o, int n) {
    vf d = FASTVDM_LOAD(row, o, n) - m;
    if (n < VL) {  // lanes beyond the row contain 0 - m
      float lane[VL];
      store(lane, d);
      for (int i = n; i < VL; ++i) lane[i] = 0.f;
      d = load(lane);
    }
    q += d * d;
  };
  each(p.c1, [&](int o, int n) { square(x, o, n); });
  each(p.c2, [&](int o, int n) { square(x2, o, n); });
  const float sum = hsum(q);
  *mean = m;
  *clamped = false;
  if (p.row_kind == 2) {
    *inv = 1.f / __builtin_sqrtf(sum / (float)C + p.eps);
  } else {
    const float norm = __builtin_sqrtf(sum);
    *clamped = norm < p.eps;
    *inv = 1.f / (*clamped ? p.eps : norm);
  }
}

template <class T, bool ACT>
void apply(const NormArgs& p, int64_t begin, int64_t end) {
  const int C = p.c1 + p.c2;
  float mean[kRows], inv[kRows];  // for the row kinds
  for (int64_t i = begin; i < end; ++i) {
    const Item it = item_of(p, i);
    const float *a = p.a + it.instance * C, *b = p.b + it.instance * C;
    const float* mu = p.mu == nullptr ? nullptr : p.mu + it.instance * C;
    for (int64_t first = it.row; first < it.row + it.rows; first += kRows) {
      const int64_t left = it.row + it.rows - first, rows = left < kRows ? left : kRows;
      const T* x = (const T*)p.x + first * p.c1;
      const T* x2 = (const T*)p.x2 + first * p.c2;
      bool clamped;
      for (int k = 0; k < rows && p.row_kind != 0; ++k)
        row_stats(p, x + k * p.c1, x2 + k * p.c2, mean + k, inv + k, &clamped);
      for (int k = 0; k < rows; ++k, x += p.c1, x2 += p.c2) {
        const auto segment = [&](const T* row, int c0, int width) __attribute__((always_inline)) {
          const auto body = [&]<int N>(int o, int n) __attribute__((always_inline)) {
            const int64_t at = (first + k) * C + c0 + o;
            vf v[N], s[N];
#pragma GCC unroll 4
            for (int l = 0; l < N; ++l) {
              const int c = c0 + o + l * VL;
              v[l] = FASTVDM_LOAD(row, o + l * VL, n);
              if (mu != nullptr)
                v[l] = v[l] - FASTVDM_LOAD(mu, c, n);
              else
                v[l] = (v[l] - mean[k]) * inv[k];
              s[l] = v[l] = v[l] * FASTVDM_LOAD(a, c, n) + FASTVDM_LOAD(b, c, n);
            }
            if (ACT) vsigmoid_each<kDegree<T>>(s);
#pragma GCC unroll 4
            for (int l = 0; l < N; ++l) {
              if (ACT) v[l] = v[l] * s[l];
              if (p.mask_kind) v[l] = v[l] * mask_at<T>(p, at + l * VL, n);
              if (p.residual != nullptr)
                v[l] = v[l] + FASTVDM_LOAD((const T*)p.residual, at + l * VL, n);
              FASTVDM_STORE((T*)p.y, at + l * VL, v[l], n);
            }
          };
          in_groups<4>(width, body);
        };
        segment(x, 0, p.c1);
        segment(x2, p.c1, p.c2);
      }
    }
  }
}

// du, the gradient before the activation, for vectors x_hat `h`; dy starts at `at`.
template <class T, bool ACT, int N>
FASTVDM_INLINE void grad_u(const NormArgs& p, const vf (&h)[N], const vf (&a)[N], const float* b,
                           int64_t at, int n, vf (&g)[N]) {
  vf u[N], s[N];
#pragma GCC unroll 4
  for (int l = 0; l < N; ++l) {
    g[l] = FASTVDM_LOAD((const T*)p.dy, at + l * VL, n);
    if (p.mask_kind) g[l] = g[l] * mask_at<T>(p, at + l * VL, n);
    if (ACT) s[l] = u[l] = h[l] * a[l] + FASTVDM_LOAD(b, l * VL, n);
  }
  if (!ACT) return;
  vsigmoid_each<kDegree<T>>(s);
#pragma GCC unroll 4
  for (int l = 0; l < N; ++l) g[l] = g[l] * (s[l] * (1.f + u[l] * (1.f - s[l])));
}

template <class T, bool ACT>
void bwd_sums(const NormArgs& p, int64_t begin, int64_t end, float* scratch) {
  const int C = p.c1 + p.c2;
  float *hat = scratch, *ag = scratch + C;  // one row, for the row kinds
  for (int64_t i = begin; i < end; ++i) {
    const Item it = item_of(p, i);
    const float *a = p.a + it.instance * C, *b = p.b + it.instance * C;
    const float* mu = p.mu == nullptr ? nullptr : p.mu + it.instance * C;
    const float* inv_c = p.inv == nullptr ? nullptr : p.inv + it.instance * C;
    float *sum_g = p.part1 + i * C, *sum_gx = p.part2 + i * C;
    memset(sum_g, 0, sizeof(float) * C);
    memset(sum_gx, 0, sizeof(float) * C);
    for (int64_t r = it.row; r < it.row + it.rows; ++r) {
      const T* x = (const T*)p.x + r * p.c1;
      const T* x2 = (const T*)p.x2 + r * p.c2;
      float mean = 0.f, inv = 1.f;
      bool clamped = false;
      if (p.row_kind != 0) row_stats(p, x, x2, &mean, &inv, &clamped);
      vf s1 = {}, s2 = {};
      const auto segment = [&](const T* row, int c0, int width) __attribute__((always_inline)) {
        const auto body = [&]<int N>(int o, int n) __attribute__((always_inline)) {
          vf h[N], g[N], av[N];
#pragma GCC unroll 4
          for (int l = 0; l < N; ++l) {
            const int c = c0 + o + l * VL;
            av[l] = FASTVDM_LOAD(a, c, n);
            h[l] = FASTVDM_LOAD(row, o + l * VL, n);
            h[l] = mu != nullptr ? (h[l] - FASTVDM_LOAD(mu, c, n)) * FASTVDM_LOAD(inv_c, c, n)
                                 : (h[l] - mean) * inv;
          }
          grad_u<T, ACT>(p, h, av, b + c0 + o, r * C + c0 + o, n, g);
#pragma GCC unroll 4
          for (int l = 0; l < N; ++l) {
            const int c = c0 + o + l * VL;
            FASTVDM_STORE(sum_g, c, FASTVDM_LOAD(sum_g, c, n) + g[l], n);
            FASTVDM_STORE(sum_gx, c, FASTVDM_LOAD(sum_gx, c, n) + g[l] * h[l], n);
            if (p.row_kind != 0) {  // beyond n, a is zero and so is a g
              const vf scaled = av[l] * g[l];
              s1 += scaled;
              s2 += scaled * h[l];
              FASTVDM_STORE(hat, c, h[l], n);
              FASTVDM_STORE(ag, c, scaled, n);
            }
          }
        };
        in_groups<kBackward>(width, body);
      };
      segment(x, 0, p.c1);
      segment(x2, p.c1, p.c2);
      if (p.row_kind == 0 || p.dx == nullptr) continue;
      const float m1 = p.row_kind == 2 ? hsum(s1) / (float)C : 0.f;
      const float m2 = clamped ? 0.f : p.row_kind == 2 ? hsum(s2) / (float)C : hsum(s2);
      const auto write = [&](T* row, int c0, int o, int n) __attribute__((always_inline)) {
        const vf v = FASTVDM_LOAD(ag, c0 + o, n) - m1 - FASTVDM_LOAD(hat, c0 + o, n) * m2;
        FASTVDM_STORE(row, o, v * inv, n);
      };
      T *dx = (T*)p.dx + r * p.c1, *dx2 = (T*)p.dx2 + r * p.c2;
      each(p.c1, [&](int o, int n) { write(dx, 0, o, n); });
      each(p.c2, [&](int o, int n) { write(dx2, p.c1, o, n); });
    }
  }
}

template <class T, bool ACT>
void bwd_dx(const NormArgs& p, int64_t begin, int64_t end) {
  const int C = p.c1 + p.c2;
  for (int64_t i = begin; i < end; ++i) {
    const Item it = item_of(p, i);
    const int64_t base = it.instance * C;
    for (int64_t r = it.row; r < it.row + it.rows; ++r) {
      for (int seg = 0; seg < 2; ++seg) {
        const int width = seg ? p.c2 : p.c1, c0 = seg ? p.c1 : 0;
        const T* row = (const T*)(seg ? p.x2 : p.x) + r * width;
        T* dx = (T*)(seg ? p.dx2 : p.dx) + r * width;
        const auto body = [&]<int N>(int o, int n) __attribute__((always_inline)) {
          const int64_t c = base + c0 + o;
          vf h[N], g[N], av[N];
#pragma GCC unroll 4
          for (int l = 0; l < N; ++l) {
            av[l] = FASTVDM_LOAD(p.a, c + l * VL, n);
            h[l] = (FASTVDM_LOAD(row, o + l * VL, n) - FASTVDM_LOAD(p.mu, c + l * VL, n)) *
                   FASTVDM_LOAD(p.inv, c + l * VL, n);
          }
          grad_u<T, ACT>(p, h, av, p.b + c, r * C + c0 + o, n, g);
#pragma GCC unroll 4
          for (int l = 0; l < N; ++l) {
            const int64_t at = c + l * VL;
            const vf v =
                av[l] * g[l] - FASTVDM_LOAD(p.s1, at, n) - h[l] * FASTVDM_LOAD(p.s2, at, n);
            FASTVDM_STORE(dx, o + l * VL, v * FASTVDM_LOAD(p.inv, at, n), n);
          }
        };
        in_groups<kBackward>(width, body);
      }
    }
  }
}

template <class T>
void apply_t(const NormArgs& p, int64_t b, int64_t e) {
  p.act ? apply<T, true>(p, b, e) : apply<T, false>(p, b, e);
}
template <class T>
void sums_t(const NormArgs& p, int64_t b, int64_t e, float* s) {
  p.act ? bwd_sums<T, true>(p, b, e, s) : bwd_sums<T, false>(p, b, e, s);
}
template <class T>
void dx_t(const NormArgs& p, int64_t b, int64_t e) {
  p.act ? bwd_dx<T, true>(p, b, e) : bwd_dx<T, false>(p, b, e);
}

}  // namespace

void norm_stats(const NormArgs& p, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(p.dtype, stats, p, begin, end, scratch)
}
void norm_apply(const NormArgs& p, int64_t begin, int64_t end) {
  FASTVDM_BY_DTYPE(p.dtype, apply_t, p, begin, end)
}
void norm_bwd_sums(const NormArgs& p, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(p.dtype, sums_t, p, begin, end, scratch)
}
void norm_bwd_dx(const NormArgs& p, int64_t begin, int64_t end) {
  FASTVDM_BY_DTYPE(p.dtype, dx_t, p, begin, end)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
