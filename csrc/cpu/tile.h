// The inner product block that encode and attend_back share: an outer-product tile held in registers.
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
template <int Rows, int Vecs, bool Fresh = false>
inline __attribute__((always_inline)) void tile(int64_t depth, const float* __restrict a, int64_t a_row,
                                                int64_t a_step, const float* __restrict b, int64_t b_step,
                                                float* __restrict c, int64_t c_row) {
  Vec sums[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) sums[r][v] = Fresh ? Vec{} : load(c + r * c_row + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vec line[Vecs];
    for (int v = 0; v < Vecs; ++v) line[v] = load(b + k * b_step + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec factor = splat(a[r * a_row + k * a_step]);
      for (int v = 0; v < Vecs; ++v) sums[r][v] += factor * line[v];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
}

// Four rows of four to four columns of four.
inline void transpose_four(const float* __restrict in, int64_t in_row, float* __restrict out, int64_t out_row) {
  Vec4 a, b, c, d;
  std::memcpy(&a, in, sizeof a);
  std::memcpy(&b, in + in_row, sizeof b);
  std::memcpy(&c, in + 2 * in_row, sizeof c);
  std::memcpy(&d, in + 3 * in_row, sizeof d);
  const Vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Vec4 rows[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                        __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5),
                        __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7)};
  for (int r = 0; r < 4; ++r) std::memcpy(out + r * out_row, &rows[r], sizeof rows[r]);
}

// out[k, r] = in[r, k] for depth columns of `count` rows; rows from count up to out_row are zero.
void transpose(const float* __restrict in, int64_t in_row, int64_t count, int64_t depth, float* __restrict out,
               int64_t out_row) {
  for (int64_t r = 0; r < out_row; r += 4) {
    int64_t k = 0;
    for (; r + 4 <= count && k + 4 <= depth; k += 4)
      transpose_four(in + r * in_row + k, in_row, out + k * out_row + r, out_row);
    for (; k < depth; ++k)
      for (int64_t i = 0; i < 4; ++i) out[k * out_row + r + i] = r + i < count ? in[(r + i) * in_row + k] : 0.f;
  }
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
