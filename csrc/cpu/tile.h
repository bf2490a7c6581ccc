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
inline __attribute__((always_inline)) void tile(int64_t depth, const float* __restrict a, int64_t a_row, int64_t a_step,
                                                const float* __restrict b, int64_t b_step, float* __restrict c,
                                                int64_t c_row) {
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

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
