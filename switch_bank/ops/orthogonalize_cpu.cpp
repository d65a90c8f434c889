// Orthogonalization of many small matrices in float32: each matrix stays in one core's cache from its scaling to its
// result, and of products that are symmetric half is computed.
//
// With A = XᵀX, an iteration X <- X·Q, Q = aI + bA + cA², takes A to Q·A·Q. So two iterations go over the small A alone,
// and X is multiplied once, by the product of both Q. These are polynomials of A: they commute, and products of them are
// symmetric. With more iterations than two, what rounding does to A's small eigenvalues would show in X.

#include <torch/library.h>

#include <cfloat>
#include <cmath>

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

// to = xᵀ·y, where that is symmetric.
void symmetric_product(const Matrix& x, const Matrix& y, const Matrix& to) {
  for (int64_t c = 0; c < y.columns; c += STRIP)
    for (int64_t r = 0; r < std::min(c + STRIP, x.columns); r += STRIP_ROWS)
      multiply_tile<true>(x.rows, x.at + r, x.stride, y.at + c, y.stride, to.row(r) + c, to.stride);
  for (int64_t c = 0; c < x.columns; c += STRIP)
    for (int64_t r = c + STRIP; r < x.columns; r += STRIP)
      transpose(to.row(c) + r, to.stride, to.row(r) + c, to.stride, STRIP, STRIP);
}

// to = x·y
void product(const Matrix& x, const Matrix& y, const Matrix& to) {
  for (int64_t c = 0; c < y.columns; c += STRIP)
    for (int64_t r = 0; r < x.rows; r += STRIP_ROWS)
      multiply_tile<false>(y.rows, x.row(r), x.stride, y.at + c, y.stride, to.row(r) + c, to.stride);
}

// The power of two that takes the largest magnitude of `count` numbers into [1, 2); one below the smallest normal number
// counts as that.
float to_magnitude_one(const float* x, int64_t count) {
  const auto larger = [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); };
  Vec largest(FLT_MIN);
  each_vec(count, [&](int64_t i, int64_t own) { largest = larger(largest, load(x + i, own).abs()); });
  int exponent;
  std::frexp(at::vec::vec_reduce_all<float>(larger, largest), &exponent);
  return std::ldexp(1.0f, 1 - exponent);
}

// to = aI + b·gram + c·gram²
void polynomial(const Matrix& gram, const float* abc, const Matrix& to) {
  symmetric_product(gram, gram, to);
  for (int64_t r = 0; r < gram.rows; ++r) {
    for (int64_t c = 0; c < gram.columns; ++c) to.row(r)[c] = abc[1] * gram.row(r)[c] + abc[2] * to.row(r)[c];
    to.row(r)[r] += abc[0];
  }
}

// By what to multiply the columns of X before the iterations, as `ops.orthogonalize` does. gram: XᵀX, each number in it a
// sum of `summands`.
void almost_orthogonal_scale(const Matrix& gram, int64_t summands, float* scale) {
  const float smallest_sum = FLT_MIN / FLT_EPSILON * summands;
  for (int64_t r = 0; r < gram.rows; ++r) {
    float sum = 0;
    for (int64_t c = 0; c < gram.columns; ++c) sum += std::abs(gram.row(r)[c]);
    scale[r] = sum > smallest_sum ? 1 / std::sqrt(sum) : 0.0f;
  }
}
void frobenius_scale(const Matrix& gram, float* scale) {
  float sum = 0;
  for (int64_t r = 0; r < gram.rows; ++r) sum += gram.row(r)[r];
  std::fill(scale, scale + gram.rows, sum == 0 ? 0.0f : 1 / std::sqrt(sum));
}

// X <- X·Q for each (a, b, c) of `polynomials`, after scaling. Two of them, of which one is returned, take turns.
Matrix orthogonalize_one(Matrix x, Matrix next, const float* polynomials, int64_t iterations, bool almost_orthogonal) {
  const int64_t m = x.columns;
  const Matrix gram(m, m), first(m, m), second(m, m), both(m, m);
  float* scale = of_core.take<float>(m);
  symmetric_product(x, x, gram);
  if (almost_orthogonal) almost_orthogonal_scale(gram, x.rows, scale);
  else frobenius_scale(gram, scale);
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < m; ++c) x.row(r)[c] *= scale[c];
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < m; ++c) gram.row(r)[c] *= scale[r] * scale[c];
  for (int64_t i = 0; i < iterations; i += 2) {
    if (i > 0) symmetric_product(x, x, gram);
    polynomial(gram, polynomials + 3 * i, first);
    const bool last = i + 1 == iterations;
    if (!last) {
      symmetric_product(first, gram, both);
      symmetric_product(first, both, gram);
      polynomial(gram, polynomials + 3 * (i + 1), second);
      symmetric_product(first, second, both);
    }
    product(x, last ? first : both, next);
    std::swap(x, next);
  }
  return x;
}

// matrices: [n, rows, columns]; polynomials: [iterations, 3].
Tensor orthogonalize(const Tensor& any_matrices, const Tensor& any_polynomials, bool almost_orthogonal) {
  const Tensor matrices = any_matrices.contiguous(), polynomials = any_polynomials.to(at::kFloat).contiguous();
  TORCH_CHECK(matrices.scalar_type() == at::kFloat, "the kernel orthogonalizes float32");
  const int64_t rows = matrices.size(1), columns = matrices.size(2);
  const int64_t longer = std::max(rows, columns), shorter = std::min(rows, columns);
  const bool turned = rows <= columns;
  Tensor results = at::empty_like(matrices);
  share(matrices.size(0), [&] {
    return [&](int64_t task) {
      of_core.fresh();
      const Matrix x(longer, shorter), next(longer, shorter);
      const float* from = matrices.const_data_ptr<float>() + task * rows * columns;
      float* to = results.data_ptr<float>() + task * rows * columns;
      if (turned) transpose(from, columns, x.at, x.stride, rows, columns);
      else
        for (int64_t r = 0; r < rows; ++r) std::copy(from + r * columns, from + (r + 1) * columns, x.row(r));
      const float factor = to_magnitude_one(from, rows * columns);
      for (int64_t r = 0; r < longer; ++r)
        for (int64_t c = 0; c < shorter; ++c) x.row(r)[c] *= factor;
      const float* factors = polynomials.const_data_ptr<float>();
      const Matrix result = orthogonalize_one(x, next, factors, polynomials.size(0), almost_orthogonal);
      if (turned) transpose(result.at, result.stride, to, columns, columns, rows);
      else
        for (int64_t r = 0; r < rows; ++r) std::copy(result.row(r), result.row(r) + columns, to + r * columns);
    };
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(switch_bank, library) {
  library.def("orthogonalize(Tensor matrices, Tensor polynomials, bool almost_orthogonal) -> Tensor");
}

TORCH_LIBRARY_IMPL(switch_bank, CPU, library) { library.impl("orthogonalize", orthogonalize); }
