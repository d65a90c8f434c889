// The bank's feed-forward on a CPU with AVX-512: y = Σ_k gate_k · W2[e_k]·relu²(W1[e_k]·(scale·x + bias)).
//
// Rows go through in blocks of one expert each, all of a block on one core: gathered, multiplied, gated and written to
// their place while they are in its cache. The products are oneDNN's, in one thread each, by way of at::native::cpublas.
// Cores take blocks as they get free, but no sum depends on which core took what: the same bits for any thread count.
//
// T is the type of the activations, float or BFloat16; sums are float. A matrix [k, n] that stands at the right of a
// product lies in panels [k, PANEL], one behind the other: rows further apart would share a few lines of the cache
// where n is a power of two. In BFloat16 a panel lies in pairs of rows, [k/2, PANEL, 2], as dot products read it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
namespace blas = at::native::cpublas;

constexpr int64_t ALIGN = 16;  // rows of a block: few enough sizes that oneDNN has compiled them all soon
constexpr int64_t PANEL = 64;  // columns of a product: as many as oneDNN's innermost loop takes
constexpr int64_t TILE = 128;  // rows of a weight's gradient that one core sums up

// ---- rows of numbers, 16 at a time ---------------------------------------------------------------------------------

inline __m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store(float* to, __mmask16 lanes, __m512 value) { _mm512_mask_storeu_ps(to, lanes, value); }

inline __m512 load(const BFloat16* from, __mmask16 lanes) {
  __m512 value;
  at::vec::cvtbf16_fp32(_mm256_maskz_loadu_epi16(lanes, from), value);
  return value;
}
inline void store(BFloat16* to, __mmask16 lanes, __m512 value) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(to, lanes, __m256i(_mm512_cvtneps_pbh(value)));
#else
  _mm256_mask_storeu_epi16(to, lanes, at::vec::cvtfp32_bf16(value));
#endif
}

template <typename Body>
inline void each16(int64_t count, Body body) {
  int64_t at = 0;
  for (; at + 16 <= count; at += 16) body(at, __mmask16(0xFFFF));
  if (at < count) body(at, __mmask16((1u << (count - at)) - 1));
}

// from [rows, columns] to [columns, rows].
template <typename T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t SIDE = sizeof(T) == 2 ? 32 : 16;
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t c = 0; c < columns; c += SIDE)
      at::vec::transpose_mxn<T>(
          from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride,
          int(std::min(SIDE, rows - r)), int(std::min(SIDE, columns - c)));
}

template <typename Body>
inline void each_panel(int64_t columns, Body body) {
  for (int64_t at = 0; at < columns; at += PANEL) body(at, std::min(PANEL, columns - at));
}

inline void put_panel(const float* from, int64_t stride, float* to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) std::copy(from + r * stride, from + r * stride + columns, to + r * columns);
}
inline void put_panel(const BFloat16* from, int64_t stride, BFloat16* to, int64_t rows, int64_t columns) {
  at::vec::pack_vnni2(from, to, stride, rows, columns);
}

// Rows first, first + 1, ... of a matrix [k, n], as it stands at the right of a product. from: [rows, n].
template <typename T>
void as_right(const T* from, T* to, int64_t first, int64_t rows, int64_t k, int64_t n) {
  each_panel(n, [&](int64_t at, int64_t columns) {
    put_panel(from + at, n, to + at * k + first * columns, rows, columns);
  });
}

// c [m, n] = a [m, k]·b [k, n], or added to c.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b, float* c, bool add) {
  each_panel(n, [&](int64_t at, int64_t columns) {
    blas::brgemm(m, columns, k, a_stride, columns, n, add, a, b + at * k, c + at, sizeof(T) == 2);
  });
}

// ---- work, shared by the cores -------------------------------------------------------------------------------------

// Runs task(i) for every i < count; `prepare` makes each core's task, with scratch of its own.
template <typename Prepare>
void share(int64_t count, Prepare prepare) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    auto task = prepare();
    for (int64_t i = next++; i < count; i = next++) task(i);
    blas::brgemm_release();
  });
}

