// The bank's feed-forward on a CPU with AVX2 or AVX-512: y = Σ_k gate_k · W2[e_k]·relu²(W1[e_k]·(scale·x + bias)).
//
// Rows go through in blocks of one expert each, all of a block on one core: gathered, multiplied, gated and written to
// their place while they are in its cache. T is the type of the activations, float or, with AVX-512's products of them,
// BFloat16; sums are float.

#include <torch/library.h>

#include <numeric>

#include "cpu_kernels.h"

namespace {

constexpr int64_t AHEAD = 6;  // rows from asking for one to its turn
constexpr int64_t ALIGN = 4;  // rows of a block: few enough sizes that oneDNN has compiled them all soon

// ---- which rows are multiplied together ----------------------------------------------------------------------------

// A pick is a (token, k) pair, token·K + k; picks are in the order of their expert, then of their microbatch.

// Rows of one expert and one microbatch, not too many: what a gradient of its weights is summed over in float.
struct Segment {
  int64_t microbatch;
  int64_t first, rows;  // of its picks, in `Plan::picks`
  int64_t offset;       // of its first row in `Operands`: an even number, as they may lie in pairs
};

// Segments of one expert that follow one another, as many as go through the products of rows together.
struct Block {
  int64_t expert;
  int64_t first_segment, segments;
  int64_t first, rows;  // of its picks
  int64_t padded;       // rows, filled up with zeros
};

struct Plan {
  int64_t largest;  // rows that a block may have
  std::vector<int64_t> picks;
  std::vector<Segment> segments;
  std::vector<int64_t> first_segment;  // [E + 1] of each expert
  std::vector<int64_t> first_block;    // [E + 1]
  std::vector<Block> blocks;

  int64_t experts() const { return int64_t(first_block.size()) - 1; }
  int64_t rows(int64_t expert) const {
    int64_t sum = 0;
    for (int64_t i = first_block[expert]; i < first_block[expert + 1]; ++i) sum += blocks[i].rows;
    return sum;
  }
  // The pick AHEAD of that in a block's row r: rows that are picked lie anywhere, and are asked for before their turn.
  int64_t ahead(const Block& block, int64_t r) const {
    return picks[block.first + std::min(r + AHEAD, block.rows - 1)];
  }
  int64_t operand_rows() const { return segments.empty() ? 0 : segments.back().offset + even(segments.back().rows); }
};

int64_t padded(int64_t rows) { return round_up(rows, ALIGN); }

// Rows that go through together: many enough blocks that the cores finish together, large enough ones that an expert's
// matrices, which may come from memory, are read but once or twice, and small enough ones that their activations stay in
// a core's cache.
constexpr int64_t LARGEST = 192;
int64_t largest_segment(int64_t picks) { return std::clamp<int64_t>(picks / 64 / ALIGN * ALIGN, 128, LARGEST); }

Plan make_plan(const Tensor& chosen, int64_t experts, int64_t microbatches) {
  const int64_t count = chosen.numel(), in_microbatch = count / microbatches;
  const int64_t* expert_of = chosen.const_data_ptr<int64_t>();
  TORCH_CHECK(count % microbatches == 0, count, " picks are no ", microbatches, " microbatches");
  std::vector<int64_t> start(experts * microbatches + 1, 0);  // of each expert's and microbatch's picks
  const auto each_pick = [&](auto body) {
    for (int64_t m = 0, pick = 0; m < microbatches; ++m)
      for (int64_t i = 0; i < in_microbatch; ++i, ++pick) body(pick, expert_of[pick] * microbatches + m);
  };
  each_pick([&](int64_t pick, int64_t run) {
    TORCH_CHECK(expert_of[pick] >= 0 && expert_of[pick] < experts, "expert ", expert_of[pick], " of ", experts);
    ++start[run + 1];
  });
  for (size_t run = 1; run < start.size(); ++run) start[run] += start[run - 1];
  Plan plan;
  plan.picks.resize(count);
  std::vector<int64_t> place(start.begin(), start.end() - 1);
  each_pick([&](int64_t pick, int64_t run) { plan.picks[place[run]++] = pick; });
  const int64_t largest = largest_segment(in_microbatch);  // whatever other microbatches go through with this one
  plan.largest = microbatches == 1 ? largest : LARGEST;
  int64_t offset = 0;
  for (int64_t e = 0; e < experts; ++e) {
    plan.first_segment.push_back(int64_t(plan.segments.size()));
    for (int64_t m = 0; m < microbatches; ++m) {
      const int64_t begin = start[e * microbatches + m], end = start[e * microbatches + m + 1];
      // As even as whole multiples of ALIGN can be: a last part of a few rows would cost nearly as much as a full one.
      const int64_t parts = (end - begin + largest - 1) / largest;
      const int64_t each = parts == 0 ? 0 : padded((end - begin + parts - 1) / parts);
      for (int64_t first = begin; first < end; first += each) {
        const int64_t rows = std::min(each, end - first);
        plan.segments.push_back({m, first, rows, offset});
        offset += even(rows);
      }
    }
    plan.first_block.push_back(int64_t(plan.blocks.size()));
    for (int64_t i = plan.first_segment[e]; i < int64_t(plan.segments.size()); ++i) {
      const Segment& segment = plan.segments[i];
      const bool opens = i == plan.first_segment[e];
      if (opens || plan.blocks.back().rows + segment.rows > plan.largest)
        plan.blocks.push_back({e, i, 0, segment.first, 0, 0});
      Block& block = plan.blocks.back();
      ++block.segments;
      block.rows += segment.rows;
      block.padded = padded(block.rows);
    }
  }
  plan.first_segment.push_back(int64_t(plan.segments.size()));
  plan.first_block.push_back(int64_t(plan.blocks.size()));
  return plan;
}

template <bool WRITTEN, typename T>
void prefetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c, WRITTEN);
}

