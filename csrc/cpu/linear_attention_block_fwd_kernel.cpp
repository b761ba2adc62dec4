// x + out(linear attention(LayerNorm_C(x))) without v and without the attention's output. With
// G = k'ᵀ x̂ the context is G W_vᵀ, and with out it becomes one (features, channels) matrix per
// frame. So a pixel takes four products of features by channels, as many as q, k, v and out alone.
#include "linear_attention_block_parts.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// One head: k becomes exp(k - max) in place; max, sum and the partial sum g are updated.
template <class T>
FASTVDM_INLINE void running_softmax(const LinearBlockArgs& a, int n, bool first, float* k,
                                    float* max, float* sum, float* g) {
  for (int c = 0; c < a.d; ++c) {
    float* row = k + (int64_t)c * a.rows;
    vf top = splat(-3.4e38f);
    int i = 0;
    for (; i + VL <= n; i += VL) top = vmax(top, load(row + i));
    float m = hmax(top);
    for (; i < n; ++i) m = row[i] > m || row[i] != row[i] ? row[i] : m;
    if (first || m > max[c]) {
      if (!first) {
        const float by = vexp(splat(max[c] - m))[0];
        sum[c] *= by;
        for (int e = 0; e < a.cp; e += VL)
          store(g + (int64_t)c * a.cp + e, load(g + (int64_t)c * a.cp + e) * by);
      }
      max[c] = m;
    }
    const int whole = n / VL;
    const vf s = vexp_rows<kDegree<T>>(row, VL, whole, splat(max[c]));
    vexp_rows<kDegree<T>>(row + whole * VL, VL, a.rows / VL - whole, splat(max[c]));
    float rest = 0.f;
    for (i = whole * VL; i < n; ++i) rest += row[i];
    sum[c] = (first ? 0.f : sum[c]) + hsum(s) + rest;
  }
  clear_beyond(a, k, n);
}

template <class T>
void sum_k(const LinearBlockArgs& a, int64_t begin, int64_t end, float* memory) {
  const int64_t panel = linear_block_panel(a);
  const Scratch s = scratch_of<T>(a, memory);
#if FASTVDM_BF16
  const ProductScope scope;
#endif
  for (int64_t item = begin; item < end; ++item) {
    const Part p = part_of(a, item);
    float* g = a.g + item * a.heads * panel;
    memset(g, 0, sizeof(float) * a.heads * panel);
    for (int64_t row = p.begin; row < p.end; row += a.rows) {
      const int n = p.end - row < a.rows ? (int)(p.end - row) : a.rows;
      load_x<T>(a, s, p.frame, row, n, false);
      for (int h = 0; h < a.heads; ++h) {
        const int64_t w = a.heads + h, at = (item * a.heads + h) * a.dp;
        down(a, a.qk + w * panel, a.qk_tiles + w * a.dp * a.kp, s.x, s.t);
        running_softmax<T>(a, n, row == p.begin, s.t, a.max + at, a.sum + at, g + h * panel);
        outer(a, s, s.t, n, s.x, g + h * panel);
      }
    }
  }
}

// Adds up the splits of a frame.
FASTVDM_INLINE void merge(const LinearBlockArgs& a, int64_t frame) {
  const int64_t panel = linear_block_panel(a), first = frame * a.splits;
  for (int h = 0; h < a.heads; ++h)
    for (int c = 0; c < a.d; ++c) {
      const auto at = [&](int64_t s) { return ((first + s) * a.heads + h) * a.dp + c; };
      const auto line = [&](int64_t s) {
        return a.g + ((first + s) * a.heads + h) * panel + (int64_t)c * a.cp;
      };
      float m = a.max[at(0)], sum = 0.f;
      for (int64_t s = 1; s < a.splits; ++s) m = a.max[at(s)] > m ? a.max[at(s)] : m;
      for (int64_t s = 0; s < a.splits; ++s) {
        const float by = vexp(splat(a.max[at(s)] - m))[0];
        sum += by * a.sum[at(s)];
        for (int e = 0; e < a.cp; e += VL) {
          const vf part = load(line(s) + e) * by;
          store(line(0) + e, s == 0 ? part : load(line(0) + e) + part);
        }
      }
      const int64_t to = (frame * a.heads + h) * a.d + c;
      for (int e = 0; e < a.cp; e += VL) store(line(0) + e, load(line(0) + e) / sum);
      memcpy(a.g_out + to * a.channels, line(0), sizeof(float) * a.channels);
      a.lse[to] = m + __builtin_logf(sum);
    }
}

void fold(const LinearBlockArgs& a, int64_t begin, int64_t end, float* memory) {
  const int64_t panel = linear_block_panel(a);
  for (int64_t frame = begin; frame < end; ++frame) {
    float* m = a.m + frame * a.heads * panel;
    merge(a, frame);
    for (int h = 0; h < a.heads; ++h)
      fold_head(a, h, a.g + (frame * a.splits * a.heads + h) * panel, memory, m + h * panel);
    if (a.m_tiles != nullptr)
      make_operands(a, m, a.m_tiles + frame * a.heads * a.dp * a.kp,
                    a.m_up + frame * a.cp * a.heads * a.dk);
  }
}

template <class T>
void apply(const LinearBlockArgs& a, int64_t begin, int64_t end, float* memory) {
  const int64_t panel = linear_block_panel(a);
  const Scratch s = scratch_of<T>(a, memory);
  float* y = s.dy.rows;
#if FASTVDM_BF16
  const ProductScope scope;
#endif
  for (int64_t item = begin; item < end; ++item) {
    const Part p = part_of(a, item);
    const float* m = a.m + p.frame * a.heads * panel;
    for (int64_t row = p.begin; row < p.end; row += a.rows) {
      const int n = p.end - row < a.rows ? (int)(p.end - row) : a.rows;
      load_x<T>(a, s, p.frame, row, n, false);
      for (int h = 0; h < a.heads; ++h) {
        down(a, a.qk + h * panel, a.qk_tiles + (int64_t)h * a.dp * a.kp, s.x, s.t);
        softmax_features<T>(a, s.t);
        up(a, h, s.t, n, m + h * panel, y, h > 0, s.all);
      }
      up_all(a, s.all, a.m_up + p.frame * a.cp * a.heads * a.dk, nullptr, nullptr, n, s.dy.across,
             s.hat, y, false);
      const int64_t at = (p.frame * a.pixels + row) * a.channels;
      for (int r = 0; r < n; ++r)
        add_residual((const T*)a.x + at + (int64_t)r * a.channels, y + (int64_t)r * a.cp,
                     a.out_bias, a.channels, (T*)a.y + at + (int64_t)r * a.channels);
    }
  }
}

}  // namespace

void linear_block_sum(const LinearBlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, sum_k, a, begin, end, scratch)
}
void linear_block_fold(const LinearBlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  fold(a, begin, end, scratch);
}
void linear_block_apply(const LinearBlockArgs& a, int64_t begin, int64_t end, float* scratch) {
  FASTVDM_BY_DTYPE(a.dtype, apply, a, begin, end, scratch)
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
