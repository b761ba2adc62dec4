// The weight gradient of the 3x3 convolution, stride 1, padding 1, channels last, by Winograd's
// minimal filtering. The forward is Aᵀ[(G g Gᵀ) ∘ (Bᵀ d B)]A for every tile d, so the gradient of g
// is Gᵀ[Σ (A dy Aᵀ) ∘ (Bᵀ d B)]G over all tiles: each of the (m + 2)² points is one matrix product
// whose depth is the tiles, and only the sums are transformed back. The direct sum has 2.25 (m = 2)
// or 4 (m = 4) times as many multiplications.
#include "space_conv_dw.h"
#include "space_conv_winograd.h"

namespace fastvdm {
namespace FASTVDM_ISA {
namespace {

// A y along one direction, the transpose of output_1d: m vectors to m + 2.
template <int M>
FASTVDM_INLINE void gradient_1d(const vf* y, int ys, vf* e, int es) {
  if constexpr (M == 2) {
    e[0] = y[0];
    e[es] = y[0] + y[ys];
    e[2 * es] = y[0] - y[ys];
    e[3 * es] = y[ys];
  } else {
    const vf p = y[0] + AA * y[2 * ys], q = A * y[ys] + (A * AA) * y[3 * ys];
    const vf r = y[0] + BB * y[2 * ys], s = B * y[ys] + (B * BB) * y[3 * ys];
    e[0] = y[0];
    e[es] = p + q;
    e[2 * es] = p - q;
    e[3 * es] = r + s;
    e[4 * es] = r - s;
    e[5 * es] = y[3 * ys];
  }
}

// Gᵀ u along one direction, the transpose of weight_1d: m + 2 vectors to 3.
template <int M>
FASTVDM_INLINE void filter_1d(const vf* u, int us, vf* g, int gs) {
  if constexpr (M == 2) {
    const vf even = 0.5f * (u[us] + u[2 * us]);
    g[0] = even - u[0];
    g[gs] = 0.5f * (u[us] - u[2 * us]);
    g[2 * gs] = even + u[3 * us];
  } else {
    constexpr float FA = 1.f / (2 * AA * (AA - BB)), FB = 1.f / (2 * BB * (BB - AA));
    const vf p = FA * (u[us] + u[2 * us]), q = (FA * A) * (u[us] - u[2 * us]);
    const vf r = FB * (u[3 * us] + u[4 * us]), s = (FB * B) * (u[3 * us] - u[4 * us]);
    g[0] = (1.f / (AA * BB)) * u[0] + p + r;
    g[gs] = q + s;
    g[2 * gs] = AA * p + BB * r + u[5 * us];
  }
}

template <int M, bool GRADIENT>
FASTVDM_INLINE void spread_1d(const vf* d, int ds, vf* v, int vs) {
  if constexpr (GRADIENT)
    gradient_1d<M>(d, ds, v, vs);
  else
    input_1d<M>(d, ds, v, vs);
}

// Transforms the patch at (y0, x0) of the first n channels at `image`, whose pixels are c apart, to
// points `stride` apart. The patch is m x m of dy or (m + 2)² of x, and zero outside the image.
// WHOLE: the patch is inside the image, and n = VL.
template <class T, int M, bool GRADIENT, bool WHOLE>
FASTVDM_INLINE void patch(const T* image, int64_t h, int64_t w, int c, int64_t y0, int64_t x0,
                          int n, float* to, int64_t stride) {
  constexpr int N = M + 2, S = GRADIENT ? M : N;
  static const T zeros[VL] = {};
  const T* from = image + (y0 * w + x0) * c;
  const int64_t line_step = w * c;
  bool row[S];
  for (int i = 0; i < S; ++i) row[i] = y0 + i >= 0 && y0 + i < h;
  vf half[N * S], line[N];
#pragma GCC unroll 6
  for (int j = 0; j < S; ++j) {  // the columns first
    const bool column = x0 + j >= 0 && x0 + j < w;
#pragma GCC unroll 6
    for (int i = 0; i < S; ++i) {
      const T* at = from + i * line_step + (int64_t)j * c;
      if constexpr (WHOLE) {
        line[i] = load(at);
      } else {
        at = row[i] & column ? at : zeros;
        line[i] = FASTVDM_LOAD(at, 0, n);
      }
    }
    spread_1d<M, GRADIENT>(line, 1, half + j, S);
  }
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    spread_1d<M, GRADIENT>(half + i * S, 1, line, 1);
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) store(to + (i * N + j) * stride, line[j]);
  }
}

// 16 channels of x, x2 or dy; zero beyond the last.
template <class T>
struct Group {
  const T* data;
  int c, n;  // channels per pixel, and in the group
  bool gradient;
  int at, channels;  // its position among all channels of its side
  Group(const WgradArgs& a, int64_t group) {
    const int first = (int)group * 16;
    gradient = first >= a.cinp;
    const bool second = !gradient && first >= a.c1p;
    at = gradient ? first - a.cinp : first;
    channels = gradient ? a.outp : a.cinp;
    c = gradient ? a.out : second ? a.c2 : a.c1;
    const int o = second ? at - a.c1p : at;
    n = c - o < 16 ? c - o : 16;
    data = (const T*)(gradient ? a.dy : second ? a.x2 : a.x) + o;
  }
  int panel() const { return at / kWgradPanel; }
  int width() const {
    const int left = channels - panel() * kWgradPanel;
    return left < kWgradPanel ? left : kWgradPanel;
  }
};

// Tile `first + i` of the group to `to` + i step, i < count.
template <class T, int M, bool GRADIENT>
FASTVDM_NOINLINE void transform_tiles(const WgradArgs& a, const Group<T>& g, int64_t first,
                                      int count, float* to, int64_t step, int64_t stride) {
  const int64_t per_image = a.tiles_w * a.tiles_h, margin = GRADIENT ? 0 : 1;
  constexpr int S = GRADIENT ? M : M + 2;
  int64_t image = first / per_image, y = first % per_image / a.tiles_w, x = first % a.tiles_w;
  for (int i = 0; i < count; ++i, to += step) {
    const T* from = g.data + image * a.h * a.w * g.c;
    const int64_t y0 = y * M - margin, x0 = x * M - margin;
    const bool inside = y0 >= 0 && x0 >= 0 && y0 + S <= a.h && x0 + S <= a.w;
    for (int o = 0; o < 16; o += VL) {
      const int n = g.n - o < 0 ? 0 : g.n - o < VL ? g.n - o : VL;
      if (inside && n == VL)
        patch<T, M, GRADIENT, true>(from + o, a.h, a.w, g.c, y0, x0, n, to + o, stride);
      else
        patch<T, M, GRADIENT, false>(from + o, a.h, a.w, g.c, y0, x0, n, to + o, stride);
    }
    if (++x < a.tiles_w) continue;
    x = 0;
    if (++y < a.tiles_h) continue;
    y = 0;
    ++image;
  }
}

template <class T, int M>
void transform(const WgradArgs& a, int64_t begin, int64_t end) {
  constexpr int P = (M + 2) * (M + 2);
  const int64_t groups = wgrad_groups(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t product = item / groups, first = product * a.depth;
    const int count = a.count - first < a.depth ? (int)(a.count - first) : a.depth;
    const Group<T> g(a, item % groups);
    const int64_t point = g.gradient ? a.e_point : a.v_point;
    float* to = (g.gradient ? a.e : a.v) + product * P * point + g.panel() * kWgradPanel * a.depth +
                g.at % kWgradPanel;
    if (g.gradient)
      transform_tiles<T, M, true>(a, g, a.first + first, count, to, g.width(), point);
    else
      transform_tiles<T, M, false>(a, g, a.first + first, count, to, g.width(), point);
  }
}

// Number of tiles that are added one after another. These sums are added within a pass, and the
// sums of the passes last, so the rounding error of fp32 grows with the square root of each of the
// three numbers.
constexpr int kChunk = 32;

// The filters of one unit, from its sums to dw.
template <class W, int M>
FASTVDM_NOINLINE void filters(const WgradArgs& a, int64_t unit, const float* sums) {
  constexpr int N = M + 2;
  const int64_t stride = wgrad_sums_point(a), panels = wgrad_panels(a);
  const int first = (int)(unit % panels) * kWgradPanel, row = (int)(unit / panels) * a.rows;
  const int width = a.cinp - first < kWgradPanel ? a.cinp - first : kWgradPanel;
  const int rows = a.out - row < a.rows ? a.out - row : a.rows;
  const bool dense = a.w_column == 1 && a.w_row == 3 && a.w_in == 9;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < width; c += VL) {
      const int at = first + c, second = at >= a.c1p;
      const int left = second ? a.c2 - (at - a.c1p) : a.c1 - at, n = left < VL ? left : VL;
      if (n <= 0) continue;
      const int channel = second ? a.c1 + at - a.c1p : at;
      const float* from = sums + (int64_t)r * width + c;
      vf half[3 * N], line[N], g[9];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) line[i] = load(from + (i * N + j) * stride);
        filter_1d<M>(line, 1, half + j, N);
      }
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) filter_1d<M>(half + i * N, 1, g + 3 * i, 1);
      W* to = (W*)a.dw + (row + r) * a.w_out + channel * a.w_in;
      if (a.w_in == 1) {
        for (int k = 0; k < 9; ++k) {
          W* tap = to + k / 3 * a.w_row + k % 3 * a.w_column;
          FASTVDM_STORE(tap, 0, g[k], n);
        }
        continue;
      }
      float taps[9][VL], whole[VL * 9];
      for (int k = 0; k < 9; ++k) store(taps[k], g[k]);
      if (dense && n == VL) {
        for (int l = 0; l < VL; ++l)
          for (int k = 0; k < 9; ++k) whole[l * 9 + k] = taps[k][l];
        for (int i = 0; i < 9 * VL; i += VL) store(to + i, load(whole + i));
      } else {
        for (int l = 0; l < n; ++l)
          for (int k = 0; k < 9; ++k)
            put(to + l * a.w_in + k / 3 * a.w_row + k % 3 * a.w_column, taps[k][l]);
      }
    }
}

