// Tile of dot products over rows at any addresses, both contiguous along the sum.
#pragma once
#include "cpu/isa.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

// Accumulators fill the register file: 4 x 3 of 16 registers, 4 x 6 of 32. Rows is always four: their
// sums are folded together.
constexpr int kDotRows = 4;
#if defined(__AVX512F__)
constexpr int kDotColumns = 6;
#else
constexpr int kDotColumns = 3;
#endif

// out[c * 4 + r] = a[r][0 .. depth) . b[c][0 .. depth)
template <int Columns, class A, class B>
inline __attribute__((always_inline)) void dot_tile(int64_t depth, const A* const* a, const B* const* b,
                                                    float* out) {
  Vec acc[Columns][kDotRows] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec left[kDotRows];
    for (int r = 0; r < kDotRows; ++r) left[r] = load(a[r] + k);
    for (int c = 0; c < Columns; ++c) {
      const Vec right = load(b[c] + k);
      for (int r = 0; r < kDotRows; ++r) acc[c][r] += left[r] * right;
    }
  }
  for (int c = 0; c < Columns; ++c) {
    Vec4 total = sums(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
    for (int64_t t = k; t < depth; ++t) {
      const float right = load_one(b[c] + t);
      total += Vec4{load_one(a[0] + t), load_one(a[1] + t), load_one(a[2] + t), load_one(a[3] + t)} * right;
    }
    std::memcpy(out + c * kDotRows, &total, sizeof total);
  }
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