// ---- what one layer's call is given --------------------------------------------------------------------------------

template <typename T>
struct Layer {
  int64_t width, hidden, top_k;
  const T* x;          // [N, D]
  const float* gates;  // [N·K]
  const float* scale;  // [E, D] of the first microbatch, as of all of them, or null
  const float* bias;

  Layer(const Tensor& x, const Tensor& gates, const Tensor& scale, const Tensor& bias, int64_t hidden)
      : width(x.size(1)), hidden(hidden), top_k(gates.size(1)), x(x.const_data_ptr<T>()),
        gates(gates.const_data_ptr<float>()),
        scale(scale.numel() ? scale.const_data_ptr<float>() : nullptr),
        bias(bias.numel() ? bias.const_data_ptr<float>() : nullptr) {}

  // The rows of a block as its expert sees them, zeros behind the last one. to: [padded, D].
  void gather(const Plan& plan, const Block& block, T* to) const {
    for (int64_t r = 0; r < block.rows; ++r) {
      prefetch<false>(x + plan.ahead(block, r) / top_k * width, width);
      const T* from = x + plan.picks[block.first + r] / top_k * width;
      if (scale == nullptr) {
        std::copy(from, from + width, to + r * width);
        continue;
      }
      const float *own_scale = scale + block.expert * width, *own_bias = bias + block.expert * width;
      each_vec(width, [&](int64_t c, int64_t count) {
        const Vec value = load(from + c, count);
        store(to + r * width + c, count, at::vec::fmadd(value, load(own_scale + c, count), load(own_bias + c, count)));
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

  void expect(int64_t pick) const {
    if (top_k == 1) prefetch<true>(to + pick * width, width);
    else prefetch<true>(parts.const_data_ptr<float>() + pick * width, width);
  }

  template <typename Value>
  void put(int64_t pick, Value value) {
    each_vec(width, [&](int64_t c, int64_t count) {
      if (top_k == 1) store(to + pick * width + c, count, value(c, count));
      else store(parts.data_ptr<float>() + pick * width + c, count, value(c, count));
    });
  }

  void finish() {
    if (top_k == 1) return;
    const int64_t tokens = parts.size(0) / top_k;
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        each_vec(width, [&](int64_t c, int64_t count) {
          Vec sum(0.0f);
          for (int64_t k = 0; k < top_k; ++k)
            sum = sum + load(parts.data_ptr<float>() + (token * top_k + k) * width + c, count);
          store(to + token * width + c, count, sum);
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
      multiply(block.padded, hidden, width, rows, width, w1 + block.expert * width * hidden, inner);
      T* relu = kept == nullptr ? squares : kept + block.first * hidden;
      std::fill(squares + block.rows * hidden, squares + block.padded * hidden, T(0));
      each_vec(block.rows * hidden, [&](int64_t i, int64_t count) {
        store(relu + i, count, at::vec::clamp_min(load(inner + i, count), Vec(0.0f)));
        const Vec value = load(relu + i, count);  // as rounded, so that the backward is of the same numbers
        store(squares + i, count, value * value);
      });
      multiply(block.padded, width, hidden, squares, hidden, w2 + block.expert * width * hidden, outer);
      for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t pick = plan.picks[block.first + r];
        sums.expect(plan.ahead(block, r));
        const Vec gate(layer.gates[pick]);
        sums.put(pick, [&](int64_t c, int64_t count) {
          return gate * load(outer + r * width + c, count);
        });
      }
    };
  });
  sums.finish();
}

// ---- backward ------------------------------------------------------------------------------------------------------

// What the weights' gradients are products of: [even(rows), columns] of each segment, in panels, at (offset - first)
// times columns.
template <typename T>
struct Operands {
  int64_t first;          // offset of the first segment that lies here
  T *grad_hidden, *rows;  // w1: gradient of W1·rows, and the rows as the expert sees them
  T *grad_y, *squares;    // w2: gradient of W2·squares, and relu²

  Operands(Scratch& memory, int64_t rows, int64_t width, int64_t hidden)
      : first(0), grad_hidden(memory.take<T>(rows * hidden)), rows(memory.take<T>(rows * width)),
        grad_y(memory.take<T>(rows * width)), squares(memory.take<T>(rows * hidden)) {}

  // from: [segment.rows, columns]
  void put(const Segment& segment, const T* from, T* to, int64_t columns) const {
    as_right<STRIP>(from, to + (segment.offset - first) * columns, 0, segment.rows, even(segment.rows), columns);
  }
};

template <typename T>
struct Backward {
  const Layer<T>& layer;
  const Plan& plan;
  const T *grad_y, *w1, *w2, *kept;
  PickSums<T> grad_x;
  float *grad_gates, *adapter_parts;

  // What a core does with the rows of a block. It leaves the operands of the weights' gradients.
  auto prepare_rows() {
    const int64_t width = layer.width, hidden = layer.hidden;
    T *rows = of_core.take<T>(plan.largest * width), *squares = of_core.take<T>(plan.largest * hidden);
    T* grad_hidden = of_core.take<T>(plan.largest * hidden);
    float *inner = of_core.take<float>(plan.largest * hidden), *outer = of_core.take<float>(plan.largest * width);
    return [=, this](const Block& block, const Operands<T>& operands) {
      const Segment* segments = &plan.segments[block.first_segment];
      const auto put = [&](const T* from, T* to, int64_t columns) {
        for (const Segment* segment = segments; segment < segments + block.segments; ++segment)
          operands.put(*segment, from + (segment->first - block.first) * columns, to, columns);
      };
      for (int64_t r = 0; r < block.rows; ++r) {
        prefetch<false>(grad_y + plan.ahead(block, r) / layer.top_k * width, width);
        const T* from = grad_y + plan.picks[block.first + r] / layer.top_k * width;
        std::copy(from, from + width, rows + r * width);
      }
      std::fill(rows + block.rows * width, rows + block.padded * width, T(0));
      multiply(block.padded, hidden, width, rows, width, w2 + block.expert * width * hidden, inner);
      for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t pick = plan.picks[block.first + r];
        const T* relu = kept + (block.first + r) * hidden;
        const Vec gate(layer.gates[pick]);
        Vec grad_gate(0.0f);
        each_vec(hidden, [&](int64_t c, int64_t count) {
          const Vec value = load(relu + c, count), grad = load(inner + r * hidden + c, count);
          const Vec square = value * value;
          store(squares + r * hidden + c, count, square);
          grad_gate = at::vec::fmadd(square, grad, grad_gate);
          store(grad_hidden + r * hidden + c, count, gate * grad * (value + value));
        });
        grad_gates[pick] = sum_of(grad_gate);
        each_vec(width, [&](int64_t c, int64_t count) {
          store(rows + r * width + c, count, gate * load(rows + r * width + c, count));
        });
      }
      std::fill(grad_hidden + block.rows * hidden, grad_hidden + block.padded * hidden, T(0));
      put(squares, operands.squares, hidden);
      put(grad_hidden, operands.grad_hidden, hidden);
      put(rows, operands.grad_y, width);
      multiply(block.padded, width, hidden, grad_hidden, hidden, w1 + block.expert * width * hidden, outer);
      layer.gather(plan, block, rows);
      put(rows, operands.rows, width);
      const float* scale = layer.scale == nullptr ? nullptr : layer.scale + block.expert * width;
      for (const Segment* segment = segments; segment < segments + block.segments; ++segment) {
        float* grad_scale = adapter_parts + 2 * (segment - plan.segments.data()) * width;
        float* grad_bias = grad_scale + width;
        if (scale != nullptr) std::fill(grad_scale, grad_scale + 2 * width, 0.0f);
        for (int64_t r = segment->first - block.first; r < segment->first - block.first + segment->rows; ++r) {
          const int64_t pick = plan.picks[block.first + r];
          grad_x.expect(plan.ahead(block, r));
          const T* x = layer.x + pick / layer.top_k * width;
          grad_x.put(pick, [&](int64_t c, int64_t count) {
            const Vec grad = load(outer + r * width + c, count);
            if (scale == nullptr) return grad;
            store(grad_scale + c, count, at::vec::fmadd(grad, load(x + c, count), load(grad_scale + c, count)));
            store(grad_bias + c, count, grad + load(grad_bias + c, count));
            return grad * load(scale + c, count);
          });
        }
      }
    };
  }

  // Adds what `count` segments of an expert give to TILE rows of grad_w1 [E, F, D] or, behind these, of grad_w2
  // [E, D, F], float or double: what a segment adds is summed in float.
  template <typename Sum>
  void weights_of_tile(
      const Operands<T>& operands, int64_t expert, int64_t first, int64_t count, int64_t tile, Sum* grad_w1,
      Sum* grad_w2) const {
    const int64_t width = layer.width, hidden = layer.hidden, tiles_w1 = (hidden + TILE - 1) / TILE;
    const bool of_w1 = tile < tiles_w1;
    const int64_t rows = of_w1 ? hidden : width, columns = of_w1 ? width : hidden;
    const int64_t begin = (of_w1 ? tile : tile - tiles_w1) * TILE, end = std::min(begin + TILE, rows);
    const T *left = of_w1 ? operands.grad_hidden : operands.grad_y;
    const T *right = of_w1 ? operands.rows : operands.squares;
    Sum* to = (of_w1 ? grad_w1 : grad_w2) + (expert * rows + begin) * columns;
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t at = plan.segments[i].offset - operands.first;
      add_product(plan.segments[i].rows, left + at * rows, rows, begin, end, right + at * columns, columns, to);
    }
  }

  template <typename Sum>
  void run(Sum* grad_w1, Sum* grad_w2) {
    const int64_t width = layer.width, hidden = layer.hidden, experts = plan.experts();
    const int64_t tiles = (hidden + TILE - 1) / TILE + (width + TILE - 1) / TILE;
    if (expert_by_expert(2 * width * hidden * int64_t(sizeof(Sum)))) {
      std::vector<int64_t> largest_first(experts);
      std::iota(largest_first.begin(), largest_first.end(), 0);
      const auto larger = [&](int64_t a, int64_t b) { return plan.rows(a) > plan.rows(b); };
      std::stable_sort(largest_first.begin(), largest_first.end(), larger);
      share(experts, [&] {
        Operands<T> operands(of_core.fresh(), 2 * plan.largest, width, hidden);
        auto rows_of_block = prepare_rows();
        return [&, operands, rows_of_block](int64_t i) mutable {
          const int64_t expert = largest_first[i];
          for (int64_t b = plan.first_block[expert]; b < plan.first_block[expert + 1]; ++b) {
            const Block& block = plan.blocks[b];
            operands.first = plan.segments[block.first_segment].offset;
            rows_of_block(block, operands);
            for (int64_t tile = 0; tile < tiles; ++tile)
              weights_of_tile(operands, expert, block.first_segment, block.segments, tile, grad_w1, grad_w2);
          }
        };
      });
    } else {
      const Operands<T> operands(of_call.fresh(), plan.operand_rows(), width, hidden);
      share(int64_t(plan.blocks.size()), [&] {
        of_core.fresh();
        return [&, rows_of_block = prepare_rows()](int64_t b) { rows_of_block(plan.blocks[b], operands); };
      });
      share(experts * tiles, [&] {
        return [&](int64_t i) {
          const int64_t expert = i / tiles, first = plan.first_segment[expert];
          weights_of_tile(operands, expert, first, plan.first_segment[expert + 1] - first, i % tiles, grad_w1, grad_w2);
        };
      });
    }
    grad_x.finish();
  }

  // Whether a core does all of an expert, whose operands and gradients then stay in its cache; the same bits. Not where
  // the gradients are larger, nor where cores would wait for the one with the largest expert.
  bool expert_by_expert(int64_t bytes) const {
    const int64_t threads = at::get_num_threads();
    int64_t largest = 0;
    for (int64_t e = 0; e < plan.experts(); ++e) largest = std::max(largest, plan.rows(e));
    return bytes <= (1 << 20) && plan.experts() >= 4 * threads && largest * threads <= int64_t(plan.picks.size());
  }
};

// parts: [segments, 2, D]; grad_scale, grad_bias: [M, E, D].
void sum_adapter_parts(const Plan& plan, const float* parts, int64_t width, float* grad_scale, float* grad_bias) {
  const int64_t experts = plan.experts();
  at::parallel_for(0, experts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t expert = begin; expert < end; ++expert)
      for (int64_t i = plan.first_segment[expert]; i < plan.first_segment[expert + 1]; ++i) {
        const int64_t to = (plan.segments[i].microbatch * experts + expert) * width;
        for (int64_t c = 0; c < width; ++c) {
          grad_scale[to + c] += parts[2 * i * width + c];
          grad_bias[to + c] += parts[(2 * i + 1) * width + c];
        }
      }
  });
}

