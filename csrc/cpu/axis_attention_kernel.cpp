// axis_attention directly from the packed qkv buffer: a part gathers the rows of its sequence into
// fp32 scratch, rotating q and k, and the core computes the rest.
#include "axis_attention.h"

#include "common/attention_kernel.h"
#include "common/rows.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// Sequences [first, last) and heads of item i.
FASTVDM_INLINE void item_range(const AxisArgs& a, int64_t i, int64_t* first, int64_t* last,
                               int* head0, int* heads) {
  const int64_t sequences = a.batch * a.outer, part = i % a.parts;
  *first = sequences * part / a.parts;
  *last = sequences * (part + 1) / a.parts;
  *head0 = (int)(i / a.parts) * a.group;
  *heads = a.t.heads - *head0 < a.group ? a.t.heads - *head0 : a.group;
}

// Rows [begin, end) of the sequence, which attend to themselves only: out = v + rel_v[distance 0].
template <class T>
FASTVDM_INLINE void identity(const AxisArgs& a, const T* v, T* out, int head, int64_t begin,
                             int64_t end) {
  const AttnTables& t = a.t;
  const float* rel = nullptr;
  if (t.rel_v != nullptr)
    rel = t.rel_v +
          ((t.rel_v_heads > 1 ? (int64_t)head * t.rel_v_length : 0) + t.rel_v_length / 2) * t.dp;
  for (int64_t i = begin; i < end; ++i) {
    const T* from = v + i * a.in.seq;
    T* to = out + i * a.dense_out.seq;
    for (int c = 0; c < t.d; c += VL) {
      const int n = t.d - c < VL ? t.d - c : VL;
      vf x = FASTVDM_LOAD(from, c, n);
      if (rel != nullptr) x += load(rel + c);
      FASTVDM_STORE(to, c, x, n);
    }
  }
}

template <class T>
void fwd(const AxisArgs& a, int64_t begin, int64_t end, float* scratch) {
  const AttnTables& t = a.t;
  const int dp = t.dp, d = t.d, n = t.n;
  const int64_t seq = (int64_t)t.np * dp;  // words of one head's q
  const bool both = t.cos != nullptr && t.rel_k != nullptr;
  float *q = scratch, *k = q + a.group * seq, *v = k + a.group * seq;
  float* plain = both ? v + a.group * seq : q;
  float* out = v + (both ? 2 : 1) * a.group * seq;
  float* work = out + a.group * seq;
  memset(scratch, 0, sizeof(float) * 4 * a.group * seq);  // rows n .. np stay zero
  for (int64_t item = begin; item < end; ++item) {
    int64_t first, last;
    int head0, heads;
    item_range(a, item, &first, &last, &head0, &heads);
    for (int64_t s = first; s < last; ++s) {
      const int64_t b = s / a.outer, o = s % a.outer;
      const T* base = (const T*)a.qkv + b * a.in.batch + o * a.in.outer + head0 * a.in.head;
      T* dst = (T*)a.out + b * a.dense_out.batch + o * a.dense_out.outer + head0 * a.dense_out.head;
      const bool focus = a.focus != nullptr && a.focus[b];
      const int attending = focus ? 0 : n;
      if (attending < a.frames)
        for (int h = 0; h < heads; ++h)
          identity(a, base + 2 * a.in.three + h * a.in.head, dst + h * a.dense_out.head, head0 + h,
                   attending, a.frames);
      if (attending == 0) continue;
      for (int i = 0; i < n; ++i) {
        const T* row = base + i * a.in.seq;
        const float* cos = t.cos != nullptr ? t.cos + (int64_t)i * dp : nullptr;
        const float* sin = t.cos != nullptr ? t.sin + (int64_t)i * dp : nullptr;
        for (int h = 0; h < heads; ++h) {
          float* to = q + h * seq + (int64_t)i * dp;
          widen_row(row + h * a.in.head, to, d, dp);
          if (both) memcpy(plain + h * seq + (int64_t)i * dp, to, sizeof(float) * dp);
          if (cos != nullptr) rotate_row(to, to, cos, sin, dp, 1.f);
        }
        for (int h = 0; h < heads; ++h) {
          float* to = k + h * seq + (int64_t)i * dp;
          widen_row(row + a.in.three + h * a.in.head, to, d, dp);
          if (cos != nullptr) rotate_row(to, to, cos, sin, dp, 1.f);
        }
        for (int h = 0; h < heads; ++h)
          widen_row(row + 2 * a.in.three + h * a.in.head, v + h * seq + (int64_t)i * dp, d, dp);
      }
      for (int h = 0; h < heads; ++h)
        attend(t, head0 + h, q + h * seq, plain + h * seq, k + h * seq, v + h * seq, out + h * seq,
               work);
      for (int i = 0; i < n; ++i)
        for (int h = 0; h < heads; ++h)
          narrow_row(out + h * seq + (int64_t)i * dp,
                     dst + i * a.dense_out.seq + h * a.dense_out.head, d);
    }
  }
}

