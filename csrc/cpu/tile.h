// Inner block of encode and attend_back: an outer-product tile in registers.
#pragma once
#include "cpu/isa.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

// Accumulators fill the register file: 6 x 2 of 16 registers, 12 x 2 of 32.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;
constexpr int kPanel = kTileVecs * kLanes;  // columns of one tile

// c[r, 0 .. Vecs * kLanes) += (Fresh: =) sum_k a[r * a_row + k * a_step] * b[k * b_step + 0 .. Vecs * kLanes)
// The sum is added to c when it is complete. Unrolled by hand: GCC otherwise passes the sums through memory.
template <int Rows, int Vecs, bool Fresh = false>
inline __attribute__((always_inline)) void tile(int64_t depth, const float* __restrict a, int64_t a_row,
                                                int64_t a_step, const float* __restrict b, int64_t b_step,
                                                float* __restrict c, int64_t c_row) {
  Vec sums[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) sums[r][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec line[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) line[v] = load(b + k * b_step + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec factor = splat(a[r * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) sums[r][v] += factor * line[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      float* to = c + r * c_row + v * kLanes;
      store(to, Fresh ? sums[r][v] : load(to) + sums[r][v]);
    }
}

typedef float Vec8 __attribute__((vector_size(32)));
typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef uint32_t Bits8 __attribute__((vector_size(32)));

inline void load_eight(const float* p, Vec8& v) { std::memcpy(&v, p, sizeof v); }

inline void load_eight(const uint16_t* p, Vec8& v) {
  Half8 half;
  std::memcpy(&half, p, sizeof half);
  const Bits8 bits = __builtin_convertvector(half, Bits8) << 16;
  std::memcpy(&v, &bits, sizeof v);
}

// Transpose eight rows of eight, from column k on, to eight columns of eight.
template <class T>
inline void transpose_eight(const T* const* row, int64_t k, float* __restrict out, int64_t out_row) {
  Vec8 two[8], four[8];
  for (int r = 0; r < 8; r += 2) {
    Vec8 a, b;
    load_eight(row[r] + k, a);
    load_eight(row[r + 1] + k, b);
    two[r] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    two[r + 1] = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4)
    for (int i = 0; i < 2; ++i) {
      const Vec8 a = two[r + i], b = two[r + 2 + i];
      four[r + 2 * i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      four[r + 2 * i + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  // In order: a store may reach past its own columns into the next ones, which then overwrite it.
  for (int i = 0; i < 4; ++i) {
    const Vec8 low = __builtin_shufflevector(four[i], four[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    std::memcpy(out + i * out_row, &low, sizeof low);
  }
  for (int i = 0; i < 4; ++i) {
    const Vec8 high = __builtin_shufflevector(four[i], four[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    std::memcpy(out + (i + 4) * out_row, &high, sizeof high);
  }
}

// out[k, r] = in[r, k] for depth columns of `count` rows; rows from count up to out_row, a multiple of 4, are
// zero.
inline void transpose(const float* __restrict in, int64_t in_row, int64_t count, int64_t depth,
                      float* __restrict out, int64_t out_row) {
  for (int64_t r = 0; r < out_row; r += 8) {
    const float* row[8];
    for (int64_t i = 0; i < 8; ++i) row[i] = in + (r + i) * in_row;
    int64_t k = 0;
    for (; r + 8 <= count && k + 8 <= depth; k += 8) transpose_eight(row, k, out + k * out_row + r, out_row);
    for (; k < depth; ++k)
      for (int64_t i = r; i < smaller(r + 8, out_row); ++i)
        out[k * out_row + i] = i < count ? in[i * in_row + k] : 0.f;
  }
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
