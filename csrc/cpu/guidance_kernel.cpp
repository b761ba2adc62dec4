// The two elementwise ends of a guided sampling step; formulas in fastvdm/reference/guidance.py.
#include "guidance.h"

#include "common/vec.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

template <class T>
void widen(const T* from, int64_t stride, int n, float* to) {
  if (stride == 1) {
    for (int i = 0; i < n; i += VL) {
      const int m = n - i < VL ? n - i : VL;
      store(to + i, FASTVDM_LOAD(from, i, m));
    }
  } else {
    for (int i = 0; i < n; ++i) to[i] = to_f32(from[i * stride]);
  }
}
template <class T>
void narrow(const float* from, int64_t stride, int n, T* to) {
  if (stride == 1) {
    for (int i = 0; i < n; i += VL) {
      const int m = n - i < VL ? n - i : VL;
      FASTVDM_STORE(to, i, load(from + i), m);
    }
  } else {
    for (int i = 0; i < n; ++i) put(to + i * stride, from[i]);
  }
}
template <class T>
void widen_at(const Strided& t, int64_t at, int n, float* to) {
  widen((const T*)t.data + at, t.w, n, to);
}
template <class T>
void narrow_at(const Strided& t, int64_t at, int n, const float* from) {
  narrow(from, t.w, n, (T*)t.data + at);
}

struct Row {
  int64_t b, c, f, h;  // h: of the low resolution if there is one
};

FASTVDM_INLINE Row row_of(const GuidanceArgs& a, int64_t item) {
  const int64_t rows = a.height / a.factor;
  Row r;
  r.h = item % rows, item /= rows;
  r.f = item % a.frames, item /= a.frames;
  r.c = item % a.channels, r.b = item / a.channels;
  return r;
}
FASTVDM_INLINE int64_t offset(const Strided& t, const Row& r, int64_t h) {
  return r.b * t.b + r.c * t.c + r.f * t.f + h * t.h;
}

FASTVDM_INLINE vf clamp(vf x, vf s) { return vmin(s, vmax(-s, x)); }  // this order keeps NaN

// The first two words of Philox-4x32-10 at counter (element, step, 0), one element per lane.
FASTVDM_INLINE void philox(uint64_t key, uint64_t element, uint32_t step, uint32_t* a,
                           uint32_t* b) {
  uint32_t c0[VL], c1[VL], c2[VL], c3[VL];
  for (int l = 0; l < VL; ++l) {
    c0[l] = (uint32_t)(element + l), c1[l] = (uint32_t)((element + l) >> 32);
    c2[l] = step, c3[l] = 0;
  }
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < VL; ++l) {
      const uint64_t p = (uint64_t)0xD2511F53u * c0[l], q = (uint64_t)0xCD9E8D57u * c2[l];
      c0[l] = (uint32_t)(q >> 32) ^ c1[l] ^ k0, c1[l] = (uint32_t)q;
      c2[l] = (uint32_t)(p >> 32) ^ c3[l] ^ k1, c3[l] = (uint32_t)p;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  memcpy(a, c0, sizeof(c0));
  memcpy(b, c1, sizeof(c1));
}

FASTVDM_NOINLINE void normals(uint64_t key, uint64_t element, uint32_t step, int n, float* out) {
  for (int i = 0; i < n; i += VL) {
    uint32_t a[VL], b[VL];
    philox(key, element + i, step, a, b);
    for (int l = 0; l < VL; ++l) {
      const float u = ((float)(a[l] >> 9) + 0.5f) * 0x1p-23f;
      const float v = ((float)(b[l] >> 9) + 0.5f) * 0x1p-23f;
      out[i + l] =
          __builtin_sqrtf(-2.f * __builtin_logf(u)) * __builtin_cosf(6.2831853071795865f * v);
    }
  }
}

}  // namespace