// Memory that a thread keeps from call to call: to be given new pages takes longer than to fill them.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t count) {
    if (taken_ == int64_t(buffers_.size())) buffers_.emplace_back();
    Tensor& buffer = buffers_[taken_++];
    const int64_t bytes = count * int64_t(sizeof(T));
    if (!buffer.defined() || buffer.numel() < bytes) buffer = at::empty({bytes}, at::kByte);
    return reinterpret_cast<T*>(buffer.data_ptr<uint8_t>());
  }
  // All that was taken may be taken again.
  Scratch& fresh() {
    taken_ = 0;
    return *this;
  }

 private:
  std::vector<Tensor> buffers_;
  int64_t taken_ = 0;
};

thread_local Scratch of_core;  // while a core works on one task after another
thread_local Scratch of_call;  // while one call lasts

// ---- which rows are multiplied together ----------------------------------------------------------------------------

struct Block {
  int64_t expert;
  int64_t first;  // of its picks, in `Plan::picks`
  int64_t rows;
  int64_t padded;  // rows, filled up with zeros
  int64_t offset;  // of its first row among the padded rows of all blocks
};

// A pick is a (token, k) pair, token·K + k.
struct Plan {
  int64_t largest;             // rows that a block may have
  std::vector<int64_t> picks;  // in order of their expert
  std::vector<Block> blocks;
  std::vector<int64_t> first_block;  // [E + 1] of each expert
};

// At most: only an expert's last block is filled up.
int64_t padded_rows(int64_t picks, int64_t experts) { return picks + experts * ALIGN; }

Plan make_plan(const Tensor& chosen, int64_t experts) {
  const int64_t count = chosen.numel();
  const int64_t* expert_of = chosen.const_data_ptr<int64_t>();
  std::vector<int64_t> start(experts + 1, 0);
  for (int64_t pick = 0; pick < count; ++pick) {
    TORCH_CHECK(expert_of[pick] >= 0 && expert_of[pick] < experts, "expert ", expert_of[pick], " of ", experts);
    ++start[expert_of[pick] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
  Plan plan;
  // Many enough that the cores finish together, large enough that an expert's matrices, which may come from memory, are
  // read but once or twice, and small enough that a block's activations stay in a core's cache.
  plan.largest = std::clamp<int64_t>(count / 64 / ALIGN * ALIGN, 128, 192);
  plan.picks.resize(count);
  std::vector<int64_t> place(start.begin(), start.end() - 1);
  for (int64_t pick = 0; pick < count; ++pick) plan.picks[place[expert_of[pick]]++] = pick;
  int64_t offset = 0;
  for (int64_t e = 0; e < experts; ++e) {
    plan.first_block.push_back(int64_t(plan.blocks.size()));
    const int64_t rows = start[e + 1] - start[e], blocks = (rows + plan.largest - 1) / plan.largest;
    // As even as whole multiples of ALIGN can be: a last block of a few rows would cost nearly as much as a full one.
    const int64_t each = blocks == 0 ? 0 : ((rows + blocks - 1) / blocks + ALIGN - 1) / ALIGN * ALIGN;
    for (int64_t first = start[e]; first < start[e + 1]; first += each) {
      const int64_t own = std::min(each, start[e + 1] - first), padded = (own + ALIGN - 1) / ALIGN * ALIGN;
      plan.blocks.push_back({e, first, own, padded, offset});
      offset += padded;
    }
  }
  plan.first_block.push_back(int64_t(plan.blocks.size()));
  return plan;
}

// ---- what one layer's call is given --------------------------------------------------------------------------------

template <typename T>
struct Layer {
  int64_t width, hidden, top_k;
  const T* x;          // [N, D]
  const float* gates;  // [N·K]
  const float* scale;  // [E, D], or null
  const float* bias;

  Layer(const Tensor& x, const Tensor& gates, const Tensor& scale, const Tensor& bias, int64_t hidden)
      : width(x.size(1)), hidden(hidden), top_k(gates.size(1)), x(x.const_data_ptr<T>()),
        gates(gates.const_data_ptr<float>()),
        scale(scale.numel() ? scale.const_data_ptr<float>() : nullptr),
        bias(bias.numel() ? bias.const_data_ptr<float>() : nullptr) {}

  // The block's rows as its expert sees them, zeros behind the last one. to: [padded, D].
  void gather(const Plan& plan, const Block& block, T* to) const {
    for (int64_t r = 0; r < block.rows; ++r) {
      const T* from = x + plan.picks[block.first + r] / top_k * width;
      if (scale == nullptr) {
        std::copy(from, from + width, to + r * width);
        continue;
      }
      const float *own_scale = scale + block.expert * width, *own_bias = bias + block.expert * width;
      each16(width, [&](int64_t c, __mmask16 lanes) {
        const __m512 value = load(from + c, lanes);
        store(to + r * width + c, lanes, _mm512_fmadd_ps(value, load(own_scale + c, lanes), load(own_bias + c, lanes)));
      });
    }
    std::fill(to + block.rows * width, to + block.padded * width, T(0));
  }
};

// Where each pick's row [D] of floats goes until all K of a token are there; with K = 1 it is written as it comes.
template <typename T>
struct PickSums {
  int64_t width, top_k;
  T* to;  // [N, D]
  Tensor parts;

  PickSums(Tensor& result, int64_t top_k)
      : width(result.size(1)), top_k(top_k), to(result.data_ptr<T>()),
        parts(at::empty({top_k == 1 ? 0 : result.size(0) * top_k, width}, at::kFloat)) {}

  template <typename Value>
  void put(int64_t pick, Value value) {
    each16(width, [&](int64_t c, __mmask16 lanes) {
      if (top_k == 1) store(to + pick * width + c, lanes, value(c, lanes));
      else store(parts.data_ptr<float>() + pick * width + c, lanes, value(c, lanes));
    });
  }

  void finish() {
    if (top_k == 1) return;
    const int64_t tokens = parts.size(0) / top_k;
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        each16(width, [&](int64_t c, __mmask16 lanes) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t k = 0; k < top_k; ++k)
            sum = _mm512_add_ps(sum, load(parts.data_ptr<float>() + (token * top_k + k) * width + c, lanes));
          store(to + token * width + c, lanes, sum);
        });
    });
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

