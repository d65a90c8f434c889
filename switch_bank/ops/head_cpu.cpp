// The softly capped head and its cross-entropy in float32, with gradients: the logits of a few tokens at a time, which
// become their gradient where they lie. A token's loss and gradient have the same bits whatever tokens are beside it.

#include <torch/library.h>

#include <cmath>

#include "cpu_kernels.h"

namespace {

constexpr int64_t ROWS = 64;   // tokens whose logits a core holds
constexpr int64_t PART = 512;  // exponentials that are summed in float
// Tokens whose logits' gradients are held, so that the head's is added to but a few times.
constexpr int64_t CHUNK_LOGITS = 1 << 22, CHUNK_ROWS = 4 * ROWS;

struct Losses {
  int64_t width, vocab, ignore;
  float cap;
  const float *x, *transposed, *straight;  // the head at the right of x·headᵀ, and of the gradient of logits and it
  const int64_t* targets;
  float *losses, *grad_x;  // grad_x null: no gradients

  // z [vocab], one row of x·headᵀ, to the gradient of its loss, where that is asked for. factor: scratch [vocab].
  // Returns the loss.
  float loss_and_gradient(float* z, int64_t target, float* factor) const {
    if (target == ignore) {
      std::fill(z, z + vocab, 0.0f);
      return 0;
    }
    const float z_of_target = z[target];
    const Vec square_of_cap(cap * cap), scale(cap);
    double sum = 0;  // of parts in float: one float would lose digits to a whole vocabulary
    for (int64_t begin = 0; begin < vocab; begin += PART) {
      Vec part(0.0f);
      each_vec(std::min(PART, vocab - begin), [&](int64_t i, int64_t count) {
        const int64_t at = begin + i;
        const Vec value = load(z + at, count), inverse = Vec(1.0f) / at::vec::fmadd(value, value, square_of_cap).sqrt();
        // Within ±cap the exponentials need no maximum taken out.
        const Vec exponential = (scale * value * inverse).exp_u20();
        store(z + at, count, exponential);
        store(factor + at, count, inverse * inverse * inverse);
        part = part + Vec::set(Vec(0.0f), exponential, count);
      });
      sum += sum_of(part);
    }
    if (grad_x != nullptr) {
      const float cube_of_cap = cap * cap * cap;
      const Vec by_sum(float(cube_of_cap / sum));
      each_vec(vocab, [&](int64_t i, int64_t count) {
        store(z + i, count, by_sum * load(z + i, count) * load(factor + i, count));
      });
      z[target] -= cube_of_cap * factor[target];
    }
    return float(std::log(sum)) - cap * z_of_target / std::sqrt(z_of_target * z_of_target + cap * cap);
  }

  // Of tokens first, first + 1, ... The gradients of their logits stay in z [rows, vocab].
  void of_rows(int64_t first, int64_t rows, float* z, float* factor) const {
    multiply(rows, vocab, width, x + first * width, width, transposed, z);
    for (int64_t r = 0; r < rows; ++r)
      losses[first + r] = loss_and_gradient(z + r * vocab, targets[first + r], factor);
    if (grad_x != nullptr) multiply(rows, width, vocab, z, vocab, straight, grad_x + first * width);
  }
};

// x: [N, D]; head: [V, D]; targets: [N] in 0..V-1, or `ignore`, which gives no loss. Returns the losses [N] and, if
// `gradients`, those of their sum: [N, D] of x, and [M, V, D] of the head for each of M microbatches, which N tokens are.
std::tuple<Tensor, Tensor, Tensor> head_losses(
    const Tensor& any_x, const Tensor& head, const Tensor& any_targets, int64_t microbatches, double cap, int64_t ignore,
    bool gradients) {
  const Tensor x = any_x.contiguous(), targets = any_targets.contiguous();
  TORCH_CHECK(x.scalar_type() == at::kFloat && head.scalar_type() == at::kFloat, "the head's kernel takes float32");
  const int64_t tokens = x.size(0), width = x.size(1), vocab = head.size(0), in_microbatch = tokens / microbatches;
  TORCH_CHECK(tokens % microbatches == 0, tokens, " tokens are no ", microbatches, " microbatches");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(target[t] == ignore || (target[t] >= 0 && target[t] < vocab), "target ", target[t], " of ", vocab);
  const auto [transposed, straight] = arrange(head.unsqueeze(0), at::kFloat);
  Tensor losses = at::empty({tokens}, x.options()), grad_x = at::empty({gradients ? tokens : 0, width}, x.options());
  Tensor grad_head = at::zeros({gradients ? microbatches : 0, vocab, width}, x.options());
  const Losses of{
      width, vocab, ignore, float(cap), x.const_data_ptr<float>(), transposed.const_data_ptr<float>(),
      straight.const_data_ptr<float>(), target, losses.data_ptr<float>(),
      gradients ? grad_x.data_ptr<float>() : nullptr};
  // What the head's gradient is a product of, of a chunk: whole blocks, the last of which may be short.
  const int64_t chunk = std::max(CHUNK_ROWS, CHUNK_LOGITS / vocab / ROWS * ROWS);
  const int64_t held = gradients ? even(std::min(chunk, in_microbatch)) : 0;
  float *left = of_call.fresh().take<float>(held * vocab), *right = of_call.take<float>(held * width);
  for (int64_t microbatch = 0; microbatch < microbatches; ++microbatch)
    for (int64_t begin = 0; begin < in_microbatch; begin += chunk) {
      const int64_t first = microbatch * in_microbatch + begin, rows = std::min(chunk, in_microbatch - begin);
      share((rows + ROWS - 1) / ROWS, [&] {
        float *z = of_core.fresh().take<float>(ROWS * vocab), *factor = of_core.take<float>(vocab);
        return [&, z, factor](int64_t block) {
          const int64_t at = block * ROWS, own = std::min(ROWS, rows - at);
          of.of_rows(first + at, own, z, factor);
          if (!gradients) return;
          as_right<STRIP>(z, left, at, own, even(rows), vocab);
          as_right<STRIP>(of.x + (first + at) * width, right, at, own, even(rows), width);
        };
      });
      if (!gradients) continue;
      float* grad = grad_head.data_ptr<float>() + microbatch * vocab * width;
      share((vocab + TILE - 1) / TILE, [&] {
        return [&](int64_t tile) {
          const int64_t at = tile * TILE, end = std::min(at + TILE, vocab);
          add_product(rows, left, vocab, at, end, right, width, grad + at * width);
        };
      });
    }
  return {losses, grad_x, grad_head};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(switch_bank, library) {
  library.def(
      "head_losses(Tensor x, Tensor head, Tensor targets, int microbatches, float cap, int ignore, bool gradients) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) { library.impl("head_losses", head_losses); }