void guidance_seed(const GuidanceArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int k = a.factor, width = (int)a.width;
  const int64_t line = a.width + 16, plane = a.height * a.width;
  const vf one = splat(1.f);
  float *raw = scratch, *spread = raw + k * line, *r_out = spread + line;
  for (int64_t item = begin; item < end; ++item) {
    const Row at = row_of(a, item);
    const float* coef = a.coef + at.b * 4;
    const int64_t image = ((at.b * a.channels + at.c) * a.frames + at.f) * plane;
    for (int dh = 0; dh < k; ++dh) {
      float* line_of = raw + dh * line;
      const int64_t from = offset(a.out, at, at.h * k + dh);
      FASTVDM_BY_DTYPE(a.out.dtype, widen_at, a.out, from, width, line_of)
      const float* z = a.z + image + (at.h * k + dh) * a.width;
      for (int i = 0; i < width; i += VL) {
        const int n = width - i < VL ? width - i : VL;
        store(line_of + i, FASTVDM_LOAD(z, i, n) * coef[0] + load(line_of + i) * coef[1]);
      }
    }
    const bool has_low = a.low_res != nullptr && a.low_slot[at.f] >= 0;
    if (has_low) {
      const int64_t low_w = a.width / k, low_h = a.height / k;
      const float* y =
          a.low_res +
          (((at.b * a.channels + at.c) * a.num_low + a.low_slot[at.f]) * low_h + at.h) * low_w;
      const float share = 1.f / (float)(k * k);
      for (int64_t w = 0; w < low_w; ++w) {
        float total = 0;
        for (int dh = 0; dh < k; ++dh)
          for (int dw = 0; dw < k; ++dw) {
            const float x = raw[dh * line + w * k + dw];
            total += !a.clip ? x : x > 1.f ? 1.f : x < -1.f ? -1.f : x;
          }
        for (int dw = 0; dw < k; ++dw) spread[w * k + dw] = (total * share - y[w]) * (2.f * share);
      }
    }
    const bool given = a.known != nullptr && a.slot[at.f] >= 0;
    for (int dh = 0; dh < k; ++dh) {
      const int64_t h = at.h * k + dh, here = image + h * a.width;
      const float* known =
          given ? a.known + ((at.b * a.channels + at.c) * a.num_known + a.slot[at.f]) * plane +
                      h * a.width
                : nullptr;
      for (int i = 0; i < width; i += VL) {
        const int n = width - i < VL ? width - i : VL;
        const vf full = load(raw + dh * line + i);
        const vf x_hat = a.clip ? clamp(full, one) : full;
        vf r = has_low ? load(spread + i) : vf{};
        if (a.extra != nullptr) r += FASTVDM_LOAD(a.extra + here, i, n);
        r *= coef[3];
        if (given) r += 2.f * coef[2] * (x_hat - FASTVDM_LOAD(known, i, n));
        if (a.clip) r = full <= one && full >= -one ? r : vf{};
        FASTVDM_STORE(a.x_hat + here, i, x_hat, n);
        store(r_out + i, r);
      }
      const int64_t to = offset(a.seed, at, h);
      FASTVDM_BY_DTYPE(a.seed.dtype, narrow_at, a.seed, to, width, r_out)
    }
  }
}

void guidance_update(const GuidanceArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int width = (int)a.width;
  const int64_t line = a.width + 16, plane = a.height * a.width;
  float *x_row = scratch, *part = x_row + line, *noise_row = part + line;
  for (int64_t item = begin; item < end; ++item) {
    const Row at = row_of(a, item);
    const float* coef = a.coef + at.b * 9;
    const int64_t channel = at.b * a.channels + at.c;
    const int64_t here = ((channel * a.frames + at.f) * a.height + at.h) * a.width;
    const float* z = a.z + here;
    const int64_t from = offset(a.estimate, at, at.h);
    FASTVDM_BY_DTYPE(a.estimate.dtype, widen_at, a.estimate, from, width, x_row)
    for (int i = 0; i < width; i += VL) {
      const int n = width - i < VL ? width - i : VL;
      store(x_row + i, FASTVDM_LOAD(z, i, n) * coef[0] + load(x_row + i) * coef[1]);
    }
    if (a.grad.data != nullptr) {
      const int64_t grad_at = offset(a.grad, at, at.h);
      FASTVDM_BY_DTYPE(a.grad.dtype, widen_at, a.grad, grad_at, width, part)
      for (int i = 0; i < width; i += VL) store(x_row + i, load(x_row + i) - load(part + i));
    }
    if (a.direct.data != nullptr) {
      const int64_t seed_at = offset(a.direct, at, at.h);
      FASTVDM_BY_DTYPE(a.direct.dtype, widen_at, a.direct, seed_at, width, part)
      for (int i = 0; i < width; i += VL)
        store(x_row + i, load(x_row + i) - load(part + i) * coef[2]);
    }
    const float* noise = a.noise != nullptr ? a.noise + here : nullptr;
    if (a.rng != nullptr) {
      const int64_t element = here - at.b * a.channels * a.frames * plane;  // within its video
      const int64_t* rng = a.rng + at.b * a.rng_columns;
      const uint32_t step = a.step + (a.rng_columns > 1 ? (uint32_t)rng[1] : 0);
      normals((uint64_t)rng[0], (uint64_t)element, step, width, noise_row);
      noise = noise_row;
    }
    const bool given = a.known != nullptr && a.slot[at.f] >= 0;
    const float* known =
        given ? a.known + (channel * a.num_known + a.slot[at.f]) * plane + at.h * a.width : nullptr;
    const float* u = coef + (given ? 6 : 3);  // coefficients of z, x and the noise
    const vf s = splat(a.threshold != nullptr ? a.threshold[at.b] : 1.f);
    for (int i = 0; i < width; i += VL) {
      const int n = width - i < VL ? width - i : VL;
      vf x = load(x_row + i);
      if (a.clip) x = clamp(x, s) / s;
      if (given) x = FASTVDM_LOAD(known, i, n);
      vf next = FASTVDM_LOAD(z, i, n) * u[0] + x * u[1];
      if (noise != nullptr) next += FASTVDM_LOAD(noise, i, n) * u[2];
      FASTVDM_STORE(a.z_next + here, i, next, n);
      if (a.x_tilde != nullptr) FASTVDM_STORE(a.x_tilde + here, i, x, n);
    }
  }
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