template <typename T>
void forward(
    const Layer<T>& layer, const Plan& plan, const T* w1, const T* w2, Tensor& y, T* kept) {
  const int64_t width = layer.width, hidden = layer.hidden;
  PickSums<T> sums(y, layer.top_k);
  share(int64_t(plan.blocks.size()), [&] {
    Scratch& own = of_core.fresh();
    T *rows = own.take<T>(plan.largest * width), *squares = own.take<T>(plan.largest * hidden);
    float *inner = own.take<float>(plan.largest * hidden), *outer = own.take<float>(plan.largest * width);
    return [&, rows, squares, inner, outer](int64_t task) {
      const Block& block = plan.blocks[task];
      layer.gather(plan, block, rows);
      multiply(block.padded, hidden, width, rows, width, w1 + block.expert * width * hidden, inner, false);
      T* relu = kept == nullptr ? squares : kept + block.offset * hidden;
      each16(block.padded * hidden, [&](int64_t i, __mmask16 lanes) {
        store(relu + i, lanes, _mm512_max_ps(load(inner + i, lanes), _mm512_setzero_ps()));
        const __m512 value = load(relu + i, lanes);  // as rounded, so that the backward is of the same numbers
        store(squares + i, lanes, _mm512_mul_ps(value, value));
      });
      multiply(block.padded, width, hidden, squares, hidden, w2 + block.expert * width * hidden, outer, false);
      for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t pick = plan.picks[block.first + r];
        const __m512 gate = _mm512_set1_ps(layer.gates[pick]);
        sums.put(pick, [&](int64_t c, __mmask16 lanes) {
          return _mm512_mul_ps(gate, load(outer + r * width + c, lanes));
        });
      }
    };
  });
  sums.finish();
}