template <class T>
void bwd(const AxisArgs& a, int64_t begin, int64_t end, float* scratch) {
  const AttnTables& t = a.t;
  const int dp = t.dp, d = t.d, n = t.n;
  const int64_t seq = (int64_t)t.np * dp;
  const bool both = t.cos != nullptr && t.rel_k != nullptr;
  // One head at a time.
  float *q = scratch, *k = q + seq, *v = k + seq, *g = v + seq;
  float *dq = g + seq, *dk = dq + seq, *dv = dk + seq;
  float* plain = both ? dv + seq : q;
  float* work = dv + (both ? 2 : 1) * seq;
  memset(scratch, 0, sizeof(float) * 8 * seq);
  for (int64_t item = begin; item < end; ++item) {
    int64_t first, last;
    int head0, heads;
    item_range(a, item, &first, &last, &head0, &heads);
    const AttnGrads grads = a.grads != nullptr ? a.grads[item % a.parts] : AttnGrads{};
    for (int64_t s = first; s < last; ++s) {
      const int64_t b = s / a.outer, o = s % a.outer;
      const int attending = a.focus != nullptr && a.focus[b] ? 0 : n;
      for (int h = head0; h < head0 + heads; ++h) {
        const T* base = (const T*)a.qkv + b * a.in.batch + o * a.in.outer + h * a.in.head;
        const T* gout =
            (const T*)a.dout + b * a.grad_out.batch + o * a.grad_out.outer + h * a.grad_out.head;
        T* dst = nullptr;
        if (a.dqkv != nullptr)
          dst = (T*)a.dqkv + b * a.dense_qkv.batch + o * a.dense_qkv.outer + h * a.dense_qkv.head;
        float* drel_v = grads.rel_v;
        if (drel_v != nullptr)
          drel_v +=
              ((t.rel_v_heads > 1 ? (int64_t)h * t.rel_v_length : 0) + t.rel_v_length / 2) * dp;
        for (int64_t i = attending; i < a.frames; ++i) {  // out was v + rel_v[distance 0]
          const T* from = gout + i * a.grad_out.seq;
          for (int c = 0; c < d; c += VL) {
            const int m = d - c < VL ? d - c : VL;
            const vf x = FASTVDM_LOAD(from, c, m);
            if (drel_v != nullptr) store(drel_v + c, load(drel_v + c) + x);
            if (dst == nullptr) continue;
            T* to = dst + i * a.dense_qkv.seq;
            FASTVDM_STORE(to, c, vf{}, m);
            FASTVDM_STORE(to + a.dense_qkv.three, c, vf{}, m);
            FASTVDM_STORE(to + 2 * a.dense_qkv.three, c, x, m);
          }
        }
        if (attending == 0) continue;
        for (int i = 0; i < n; ++i) {
          const T* row = base + i * a.in.seq;
          const int64_t at = (int64_t)i * dp;
          widen_row(row, q + at, d, dp);
          widen_row(row + a.in.three, k + at, d, dp);
          widen_row(row + 2 * a.in.three, v + at, d, dp);
          widen_row(gout + i * a.grad_out.seq, g + at, d, dp);
          if (both) memcpy(plain + at, q + at, sizeof(float) * dp);
          if (t.cos != nullptr) {
            rotate_row(q + at, q + at, t.cos + at, t.sin + at, dp, 1.f);
            rotate_row(k + at, k + at, t.cos + at, t.sin + at, dp, 1.f);
          }
        }
        attend_bwd(t, grads, h, q, plain, k, v, g, dq, dk, dv, work);
        if (dst == nullptr) continue;
        for (int i = 0; i < n; ++i) {
          T* to = dst + i * a.dense_qkv.seq;
          const int64_t at = (int64_t)i * dp;
          narrow_row(dq + at, to, d);
          narrow_row(dk + at, to + a.dense_qkv.three, d);
          narrow_row(dv + at, to + 2 * a.dense_qkv.three, d);
        }
      }
    }
  }
}

}  // namespace

void axis_attention_fwd(const AxisArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, fwd, a, begin, end, scratch)
}
void axis_attention_bwd(const AxisArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, bwd, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