// ---- the operators -------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& x, const Tensor& experts, const Tensor& gates, const Tensor& scale, const Tensor& bias,
    const Tensor& w1, const Tensor& w2, int64_t microbatches, bool keep) {
  const int64_t hidden = w1.size(2);
  const Plan plan = make_plan(experts, w1.size(0), microbatches);
  Tensor y = at::empty_like(x);
  const int64_t rows = keep ? experts.numel() : 0;
  Tensor kept = at::empty({rows, hidden}, x.options());
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
    const Tensor& bias, const Tensor& w1, const Tensor& w2, const Tensor& kept, int64_t microbatches, Tensor grad_w1,
    Tensor grad_w2) {
  const int64_t width = x.size(1), hidden = kept.size(1);
  const Plan plan = make_plan(experts, w1.size(0), microbatches);
  Tensor grad_x = at::empty_like(x), grad_gates = at::empty_like(gates);
  Tensor grad_scale = at::zeros_like(scale), grad_bias = at::zeros_like(bias);
  Tensor parts = at::empty({scale.numel() ? int64_t(plan.segments.size()) : 0, 2, width}, scale.options());
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Layer<T> layer(x, gates, scale, bias, hidden);
    Backward<T> backward{
        layer, plan, grad_y.const_data_ptr<T>(), w1.const_data_ptr<T>(), w2.const_data_ptr<T>(),
        kept.const_data_ptr<T>(), PickSums<T>(grad_x, layer.top_k), grad_gates.data_ptr<float>(),
        parts.data_ptr<float>()};
    if (grad_w1.scalar_type() == at::kDouble) backward.run(grad_w1.data_ptr<double>(), grad_w2.data_ptr<double>());
    else backward.run(grad_w1.data_ptr<float>(), grad_w2.data_ptr<float>());
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
      "bank_forward(Tensor x, Tensor experts, Tensor gates, Tensor scale, Tensor bias, Tensor w1, Tensor w2, int "
      "microbatches, bool keep) -> (Tensor, Tensor)");
  library.def(
      "bank_backward(Tensor grad_y, Tensor x, Tensor experts, Tensor gates, Tensor scale, Tensor bias, Tensor w1, "
      "Tensor w2, Tensor kept, int microbatches, Tensor(a!) grad_w1, Tensor(b!) grad_w2) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) {
  library.impl("bank_arrange", arrange);
  library.impl("bank_forward", forward_op);
  library.impl("bank_backward", backward_op);
}