// ---- backward ------------------------------------------------------------------------------------------------------

// What the weights' gradients are products of, for every block: [columns, padded] at the left, [padded, columns] at the
// right, at offset·columns.
template <typename T>
struct Operands {
  T *hidden_left, *rows_right;  // w1: gradient of W1·x, and x
  T *y_left, *squares_right;    // w2: gradient of the gated y, and relu²

  Operands(Scratch& memory, int64_t rows, int64_t width, int64_t hidden)
      : hidden_left(memory.take<T>(rows * hidden)), rows_right(memory.take<T>(rows * width)),
        y_left(memory.take<T>(rows * width)), squares_right(memory.take<T>(rows * hidden)) {}
};

template <typename T>
void backward_of_rows(
    const Layer<T>& layer, const Plan& plan, const T* grad_y, const T* w1, const T* w2, const T* kept, Tensor& grad_x,
    float* grad_gates, float* adapter_parts, Operands<T>& operands) {
  const int64_t width = layer.width, hidden = layer.hidden;
  PickSums<T> sums(grad_x, layer.top_k);
  share(int64_t(plan.blocks.size()), [&] {
    Scratch& own = of_core.fresh();
    T *rows = own.take<T>(plan.largest * width), *gated = own.take<T>(plan.largest * width);
    T *squares = own.take<T>(plan.largest * hidden), *grad_hidden = own.take<T>(plan.largest * hidden);
    float *inner = own.take<float>(plan.largest * hidden), *outer = own.take<float>(plan.largest * width);
    return [&, rows, gated, squares, grad_hidden, inner, outer](int64_t task) {
      const Block& block = plan.blocks[task];
      for (int64_t r = 0; r < block.rows; ++r) {
        const T* from = grad_y + plan.picks[block.first + r] / layer.top_k * width;
        std::copy(from, from + width, rows + r * width);
      }
      std::fill(rows + block.rows * width, rows + block.padded * width, T(0));
      multiply(block.padded, hidden, width, rows, width, w2 + block.expert * width * hidden, inner, false);
      const T* relu = kept + block.offset * hidden;
      for (int64_t r = 0; r < block.padded; ++r) {
        const int64_t pick = r < block.rows ? plan.picks[block.first + r] : -1;
        const __m512 gate = _mm512_set1_ps(pick < 0 ? 0.0f : layer.gates[pick]);
        __m512 grad_gate = _mm512_setzero_ps();
        each16(hidden, [&](int64_t c, __mmask16 lanes) {
          const int64_t i = r * hidden + c;
          const __m512 value = load(relu + i, lanes), grad = load(inner + i, lanes);
          const __m512 square = _mm512_mul_ps(value, value);
          store(squares + i, lanes, square);
          grad_gate = _mm512_fmadd_ps(square, grad, grad_gate);
          store(grad_hidden + i, lanes, _mm512_mul_ps(_mm512_mul_ps(gate, grad), _mm512_add_ps(value, value)));
        });
        if (pick >= 0) grad_gates[pick] = _mm512_reduce_add_ps(grad_gate);
        each16(width, [&](int64_t c, __mmask16 lanes) {
          store(gated + r * width + c, lanes, _mm512_mul_ps(gate, load(rows + r * width + c, lanes)));
        });
      }
      transpose(grad_hidden, hidden, operands.hidden_left + block.offset * hidden, block.padded, block.padded, hidden);
      as_right(squares, operands.squares_right + block.offset * hidden, 0, block.padded, block.padded, hidden);
      transpose(gated, width, operands.y_left + block.offset * width, block.padded, block.padded, width);
      multiply(block.padded, width, hidden, grad_hidden, hidden, w1 + block.expert * width * hidden, outer, false);
      layer.gather(plan, block, rows);
      as_right(rows, operands.rows_right + block.offset * width, 0, block.padded, block.padded, width);

      float *grad_scale = adapter_parts + 2 * task * width, *grad_bias = grad_scale + width;
      if (layer.scale != nullptr) std::fill(grad_scale, grad_scale + 2 * width, 0.0f);
      const float* scale = layer.scale == nullptr ? nullptr : layer.scale + block.expert * width;
      for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t pick = plan.picks[block.first + r];
        const T* x = layer.x + pick / layer.top_k * width;
        sums.put(pick, [&](int64_t c, __mmask16 lanes) {
          const __m512 grad = load(outer + r * width + c, lanes);
          if (scale == nullptr) return grad;
          store(grad_scale + c, lanes, _mm512_fmadd_ps(grad, load(x + c, lanes), load(grad_scale + c, lanes)));
          store(grad_bias + c, lanes, _mm512_add_ps(grad, load(grad_bias + c, lanes)));
          return _mm512_mul_ps(grad, load(scale + c, lanes));
        });
      }
    };
  });
  sums.finish();
}

