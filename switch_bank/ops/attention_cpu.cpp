// Softmax attention in float32: of slices, with gradients, and of one token of each stream, for decoding.

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>

#include "cpu_kernels.h"

namespace {

// ---- slices, with gradients ----------------------------------------------------------------------------------------

// Query t sees keys first[t] to t, and key j is seen by queries j to end[j] - 1; neither falls along T. A core takes one
// head of one slice: the scores of BLOCK queries at a time, and of these only the tiles in which something is seen. What a
// query's sums run over begins at its own first key and ascends, so that no bit depends on other documents or on later
// tokens. A matrix that stands at the right of a product lies in panels of STRIP columns, [rows, STRIP] each.

constexpr int64_t BLOCK = 32;
static_assert(BLOCK % STRIP == 0 && STRIP % STRIP_ROWS == 0);

// One head of a slice of a tensor [B, T, H, d].
template <typename T>
struct Rows {
  T* first;
  int64_t stride;
  T* operator[](int64_t t) const { return first + t * stride; }
};
Rows<const float> rows_of(const Tensor& x, int64_t slice, int64_t head) {
  return {x.const_data_ptr<float>() + slice * x.stride(0) + head * x.stride(2), x.stride(1)};
}
Rows<float> new_rows_of(Tensor& x, int64_t slice, int64_t head) {
  return {x.data_ptr<float>() + slice * x.stride(0) + head * x.stride(2), x.stride(1)};
}

// The size of a head, and its operands, of `padded_tokens` rows and `padded_width` columns: whole blocks and tiles, of
// which no result reads what lies behind the head's own numbers.
struct Head {
  int64_t tokens, width, padded_tokens, padded_width;

  explicit Head(const Tensor& x)
      : tokens(x.size(1)), width(x.size(3)), padded_tokens(round_up(tokens, BLOCK)),
        padded_width(round_up(width, STRIP)) {}

  int64_t numbers() const { return padded_tokens * padded_width; }
  // From a query's scores to the next one's: not a power of two, by which rows would share lines of the cache.
  int64_t stride() const { return padded_tokens + STRIP; }

  // At the left of a product: [padded_tokens, width].
  float* left(Rows<const float> from) const {
    float* to = of_core.take<float>(numbers());
    for (int64_t t = 0; t < tokens; ++t) std::copy(from[t], from[t] + width, to + t * width);
    return to;
  }

  // At the right, column c's panel at c·padded_tokens.
  float* right(Rows<const float> from) const {
    float* to = of_core.take<float>(numbers());
    for (int64_t c = 0; c < padded_width; c += STRIP) {
      float* panel = to + c * padded_tokens;
      const int64_t own = std::min(STRIP, width - c);
      for (int64_t t = 0; t < tokens; ++t) std::copy(from[t] + c, from[t] + c + own, panel + t * STRIP);
      std::fill(panel + tokens * STRIP, panel + padded_tokens * STRIP, 0.0f);  // they meet weights of 0
    }
    return to;
  }

  // At the right and transposed, a panel of STRIP tokens [width, STRIP], token t's at t·width.
  float* right_transposed(Rows<const float> from) const {
    float* to = of_core.take<float>(numbers());
    for (int64_t t = 0; t < tokens; t += STRIP) {
      const int64_t own = std::min(STRIP, tokens - t);
      transpose(from[t], from.stride, to + t * width, STRIP, own, width);
    }
    return to;
  }

  // Gradients, to be added to: [padded_tokens, padded_width].
  float* zeros() const {
    float* to = of_core.take<float>(numbers());
    std::fill(to, to + numbers(), 0.0f);
    return to;
  }

  void write(const float* from, float factor, float* to) const {
    each_vec(width, [&](int64_t c, int64_t count) { store(to + c, count, Vec(factor) * load(from + c, count)); });
  }
};

// BLOCK queries of a head, from `start` to `end`, and the keys from `lowest` on.
struct Block {
  const Head& head;
  const int32_t* first;
  int64_t start, end, lowest;

