#include "attention_options.h"

namespace fastvdm {
namespace {

// (T, length, d) → (T, length, dp), zero beyond d.
std::vector<float> padded_rows(const Tensor& table, const char* name, int64_t heads, int64_t d,
                               int64_t dp, int* table_heads, int* length) {
  STD_TORCH_CHECK(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == heads) &&
                      table.size(1) % 2 == 1 && table.size(2) == d,
                  "fastvdm_C: ", name, " has the wrong shape");
  const std::vector<float> raw = floats(table, name, table.numel());
  const int64_t rows = table.size(0) * table.size(1);
  std::vector<float> out(rows * dp, 0.f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < d; ++c) out[r * dp + c] = raw[r * d + c];
  *table_heads = static_cast<int>(table.size(0));
  *length = static_cast<int>(table.size(1));
  return out;
}

Tensor sum_parts(const std::vector<float>& data, int64_t parts, int64_t rows, int64_t dp, int64_t d,
                 double scale, const Tensor& like) {
  std::vector<double> sum(rows * d, 0.0);
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) sum[r * d + c] += data[(p * rows + r) * dp + c];
  for (double& s : sum) s *= scale;
  return from_doubles(sum, like);
}

Tensor none(const Tensor& x) { return empty(x, {0}, x.scalar_type()); }

}  // namespace

AttnOptions attention_options(int64_t heads, int64_t d, int64_t frames, int64_t images,
                              double scale, const OptTensor& bias, const OptTensor& rel_k,
                              const OptTensor& rel_v, const OptTensor& rotary) {
  STD_TORCH_CHECK(
      heads > 0 && d > 0 && d < 4096 && images >= 0 && images <= frames && frames < (1 << 24),
      "fastvdm_C: attention of an impossible size");
  AttnOptions o;
  AttnTables& t = o.t;
  t.heads = static_cast<int>(heads);
  t.d = static_cast<int>(d);
  t.dp = static_cast<int>(round_up(d, 16));
  t.n = static_cast<int>(frames - images);
  t.np = static_cast<int>(round_up(t.n, 16));
  t.scale = static_cast<float>(scale);
  t.rel_k_heads = t.rel_v_heads = 1;
  const int64_t n = t.n, np = t.np, dp = t.dp;
  if (bias.has_value()) {
    const std::vector<float> raw = floats(*bias, "bias", heads * frames * frames);
    o.bias_t.assign(heads * n * np, 0.f);
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < n; ++j)
            o.bias_t[(h * n + j) * np + i] = raw[(h * frames + i) * frames + j];
    });
    t.bias_t = o.bias_t.data();
  }
  if (rel_k.has_value()) {
    o.rel_k = padded_rows(*rel_k, "rel_k", heads, d, dp, &t.rel_k_heads, &t.rel_k_length);
    t.rel_k = o.rel_k.data();
  }
  if (rel_v.has_value()) {
    o.rel_v = padded_rows(*rel_v, "rel_v", heads, d, dp, &t.rel_v_heads, &t.rel_v_length);
    t.rel_v = o.rel_v.data();
  }
  if (rotary.has_value()) {
    STD_TORCH_CHECK(rotary->dim() == 3, "fastvdm_C: rotary must be (2, N, R/2)");
    const int64_t half = rotary->size(2);
    STD_TORCH_CHECK(2 * half <= d, "fastvdm_C: rotary turns more features than there are");
    const std::vector<float> raw = floats(*rotary, "rotary", 2 * frames * half);
    o.cos.assign(n * dp, 1.f);
    o.sin.assign(n * dp, 0.f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p < half; ++p) {
        const float c = raw[i * half + p], s = raw[(frames + i) * half + p];
        o.cos[i * dp + 2 * p] = o.cos[i * dp + 2 * p + 1] = c;
        o.sin[i * dp + 2 * p] = -s;
        o.sin[i * dp + 2 * p + 1] = s;
      }
    t.cos = o.cos.data();
    t.sin = o.sin.data();
  }
  return o;
}

AttnPartials::AttnPartials(const AttnTables& t, int64_t count, bool bias, bool rel_k, bool rel_v)
    : parts(count),
      bias_size(bias ? static_cast<int64_t>(t.heads) * t.n * t.np : 0),
      rel_k_size(rel_k ? static_cast<int64_t>(t.rel_k_heads) * t.rel_k_length * t.dp : 0),
      rel_v_size(rel_v ? static_cast<int64_t>(t.rel_v_heads) * t.rel_v_length * t.dp : 0),
      bias_data(parts * bias_size, 0.f),
      rel_k_data(parts * rel_k_size, 0.f),
      rel_v_data(parts * rel_v_size, 0.f) {}

AttnGrads AttnPartials::part(int64_t i) {
  return {bias_size ? bias_data.data() + i * bias_size : nullptr,
          rel_k_size ? rel_k_data.data() + i * rel_k_size : nullptr,
          rel_v_size ? rel_v_data.data() + i * rel_v_size : nullptr};
}

Tensor AttnPartials::bias(const AttnTables& t, const OptTensor& like, int64_t frames,
                          const Tensor& x) const {
  if (!like.has_value() || bias_size == 0) {
    if (!like.has_value() || t.n > 0 || like->numel() == 0) return none(x);
    return from_doubles(std::vector<double>(like->numel(), 0.0), *like);
  }
  // Images attend to themselves only, without the bias, so their rows and columns have no gradient.
  std::vector<double> sum(t.heads * frames * frames, 0.0);
  const int64_t n = t.n, np = t.np;
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t h = 0; h < t.heads; ++h)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < n; ++i)
          sum[(h * frames + i) * frames + j] += bias_data[p * bias_size + (h * n + j) * np + i];
  return from_doubles(sum, *like);
}

Tensor AttnPartials::rel_k(const AttnTables& t, const OptTensor& like, const Tensor& x) const {
  if (!like.has_value() || rel_k_size == 0) return none(x);
  return sum_parts(rel_k_data, parts, t.rel_k_heads * t.rel_k_length, t.dp, t.d, t.scale, *like);
}

Tensor AttnPartials::rel_v(const AttnTables& t, const OptTensor& like, const Tensor& x) const {
  if (!like.has_value() || rel_v_size == 0) return none(x);
  return sum_parts(rel_v_data, parts, t.rel_v_heads * t.rel_v_length, t.dp, t.d, 1.0, *like);
}

}  // namespace fastvdm
