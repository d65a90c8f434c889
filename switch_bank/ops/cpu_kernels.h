// What the kernels for CPUs with AVX2 or AVX-512 have in common: vectors of floats, products, and how cores share work.
// Cores take tasks as they get free, but no sum depends on which core took what: the same bits for any thread count.

#pragma once

// Not <ATen/ATen.h>, which takes a compiler 4 s.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;

// ---- rows of numbers, LANES at a time ------------------------------------------------------------------------------

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
// A product in registers has this many columns and rows: 16 registers of 32, or 8 of AVX2's 16.
constexpr int64_t STRIP = 2 * LANES, STRIP_ROWS = LANES / 2;

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
inline int64_t even(int64_t rows) { return round_up(rows, 2); }

inline Vec load(const float* from, int64_t count) { return Vec::loadu(from, count); }
inline void store(float* to, int64_t count, Vec value) { value.store(to, count); }

#ifdef __AVX512BF16__
inline __mmask16 lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline Vec load(const BFloat16* from, int64_t count) {
  __m512 value;
  at::vec::cvtbf16_fp32(_mm256_maskz_loadu_epi16(lanes(count), from), value);
  return value;
}
inline void store(BFloat16* to, int64_t count, Vec value) {
  _mm256_mask_storeu_epi16(to, lanes(count), __m256i(_mm512_cvtneps_pbh(value)));
}
#endif

template <typename Body>
inline void each_vec(int64_t count, Body body) {
  int64_t at = 0;
  for (; at + LANES <= count; at += LANES) body(at, LANES);
  if (at < count) body(at, count - at);
}

inline float sum_of(Vec values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, values);
}

// from [rows, columns] to [columns, rows].
void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t SIDE = 16;
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t c = 0; c < columns; c += SIDE) {
      const float* tile = from + r * from_stride + c;
      float* result = to + c * to_stride + r;
      if (r + SIDE <= rows && c + SIDE <= columns) {
        at::vec::transpose_mxn<float, SIDE, SIDE>(tile, from_stride, result, to_stride);
        continue;
      }
      for (int64_t i = 0; i < std::min(SIDE, rows - r); ++i)
        for (int64_t j = 0; j < std::min(SIDE, columns - c); ++j) result[j * to_stride + i] = tile[i * from_stride + j];
    }
}

// ---- products of rows and a matrix ---------------------------------------------------------------------------------

// They are oneDNN's, in one thread each, by way of at::native::cpublas. A matrix [k, n] that stands at their right lies in
// panels [k, PANEL], one behind the other: rows further apart would share a few lines of the cache where n is a power of
// two. In BFloat16 a panel lies in pairs of rows, [k/2, PANEL, 2], as dot products read it.

namespace blas = at::native::cpublas;

constexpr int64_t PANEL = 4 * LANES;  // columns of a product; 64 on AVX2, too, made a forward of `record` a fifth slower

template <int64_t WIDTH = PANEL, typename Body>
inline void each_panel(int64_t columns, Body body) {
  for (int64_t at = 0; at < columns; at += WIDTH) body(at, std::min(WIDTH, columns - at));
}

inline void put_panel(const float* from, int64_t stride, float* to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) std::copy(from + r * stride, from + r * stride + columns, to + r * columns);
}
#ifdef __AVX512BF16__
inline void put_panel(const BFloat16* from, int64_t stride, BFloat16* to, int64_t rows, int64_t columns) {
  const int64_t in_pairs = rows / 2 * 2;
  at::vec::pack_vnni2(from, to, stride, in_pairs, columns);
  if (in_pairs < rows)
    each_vec(columns, [&](int64_t c, int64_t count) {
      const __m256i row = _mm256_maskz_loadu_epi16(lanes(count), from + in_pairs * stride + c);
      _mm512_mask_storeu_epi32(to + in_pairs * columns + 2 * c, lanes(count), _mm512_cvtepu16_epi32(row));
    });
}
#endif

// Rows first, first + 1, ... of a matrix [k, n], as it stands at the right of a product. from: [rows, n].
template <int64_t WIDTH = PANEL, typename T>
void as_right(const T* from, T* to, int64_t first, int64_t rows, int64_t k, int64_t n) {
  each_panel<WIDTH>(n, [&](int64_t at, int64_t columns) {
    put_panel(from + at, n, to + at * k + first * columns, rows, columns);
  });
}