  Block(const Head& head, const int32_t* first, int64_t start)
      : head(head), first(first), start(start), end(std::min(start + BLOCK, head.tokens)),
        lowest(first[start] / STRIP * STRIP) {}

  // Of [BLOCK, stride], the place of query t and key j.
  float* at(float* scores, int64_t t, int64_t j) const { return scores + (t - start) * head.stride() + j - lowest; }

  // left·right_transposed of queries and keys, wherever one of STRIP_ROWS queries sees one of STRIP keys.
  void products(const float* left, const float* right_transposed, float* scores) const {
    const int64_t width = head.width;
    for (int64_t j = lowest; j < end; j += STRIP)
      for (int64_t t = std::max(start, j); t < end && first[t] < j + STRIP; t += STRIP_ROWS)
        multiply_tile<false>(
            width, left + t * width, width, right_transposed + j * width, STRIP, at(scores, t, j), head.stride());
  }

  // 0 for the keys that query t does not see and others of its tile do.
  void hide(float* scores, int64_t t) const {
    const int64_t tile = t / STRIP_ROWS * STRIP_ROWS;
    std::fill(at(scores, t, first[tile] / STRIP_ROWS * STRIP_ROWS), at(scores, t, first[t]), 0.0f);
    std::fill(at(scores, t, t + 1), at(scores, t, tile + STRIP_ROWS), 0.0f);
  }

  // to [BLOCK, padded_width] = weights·right, of the keys that each tile sees.
  void sums(float* weights, const float* right, float* to) const {
    for (int64_t c = 0; c < head.padded_width; c += STRIP)
      for (int64_t t = start; t < end; t += STRIP_ROWS) {
        const int64_t from = first[t], depth = t + STRIP_ROWS - from;
        const float* panel = right + c * head.padded_tokens + from * STRIP;
        float* tile = to + (t - start) * head.padded_width + c;
        multiply_tile<false>(depth, at(weights, t, from), head.stride(), panel, STRIP, tile, head.padded_width);
      }
  }

  // to [padded_tokens, padded_width] += weightsᵀ·right, of the keys from `lowest` on and the queries that see them.
  void add_sums_of_keys(float* weights, const int32_t* seen_until, const float* right, float* to) const {
    for (int64_t c = 0; c < head.padded_width; c += STRIP)
      for (int64_t j = lowest; j < end; j += STRIP_ROWS) {
        const int64_t last = std::min(j + STRIP_ROWS, head.tokens) - 1;
        const int64_t from = std::max(start, j), queries = std::min<int64_t>(end, seen_until[last]) - from;
        if (queries <= 0) continue;
        const float* panel = right + c * head.padded_tokens + from * STRIP;
        add_tile<STRIP_ROWS, true>(
            queries, at(weights, from, j), head.stride(), panel, STRIP, to + j * head.padded_width + c,
            head.padded_width);
      }
  }
};

// Turns `count` scores into exp(scale·(score − highest)). Returns their sum and scale·highest + log of it.
std::pair<float, float> exponentials(float* scores, int64_t count, float scale) {
  const Vec nothing(-std::numeric_limits<float>::infinity());
  Vec most = nothing, total(0.0f);
  each_vec(count, [&](int64_t i, int64_t own) {
    most = at::vec::maximum(most, Vec::set(nothing, load(scores + i, own), own));
  });
  const float highest =
      scale * at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, most);
  each_vec(count, [&](int64_t i, int64_t own) {
    const Vec value = at::vec::fmsub(Vec(scale), load(scores + i, own), Vec(highest)).exp_u20();
    total = total + Vec::set(Vec(0.0f), value, own);
    store(scores + i, own, value);
  });
  const float sum = sum_of(total);
  return {sum, highest + std::log(sum)};
}

Tensor with_rows_together(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, "attend_slices takes float32, not ", x.scalar_type());
  return x.stride(3) == 1 ? x : x.contiguous();
}