template <class W>
FASTVDM_INLINE void filters_m(const WgradArgs& a, int64_t unit, const float* sums) {
  a.m == 2 ? filters<W, 2>(a, unit, sums) : filters<W, 4>(a, unit, sums);
}

void unit_filters(const WgradArgs& a, int64_t unit, const float* sums) {
  FASTVDM_BY_DTYPE(a.weight_dtype, filters_m, a, unit, sums)
}

template <class T>
void transform_m(const WgradArgs& a, int64_t begin, int64_t end) {
  a.m == 2 ? transform<T, 2>(a, begin, end) : transform<T, 4>(a, begin, end);
}

}  // namespace

void wgrad_transform(const WgradArgs& a, int64_t begin, int64_t end) {
  FASTVDM_BY_DTYPE(a.dtype, transform_m, a, begin, end)
}

void wgrad_multiply(const WgradArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t points = wgrad_points(a), products = wgrad_products(a), panels = wgrad_panels(a);
  const int64_t stride = wgrad_sums_point(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t unit = item / a.parts, part = item % a.parts;
    const int column = (int)(unit % panels) * kWgradPanel, row = (int)(unit / panels) * a.rows;
    const int n = a.cinp - column < kWgradPanel ? a.cinp - column : kWgradPanel;
    const int rows = a.out - row < a.rows ? a.out - row : a.rows;
    const int panel = row / kWgradPanel * kWgradPanel;
    const int lde = a.outp - panel < kWgradPanel ? a.outp - panel : kWgradPanel;
    float* sums = a.sums != nullptr ? a.sums + unit * points * stride : scratch;
    float* pass = scratch + points * stride;
    for (int64_t p = part * points / a.parts; p < (part + 1) * points / a.parts; ++p) {
      float* to = a.first > 0 ? pass : sums + p * stride;
      for (int64_t k = 0; k < products; ++k) {
        const int64_t left = a.count - k * a.depth, at = k * points + p;
        const int count = left < a.depth ? (int)left : a.depth;
        const float* v = a.v + at * a.v_point + column * a.depth;
        const float* e = a.e + at * a.e_point + panel * a.depth + (row - panel);
        for (int i = 0; i < count; i += kChunk)
          gemm<true>(rows, n, count - i < kChunk ? count - i : kChunk, e + i * lde, lde, v + i * n,
                     n, to, n, k > 0 || i > 0);
      }
      if (a.first > 0)
        for (int i = 0; i < rows * n; i += VL)
          store(sums + p * stride + i, load(sums + p * stride + i) + load(pass + i));
    }
    if (a.parts == 1 && a.last) unit_filters(a, unit, sums);
  }
}

void wgrad_filters(const WgradArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    unit_filters(a, unit, a.sums + unit * wgrad_points(a) * wgrad_sums_point(a));
}

}  // namespace FASTVDM_ISA
}  // namespace fastvdm