// c [m, n] = a [m, k]·b [k, n].
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b, float* c) {
  each_panel(n, [&](int64_t at, int64_t columns) {
    blas::brgemm(m, columns, k, a_stride, columns, n, false, a, b + at * k, c + at, sizeof(T) == 2);
  });
}

// ---- products of rows and rows, such as gradients of matrices -------------------------------------------------------

// A vector of floats, or of pairs of BFloat16, in which two rows lie together.
template <typename T>
inline Vec load_strip(const T* from, int64_t count) {
  return load(reinterpret_cast<const float*>(from), count);
}
template <typename T>
inline Vec everywhere(const T* from) {
  return Vec(*reinterpret_cast<const float*>(from));
}
template <typename T>
inline Vec add_products(Vec a, Vec b, Vec sum) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) return _mm512_dpbf16_ps(sum, __m512bh(__m512(a)), __m512bh(__m512(b)));
#endif
  return at::vec::fmadd(a, b, sum);
}

inline void add_to(float* to, int64_t count, Vec value) { store(to, count, load(to, count) + value); }
inline void add_to(double* to, int64_t count, Vec value) {
  using Doubles = at::vec::Vectorized<double>;
#ifdef CPU_CAPABILITY_AVX512
  const Doubles halves[] = {
      _mm512_cvtps_pd(_mm512_castps512_ps256(value)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1))};
#else
  const Doubles halves[] = {
      _mm256_cvtps_pd(_mm256_castps256_ps128(value)), _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1))};
#endif
  for (int64_t half = 0, at = 0; half < 2; ++half, at += LANES / 2) {
    const int64_t own = std::clamp<int64_t>(count - at, 0, LANES / 2);
    (Doubles::loadu(to + at, own) + halves[half]).store(to + at, own);
  }
}

// to [M, columns] += Σ_r left[r, M]ᵀ·right[r, columns], M rows and at most STRIP columns, in float until it is added.
template <int M, bool WHOLE, typename T, typename Sum>
__attribute__((noinline)) void add_tile(
    int64_t rows, const T* left, int64_t left_columns, const T* right, int64_t columns, Sum* to, int64_t to_columns) {
  constexpr int64_t TOGETHER = sizeof(float) / sizeof(T);
  const int64_t low = WHOLE ? LANES : std::min(columns, LANES), high = WHOLE ? LANES : columns - low;
  Vec sums[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Vec(0.0f);
  for (int64_t r = 0; r < rows; r += TOGETHER) {
    const Vec a = load_strip(right, low), b = load_strip(right + low * TOGETHER, high);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec one = everywhere(left + m * TOGETHER);
      sums[m][0] = add_products<T>(one, a, sums[m][0]);
      sums[m][1] = add_products<T>(one, b, sums[m][1]);
    }
    left += left_columns * TOGETHER;
    right += columns * TOGETHER;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    add_to(to + m * to_columns, low, sums[m][0]);
    add_to(to + m * to_columns + low, high, sums[m][1]);
  }
}

constexpr int64_t TILE = 128;  // rows of such a gradient that one core sums up

// Both operands lie in panels of STRIP columns, as_right<STRIP> has them, of even(rows) rows.
//
// to [end - begin, n] += leftᵀ·right, of the columns from begin to end of left [rows, m], and right [rows, n].
template <typename T, typename Sum>
void add_product(
    int64_t rows, const T* left, int64_t m, int64_t begin, int64_t end, const T* right, int64_t n, Sum* to) {
  each_panel<STRIP>(n, [&](int64_t at, int64_t columns) {
    const T* own_right = right + at * even(rows);
    for (int64_t row = begin; row < end;) {
      const int64_t panel = row / STRIP * STRIP, left_columns = std::min(STRIP, m - panel);
      const T* own_left = left + panel * even(rows) + (row - panel) * int64_t(sizeof(float) / sizeof(T));
      const auto tile = [&]<int M, bool WHOLE>() {
        add_tile<M, WHOLE>(rows, own_left, left_columns, own_right, columns, to + (row - begin) * n + at, n);
        row += M;
      };
      if (std::min(end, panel + left_columns) - row < STRIP_ROWS) tile.template operator()<1, false>();
      else if (columns == STRIP) tile.template operator()<STRIP_ROWS, true>();
      else tile.template operator()<STRIP_ROWS, false>();
    }
  });
}