Tensor checked_span(const Tensor& side, const Tensor& query) {
  TORCH_CHECK(
      side.scalar_type() == at::kInt && side.sizes() == query.sizes().slice(0, 2),
      "attend_slices takes spans [B, T] int32");
  return side.contiguous();
}

// query, key, value: [B, T, H, d]; first, end: [B, T] int32, of which end is for the backward. Returns [B, T, H, d], and
// log Σ exp(score) of each query, [B, H, T].
std::tuple<Tensor, Tensor> attend_slices(
    const Tensor& any_query, const Tensor& any_key, const Tensor& any_value, const Tensor& any_first, const Tensor&,
    double scale) {
  const Tensor query = with_rows_together(any_query), key = with_rows_together(any_key);
  const Tensor value = with_rows_together(any_value), first = checked_span(any_first, query);
  const Head head(query);
  const int64_t heads = query.size(2);
  Tensor y = at::empty(query.sizes(), query.options());
  Tensor logsumexp = at::empty({query.size(0), heads, head.tokens}, query.options());
  share(query.size(0) * heads, [&] {
    return [&](int64_t task) {
      const int64_t slice = task / heads, h = task % heads;
      of_core.fresh();
      const float *queries = head.left(rows_of(query, slice, h)), *values = head.right(rows_of(value, slice, h));
      const float* keys = head.right_transposed(rows_of(key, slice, h));
      float* weights = of_core.take<float>(BLOCK * head.stride());
      float* sums = of_core.take<float>(BLOCK * head.padded_width);
      const Rows<float> to = new_rows_of(y, slice, h);
      float* own_logsumexp = logsumexp.data_ptr<float>() + task * head.tokens;
      const int32_t* own_first = first.const_data_ptr<int32_t>() + slice * head.tokens;
      for (int64_t start = 0; start < head.tokens; start += BLOCK) {
        const Block block(head, own_first, start);
        float total[BLOCK];
        block.products(queries, keys, weights);
        for (int64_t t = start; t < block.end; ++t) {
          const int64_t from = own_first[t];
          std::tie(total[t - start], own_logsumexp[t]) =
              exponentials(block.at(weights, t, from), t + 1 - from, float(scale));
          block.hide(weights, t);
        }
        block.sums(weights, values, sums);
        for (int64_t t = start; t < block.end; ++t)
          head.write(sums + (t - start) * head.padded_width, 1 / total[t - start], to[t]);
      }
    };
  });
  return {y, logsumexp};
}