// Adds to grad_w1 [E, F, D] and grad_w2 [E, D, F].
template <typename T>
void backward_of_weights(
    const Layer<T>& layer, const Plan& plan, const Operands<T>& operands, float* grad_w1, float* grad_w2) {
  const int64_t width = layer.width, hidden = layer.hidden, experts = int64_t(plan.first_block.size()) - 1;
  const int64_t tiles_w1 = (hidden + TILE - 1) / TILE, tiles_w2 = (width + TILE - 1) / TILE;
  share(experts * (tiles_w1 + tiles_w2), [&] {
    return [&](int64_t task) {
      const int64_t expert = task / (tiles_w1 + tiles_w2), tile = task % (tiles_w1 + tiles_w2);
      const bool first = tile < tiles_w1;
      const int64_t rows = first ? hidden : width, columns = first ? width : hidden;
      const int64_t begin = (first ? tile : tile - tiles_w1) * TILE, count = std::min(TILE, rows - begin);
      const T *left = first ? operands.hidden_left : operands.y_left;
      const T *right = first ? operands.rows_right : operands.squares_right;
      float* to = (first ? grad_w1 : grad_w2) + (expert * rows + begin) * columns;
      for (int64_t b = plan.first_block[expert]; b < plan.first_block[expert + 1]; ++b) {
        const Block& block = plan.blocks[b];
        multiply(
            count, columns, block.padded, left + block.offset * rows + begin * block.padded, block.padded,
            right + block.offset * columns, to, true);
      }
    };
  });
}

void sum_adapter_parts(const Plan& plan, const float* parts, int64_t width, float* grad_scale, float* grad_bias) {
  at::parallel_for(0, int64_t(plan.first_block.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t expert = begin; expert < end; ++expert)
      for (int64_t b = plan.first_block[expert]; b < plan.first_block[expert + 1]; ++b)
        for (int64_t c = 0; c < width; ++c) {
          grad_scale[expert * width + c] += parts[2 * b * width + c];
          grad_bias[expert * width + c] += parts[(2 * b + 1) * width + c];
        }
  });
}

// ---- the operators -------------------------------------------------------------------------------------------------

template <typename Body>
void with_type(at::ScalarType type, Body body) {
  if (type == at::kFloat) return body(float());
  TORCH_CHECK(type == at::kBFloat16, "the bank's CPU kernel takes float32 or bfloat16, not ", type);
  body(BFloat16());
}