// ---- products of whole tiles of floats ------------------------------------------------------------------------------

// to [STRIP_ROWS, STRIP] = left·right or, where left is TRANSPOSED, leftᵀ·right, summed over `depth` from first to last.
template <bool TRANSPOSED>
__attribute__((noinline)) void multiply_tile(
    int64_t depth, const float* left, int64_t left_stride, const float* right, int64_t right_stride, float* to,
    int64_t to_stride) {
  Vec sums[STRIP_ROWS][2];
#pragma GCC unroll 16
  for (int m = 0; m < STRIP_ROWS; ++m) sums[m][0] = sums[m][1] = Vec(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    const Vec a = load(right, LANES), b = load(right + LANES, LANES);
#pragma GCC unroll 16
    for (int m = 0; m < STRIP_ROWS; ++m) {
      const Vec one(left[TRANSPOSED ? m : m * left_stride]);
      sums[m][0] = at::vec::fmadd(one, a, sums[m][0]);
      sums[m][1] = at::vec::fmadd(one, b, sums[m][1]);
    }
    left += TRANSPOSED ? left_stride : 1;
    right += right_stride;
  }
#pragma GCC unroll 16
  for (int m = 0; m < STRIP_ROWS; ++m) {
    store(to + m * to_stride, LANES, sums[m][0]);
    store(to + m * to_stride + LANES, LANES, sums[m][1]);
  }
}

// ---- work, shared by the cores -------------------------------------------------------------------------------------

// Runs task(i) for every i < count; `prepare` makes each core's task, with scratch of its own.
template <typename Prepare>
void share(int64_t count, Prepare prepare) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    auto task = prepare();
    for (int64_t i = next++; i < count; i = next++) task(i);
    at::native::cpublas::brgemm_release();  // what oneDNN's products, if there were any, hold of the core
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

// ---- matrices, for products of rows and them ------------------------------------------------------------------------

template <typename Body>
void with_type(at::ScalarType type, Body body) {
  if (type == at::kFloat) return body(float());
#ifdef __AVX512BF16__
  if (type == at::kBFloat16) return body(BFloat16());
#endif
  TORCH_CHECK(false, "the kernels for CPUs take no ", type, " on this one");
}

// w [E, R, C] float32 as it stands at the right of x·wᵀ, [E, C, R], and of x·w, [E, R, C]; both of `type`.
std::tuple<Tensor, Tensor> arrange(const Tensor& weights, at::ScalarType type) {
  const Tensor w = weights.contiguous();
  const int64_t experts = w.size(0), rows = w.size(1), columns = w.size(2);
  Tensor transposed = at::empty({experts, columns, rows}, w.options().dtype(type));
  Tensor straight = at::empty({experts, rows, columns}, w.options().dtype(type));
  const float* from = w.const_data_ptr<float>();
  const int64_t strips = (rows + PANEL - 1) / PANEL;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    share(experts * strips, [&] {
      T* cast = of_core.fresh().take<T>(PANEL * columns);
      return [&, cast](int64_t task) {
        const int64_t expert = task / strips, begin = task % strips * PANEL, own_rows = std::min(PANEL, rows - begin);
        const int64_t of_expert = expert * rows * columns, of_strip = of_expert + begin * columns;
        each_vec(own_rows * columns, [&](int64_t i, int64_t count) {
          store(cast + i, count, load(from + of_strip + i, count));
        });
        as_right(cast, straight.data_ptr<T>() + of_expert, begin, own_rows, rows, columns);
        // Words of 32 bits are transposed: pairs of columns of BFloat16 become pairs of rows.
        const int64_t words = columns * int64_t(sizeof(T)) / int64_t(sizeof(float));
        float* to = reinterpret_cast<float*>(transposed.data_ptr<T>() + of_strip);
        transpose(reinterpret_cast<float*>(cast), words, to, own_rows, own_rows, words);
      };
    });
  });
  return {transposed, straight};
}

}  // namespace