// The gradients of query, key and value from that of y.
std::tuple<Tensor, Tensor, Tensor> attend_slices_backward(
    const Tensor& any_grad, const Tensor& any_query, const Tensor& any_key, const Tensor& any_value,
    const Tensor& any_first, const Tensor& any_end, const Tensor& y, const Tensor& logsumexp, double scale_of_scores) {
  const Tensor grad = with_rows_together(any_grad), query = with_rows_together(any_query);
  const Tensor key = with_rows_together(any_key), value = with_rows_together(any_value);
  const Tensor first = checked_span(any_first, query), end = checked_span(any_end, query);
  const Head head(query);
  const int64_t heads = query.size(2);
  const float scale = float(scale_of_scores);
  Tensor grad_query = at::empty(query.sizes(), query.options());
  Tensor grad_key = at::empty_like(grad_query), grad_value = at::empty_like(grad_query);
  share(query.size(0) * heads, [&] {
    return [&](int64_t task) {
      const int64_t slice = task / heads, h = task % heads;
      const Rows<const float> own_grad = rows_of(grad, slice, h), own_y = rows_of(y, slice, h);
      const Rows<const float> own_query = rows_of(query, slice, h), own_key = rows_of(key, slice, h);
      of_core.fresh();
      const float *queries = head.left(own_query), *grads = head.left(own_grad);
      const float* keys = head.right_transposed(own_key);
      const float* values = head.right_transposed(rows_of(value, slice, h));
      const float *queries_right = head.right(own_query), *grads_right = head.right(own_grad);
      const float* keys_right = head.right(own_key);
      float *key_sums = head.zeros(), *value_sums = head.zeros();
      float* weights = of_core.take<float>(BLOCK * head.stride());
      float* score_grads = of_core.take<float>(BLOCK * head.stride());
      float* query_sums = of_core.take<float>(BLOCK * head.padded_width);
      const Rows<float> to_query = new_rows_of(grad_query, slice, h), to_key = new_rows_of(grad_key, slice, h);
      const Rows<float> to_value = new_rows_of(grad_value, slice, h);
      const float* own_logsumexp = logsumexp.const_data_ptr<float>() + task * head.tokens;
      const int32_t* own_first = first.const_data_ptr<int32_t>() + slice * head.tokens;
      const int32_t* own_end = end.const_data_ptr<int32_t>() + slice * head.tokens;
      for (int64_t start = 0; start < head.tokens; start += BLOCK) {
        const Block block(head, own_first, start);
        block.products(queries, keys, weights);
        block.products(grads, values, score_grads);
        for (int64_t t = start; t < block.end; ++t) {
          const int64_t from = own_first[t];
          float *weight = block.at(weights, t, from), *score_grad = block.at(score_grads, t, from);
          Vec products(0.0f);
          each_vec(head.width, [&](int64_t c, int64_t count) {
            products = at::vec::fmadd(load(own_grad[t] + c, count), load(own_y[t] + c, count), products);
          });
          const Vec delta(sum_of(products)), shift(own_logsumexp[t]);
          each_vec(t + 1 - from, [&](int64_t i, int64_t count) {
            const Vec share_of_key = at::vec::fmsub(Vec(scale), load(weight + i, count), shift).exp_u20();
            store(weight + i, count, share_of_key);
            store(score_grad + i, count, share_of_key * (load(score_grad + i, count) - delta));
          });
          block.hide(weights, t);
          block.hide(score_grads, t);
        }
        block.sums(score_grads, keys_right, query_sums);
        for (int64_t t = start; t < block.end; ++t)
          head.write(query_sums + (t - start) * head.padded_width, scale, to_query[t]);
        block.add_sums_of_keys(weights, own_end, grads_right, value_sums);
        block.add_sums_of_keys(score_grads, own_end, queries_right, key_sums);
      }
      for (int64_t t = 0; t < head.tokens; ++t) {
        head.write(key_sums + t * head.padded_width, scale, to_key[t]);
        head.write(value_sums + t * head.padded_width, 1, to_value[t]);
      }
    };
  });
  return {grad_query, grad_key, grad_value};
}

// ---- one token of each stream --------------------------------------------------------------------------------------

// From the layer's input to its output in one call: what a token takes in torch is some forty calls, each of which costs
// more than what it computes.

constexpr int64_t ENOUGH_ROWS = 64;  // of a matrix, that pay for a second thread

float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// to [streams, rows] = x [streams, columns]·matrixᵀ, matrix [rows, columns].
void multiply(const float* x, const float* matrix, float* to, int64_t streams, int64_t rows, int64_t columns) {
  at::parallel_for(0, rows, ENOUGH_ROWS, [&](int64_t begin, int64_t end) {
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
      "attend_slices(Tensor query, Tensor key, Tensor value, Tensor first, Tensor end, float scale) -> (Tensor, Tensor)");
  library.def(
      "attend_slices_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor first, Tensor end, Tensor y, "
      "Tensor logsumexp, float scale) -> (Tensor, Tensor, Tensor)");
  library.def(
      "attend_token(Tensor n, Tensor qkvo, Tensor cos, Tensor sin, Tensor? value_embedding, Tensor mix, Tensor mask, "
      "Tensor(a!) keys, Tensor(b!) values, int place, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) {
  library.impl("attend_slices", attend_slices);
  library.impl("attend_slices_backward", attend_slices_backward);
  library.impl("attend_token", attend_token);
}
