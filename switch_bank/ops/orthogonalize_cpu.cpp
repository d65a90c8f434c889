// Newton-Schulz iterations of many small matrices in float32: each matrix stays in one core's cache through all of them,
// and of products that are symmetric half is computed.

#include <torch/library.h>

#include "cpu_kernels.h"

namespace {

// A matrix [rows, columns] in whole tiles; no product reads what lies behind its numbers. Rows are not a power of two
// apart, by which they would share lines of the cache.
struct Matrix {
  int64_t rows, columns, stride;
  float* at;

  Matrix(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), stride(round_up(columns, STRIP) + STRIP),
        at(of_core.take<float>(round_up(rows, STRIP) * stride)) {}
  float* row(int64_t r) const { return at + r * stride; }
};

// to = xᵀ·x
void symmetric_product(const Matrix& x, const Matrix& to) {
  for (int64_t c = 0; c < x.columns; c += STRIP)
    for (int64_t r = 0; r < std::min(c + STRIP, x.columns); r += STRIP_ROWS)
      multiply_tile<true>(x.rows, x.at + r, x.stride, x.at + c, x.stride, to.row(r) + c, to.stride);
  for (int64_t c = 0; c < x.columns; c += STRIP)
    for (int64_t r = c + STRIP; r < x.columns; r += STRIP)
      transpose(to.row(c) + r, to.stride, to.row(r) + c, to.stride, STRIP, STRIP);
}

// to = a·x + b·to
void scale_and_add(float a, const Matrix& x, float b, const Matrix& to) {
  for (int64_t r = 0; r < to.rows; ++r)
    each_vec(round_up(to.columns, LANES), [&](int64_t c, int64_t count) {
      const Vec product = Vec(b) * load(to.row(r) + c, count);
      store(to.row(r) + c, count, at::vec::fmadd(Vec(a), load(x.row(r) + c, count), product));
    });
}

// x: [n, rows, columns]; gram: [n, m, m], the products of the vectors of its shorter side; polynomials: [iterations, 3].
// Returns x after X <- aX + b(XXᵀ)X + c(XXᵀ)²X for each (a, b, c).
Tensor newton_schulz(const Tensor& any_x, const Tensor& any_gram, const Tensor& polynomials) {
  const Tensor x = any_x.contiguous(), gram = any_gram.contiguous(), factors = polynomials.to(at::kFloat).contiguous();
  TORCH_CHECK(x.scalar_type() == at::kFloat && gram.scalar_type() == at::kFloat, "newton_schulz takes float32");
  const int64_t rows = x.size(1), columns = x.size(2), longer = std::max(rows, columns);
  const int64_t shorter = std::min(rows, columns);
  const bool turned = rows <= columns;
  Tensor result = at::empty_like(x);
  share(x.size(0), [&] {
    return [&](int64_t task) {
      of_core.fresh();
      Matrix y(longer, shorter), next(longer, shorter);
      const Matrix products(shorter, shorter), polynomial(shorter, shorter);
      const float* from = x.const_data_ptr<float>() + task * rows * columns;
      if (turned) transpose(from, columns, y.at, y.stride, rows, columns);
      else
        for (int64_t r = 0; r < rows; ++r) std::copy(from + r * columns, from + (r + 1) * columns, y.row(r));
      const float* own_gram = gram.const_data_ptr<float>() + task * shorter * shorter;
      for (int64_t r = 0; r < shorter; ++r)
        std::copy(own_gram + r * shorter, own_gram + (r + 1) * shorter, products.row(r));
      for (int64_t i = 0; i < factors.size(0); ++i) {
        const float* abc = factors.const_data_ptr<float>() + 3 * i;
        if (i > 0) symmetric_product(y, products);
        symmetric_product(products, polynomial);
        scale_and_add(abc[1], products, abc[2], polynomial);
        for (int64_t r = 0; r < longer; r += STRIP_ROWS)
          for (int64_t c = 0; c < shorter; c += STRIP)
            multiply_tile<false>(
                shorter, y.row(r), y.stride, polynomial.at + c, polynomial.stride, next.row(r) + c, next.stride);
        scale_and_add(abc[0], y, 1, next);
        std::swap(y, next);
      }
      float* to = result.data_ptr<float>() + task * rows * columns;
      if (turned) transpose(y.at, y.stride, to, columns, columns, rows);
      else
        for (int64_t r = 0; r < rows; ++r) std::copy(y.row(r), y.row(r) + columns, to + r * columns);
    };
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(switch_bank, library) {
  library.def("newton_schulz(Tensor x, Tensor gram, Tensor polynomials) -> Tensor");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) { library.impl("newton_schulz", newton_schulz); }