// w [E, R, C] float32 as it stands at the right of x·wᵀ, [E, C, R], and of x·w, [E, R, C]; both of `type`.
std::tuple<Tensor, Tensor> arrange(const Tensor& weights, at::ScalarType type) {
  const Tensor w = weights.contiguous();
  const int64_t experts = w.size(0), rows = w.size(1), columns = w.size(2);
  Tensor transposed = at::empty({experts, columns, rows}, w.options().dtype(type));
  Tensor straight = at::empty({experts, rows, columns}, w.options().dtype(type));
  const float* from = w.const_data_ptr<float>();
  const int64_t strips = (rows + PANEL - 1) / PANEL;
  share(experts * strips, [&] {
    BFloat16* rounded = of_core.fresh().take<BFloat16>(PANEL * columns);
    return [&, rounded](int64_t task) {
      const int64_t expert = task / strips, begin = task % strips * PANEL, count = std::min(PANEL, rows - begin);
      const int64_t of_expert = expert * rows * columns;
      const float* strip = from + of_expert + begin * columns;
      if (type == at::kFloat) {
        transpose(strip, columns, transposed.data_ptr<float>() + of_expert + begin * columns, count, count, columns);
        as_right(strip, straight.data_ptr<float>() + of_expert, begin, count, rows, columns);
        return;
      }
      each16(count * columns, [&](int64_t i, __mmask16 lanes) { store(rounded + i, lanes, load(strip + i, lanes)); });
      as_right(rounded, straight.data_ptr<BFloat16>() + of_expert, begin, count, rows, columns);
      // Pairs of columns become pairs of rows: a transposition of 32-bit words.
      float* words = reinterpret_cast<float*>(transposed.data_ptr<BFloat16>() + of_expert + begin * columns);
      transpose(reinterpret_cast<float*>(rounded), columns / 2, words, count, count, columns / 2);
    };
  });
  return {transposed, straight};
}

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& x, const Tensor& experts, const Tensor& gates, const Tensor& scale, const Tensor& bias,
    const Tensor& w1, const Tensor& w2, bool keep) {
  const int64_t hidden = w1.size(2);
  const Plan plan = make_plan(experts, w1.size(0));
  Tensor y = at::empty_like(x);
  Tensor kept = at::empty({keep ? padded_rows(experts.numel(), w1.size(0)) : 0, hidden}, x.options());
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    forward<T>(
        Layer<T>(x, gates, scale, bias, hidden), plan, w1.const_data_ptr<T>(), w2.const_data_ptr<T>(), y,
        keep ? kept.data_ptr<T>() : nullptr);
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    const Tensor& grad_y, const Tensor& x, const Tensor& experts, const Tensor& gates, const Tensor& scale,
    const Tensor& bias, const Tensor& w1, const Tensor& w2, const Tensor& kept, Tensor grad_w1, Tensor grad_w2) {
  const int64_t width = x.size(1), hidden = kept.size(1);
  const Plan plan = make_plan(experts, w1.size(0));
  Tensor grad_x = at::empty_like(x), grad_gates = at::empty_like(gates);
  Tensor grad_scale = at::zeros_like(scale), grad_bias = at::zeros_like(bias);
  Tensor parts = at::empty({scale.numel() ? int64_t(plan.blocks.size()) : 0, 2, width}, scale.options());
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Layer<T> layer(x, gates, scale, bias, hidden);
    Operands<T> operands(of_call.fresh(), kept.size(0), width, hidden);
    backward_of_rows<T>(
        layer, plan, grad_y.const_data_ptr<T>(), w1.const_data_ptr<T>(), w2.const_data_ptr<T>(),
        kept.const_data_ptr<T>(), grad_x, grad_gates.data_ptr<float>(), parts.data_ptr<float>(), operands);
    backward_of_weights<T>(layer, plan, operands, grad_w1.data_ptr<float>(), grad_w2.data_ptr<float>());
  });
  if (scale.numel())
    sum_adapter_parts(
        plan, parts.const_data_ptr<float>(), width, grad_scale.data_ptr<float>(), grad_bias.data_ptr<float>());
  return {grad_x, grad_gates, grad_scale, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(switch_bank, library) {
  library.def("bank_arrange(Tensor weights, ScalarType type) -> (Tensor, Tensor)");
  library.def(
      "bank_forward(Tensor x, Tensor experts, Tensor gates, Tensor scale, Tensor bias, Tensor w1, Tensor w2, bool keep)"
      " -> (Tensor, Tensor)");
  library.def(
      "bank_backward(Tensor grad_y, Tensor x, Tensor experts, Tensor gates, Tensor scale, Tensor bias, Tensor w1, "
      "Tensor w2, Tensor kept, Tensor(a!) grad_w1, Tensor(b!) grad_w2) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) {
  library.impl("bank_arrange", arrange);
  library.impl("bank_forward", forward_op);
  library.impl("bank_backward", backward_op);
}
