// Attention of one token of each stream, from the layer's input to its output, in one call: what a token takes in torch
// is some forty calls, each of which costs more than what it computes. All is float32. No sum depends on the threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t ROWS = 64;  // of a matrix, that pay for a second thread

float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// to [streams, rows] = x [streams, columns]·matrixᵀ, matrix [rows, columns].
void multiply(const float* x, const float* matrix, float* to, int64_t streams, int64_t rows, int64_t columns) {
  at::parallel_for(0, rows, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t s = 0; s < streams; ++s) to[s * rows + r] = dot(x + s * columns, matrix + r * columns, columns);
  });
}

// RMS norm of x [d], channel i then turned with channel i + d/2; cos, sin: [d/2].
void norm_and_rotate(const float* x, const float* cos, const float* sin, float* to, int64_t head_dim) {
  const float factor = 1 / std::sqrt(dot(x, x, head_dim) / float(head_dim) + std::numeric_limits<float>::epsilon());
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = factor * x[i], second = factor * x[half + i];
    to[i] = first * cos[i] + second * sin[i];
    to[half + i] = second * cos[i] - first * sin[i];
  }
}

// y [d] = Σ_j softmax_j(scale·query·key_j + mask_j)·value_j. keys, values: rows of d, `stride` apart; mask: [count].
void attend(
    const float* query, const float* keys, const float* values, int64_t stride, const float* mask, int64_t count,
    float scale, float* y, int64_t head_dim) {
  std::vector<float> shares(count);
  float highest = -std::numeric_limits<float>::infinity(), sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    shares[j] = scale * dot(query, keys + j * stride, head_dim) + mask[j];
    highest = std::max(highest, shares[j]);
  }
  for (float& share : shares) sum += share = std::exp(share - highest);
  std::fill(y, y + head_dim, 0.0f);
  for (int64_t j = 0; j < count; ++j) {
    const float share = shares[j] / sum;
    for (int64_t i = 0; i < head_dim; ++i) y[i] += share * values[j * stride + i];
  }
}

// n: [B, 1, D]; qkvo: [4, D, D]; cos, sin: [B, 1, 1, d/2]; value_embedding: [B, 1, D]; mix: [2]; mask: [B, 1, 1, count];
// keys, values: [B, window, H, d], of which those of this token are written at `place`. Returns [B, 1, D].
Tensor attend_token(
    const Tensor& n, const Tensor& qkvo, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& value_embedding, const Tensor& mix, const Tensor& mask, const Tensor& keys,
    const Tensor& values, int64_t place, double scale) {
  const int64_t streams = keys.size(0), window = keys.size(1), heads = keys.size(2), head_dim = keys.size(3);
  const int64_t width = heads * head_dim, half = head_dim / 2, count = mask.size(3);
  for (const Tensor* tensor : {&n, &qkvo, &cos, &sin, &mix, &mask, &keys, &values})
    TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == at::kFloat, "attend_token takes rows of float32");
  TORCH_CHECK(place < count && count <= window && n.numel() == streams * width, "attend_token takes what fits its ring");

  const float* matrices = qkvo.const_data_ptr<float>();
  const float *of_value = mix.const_data_ptr<float>(), *of_embedding = of_value + 1;
  const Tensor embedded = value_embedding ? value_embedding->contiguous() : Tensor();
  Tensor rows = at::empty({4 * streams * width}, n.options()), result = at::empty_like(n);
  float *qkv = rows.data_ptr<float>(), *y = qkv + 3 * streams * width;

  multiply(n.const_data_ptr<float>(), matrices, qkv, streams, 3 * width, width);
  at::parallel_for(0, streams * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> query(head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stream = i / heads, at = i % heads * head_dim;
      const float* own = qkv + 3 * stream * width + at;
      const float* own_cos = cos.const_data_ptr<float>() + stream * half;
      const float* own_sin = sin.const_data_ptr<float>() + stream * half;
      float* of_keys = keys.data_ptr<float>() + stream * window * width + at;
      float* of_values = values.data_ptr<float>() + stream * window * width + at;
      norm_and_rotate(own, own_cos, own_sin, query.data(), head_dim);
      norm_and_rotate(own + width, own_cos, own_sin, of_keys + place * width, head_dim);
      for (int64_t c = 0; c < head_dim; ++c) of_values[place * width + c] = *of_value * own[2 * width + c];
      if (value_embedding)
        for (int64_t c = 0; c < head_dim; ++c)
          of_values[place * width + c] += *of_embedding * embedded.const_data_ptr<float>()[stream * width + at + c];
      const float* of_mask = mask.const_data_ptr<float>() + stream * count;
      attend(query.data(), of_keys, of_values, width, of_mask, count, float(scale), y + stream * width + at, head_dim);
    }
  });
  multiply(y, matrices + 3 * width * width, result.data_ptr<float>(), streams, width, width);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(switch_bank, library) {
  library.def(
      "attend_token(Tensor n, Tensor qkvo, Tensor cos, Tensor sin, Tensor? value_embedding, Tensor mix, Tensor mask, "
      "Tensor(a!) keys, Tensor(b!) values, int place, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) { library.impl("attend_token", attend_token); }
