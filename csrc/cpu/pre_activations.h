// Pre-activations of a block of features at a block of positions in float32, by tiles or by dot products, and
// those of them above a threshold.
#pragma once
#include <omp.h>

#include "cpu/dot.h"
#include "cpu/entries.h"
#include "cpu/ops.h"
#include "cpu/tile.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kFeatureBlock = 132;  // a multiple of every tile height
constexpr int64_t kPositionBlock = 32;  // a multiple of every panel
constexpr int64_t kDepthBlock = 128;
constexpr int64_t kFewPositions = 8;  // up to here dot products beat tiles: no transposing, no empty lanes

// Scratch of one thread: 36 KiB, so that two threads stay under 5% of positions x features at 64 x 8,192.
struct Scratch {
  float x[kDepthBlock * kPositionBlock];      // [depth, positions]
  float weights[kTileRows * kDepthBlock];     // widened bfloat16 rows
  float pre[kFeatureBlock * kPositionBlock];  // [features, positions]
};

inline const float* rows_of(const float* w, int64_t, int64_t, int64_t, float*, int64_t& stride, int64_t w_stride) {
  stride = w_stride;
  return w;
}

// bfloat16 rows are widened just before use; at `positions` products each, that is a small share.
inline const float* rows_of(const uint16_t* w, int64_t rows, int64_t, int64_t depth, float* buffer,
                            int64_t& stride, int64_t w_stride) {
  stride = kDepthBlock;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) store(buffer + r * kDepthBlock + k, load(w + r * w_stride + k));
    for (; k < depth; ++k) buffer[r * kDepthBlock + k] = widen(w[r * w_stride + k]);
  }
  return buffer;
}

// pre[features, positions] += w[features, depth] . x[depth, positions]
template <class W>
void multiply(const W* w, int64_t w_stride, int64_t features, int64_t depth, int64_t panels, Scratch& s) {
  int64_t f = 0;
  for (; f + kTileRows <= features; f += kTileRows) {
    int64_t stride;
    const float* rows = rows_of(w + f * w_stride, kTileRows, f, depth, s.weights, stride, w_stride);
    for (int64_t q = 0; q < panels; ++q)
      tile<kTileRows, kTileVecs>(depth, rows, stride, 1, s.x + q * kPanel, kPositionBlock,
                                 s.pre + f * kPositionBlock + q * kPanel, kPositionBlock);
  }
  for (; f < features; ++f) {
    int64_t stride;
    const float* rows = rows_of(w + f * w_stride, 1, f, depth, s.weights, stride, w_stride);
    for (int64_t q = 0; q < panels; ++q)
      tile<1, kTileVecs>(depth, rows, stride, 1, s.x + q * kPanel, kPositionBlock,
                         s.pre + f * kPositionBlock + q * kPanel, kPositionBlock);
  }
}

// pre[features, positions] = b_enc + w . x for a few positions, both rows in place.
template <class W>
void pre_activations_of_few(const EncodeInput& in, int64_t f0, int64_t features, int64_t p0, int64_t positions,
                            Scratch& s) {
  const W* w = static_cast<const W*>(in.w_enc.data) + f0 * in.w_enc.row_stride;
  for (int64_t f = 0; f < features; f += kDotColumns) {
    const W* right[kDotColumns];
    for (int64_t c = 0; c < kDotColumns; ++c) right[c] = w + smaller(f + c, features - 1) * in.w_enc.row_stride;
    for (int64_t p = 0; p < positions; p += kDotRows) {
      const float* left[kDotRows];
      float products[kDotColumns * kDotRows];
      for (int64_t r = 0; r < kDotRows; ++r) left[r] = in.x + (p0 + smaller(p + r, positions - 1)) * in.x_stride;
      dot_tile<kDotColumns>(in.width, left, right, products);
      for (int64_t c = 0; c < kDotColumns && f + c < features; ++c)
        for (int64_t r = 0; r < kDotRows; ++r)
          s.pre[(f + c) * kPositionBlock + p + r] = products[c * kDotRows + r] + in.b_enc[f0 + f + c];
    }
  }
}

template <class W>
void pre_activations(const EncodeInput& in, int64_t f0, int64_t features, int64_t p0, int64_t positions,
                     Scratch& s) {
  if (positions <= kFewPositions) return pre_activations_of_few<W>(in, f0, features, p0, positions, s);
  const int64_t panels = (positions + kPanel - 1) / kPanel;
  for (int64_t f = 0; f < features; ++f)
    for (int64_t p = 0; p < kPositionBlock; p += kLanes)
      store(s.pre + f * kPositionBlock + p, splat(in.b_enc[f0 + f]));
  const W* w = static_cast<const W*>(in.w_enc.data) + f0 * in.w_enc.row_stride;
  for (int64_t k0 = 0; k0 < in.width; k0 += kDepthBlock) {
    const int64_t depth = smaller(kDepthBlock, in.width - k0);
    transpose(in.x + p0 * in.x_stride + k0, in.x_stride, positions, depth, s.x, kPositionBlock);
    multiply(w + k0, in.w_enc.row_stride, features, depth, panels, s);
  }
}

void pre_activations(const EncodeInput& in, int64_t f0, int64_t features, int64_t p0, int64_t positions,
                     Scratch& s) {
  if (in.w_enc.element == Element::bfloat16)
    pre_activations<uint16_t>(in, f0, features, p0, positions, s);
  else
    pre_activations<float>(in, f0, features, p0, positions, s);
}

inline bool any(VecInt mask) {
  uint64_t words[sizeof mask / 8], bits = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) bits |= word;
  return bits != 0;
}

inline bool any_above(const float* __restrict pre, float threshold) {
  VecInt above{};
  for (int64_t p = 0; p < kPositionBlock; p += kLanes) above |= ~(load(pre + p) <= splat(threshold));
  return any(above);
}

// Append entries that are not at most the threshold: NaN is active.
bool keep_above(const EncodeInput& in, int64_t f0, int64_t features, int64_t p0, int64_t positions,
                const Scratch& s, EntryList& out) {
  for (int64_t f = 0; f < features; ++f) {
    const float* pre = s.pre + f * kPositionBlock;
    const float threshold = in.threshold[(f0 + f) * in.threshold_stride];
    if (!any_above(pre, threshold)) continue;
    for (int64_t p = larger(0, in.first_position - p0); p < positions; ++p)
      if (!(pre[p] <= threshold) &&
          !append(out, {static_cast<int32_t>(p0 + p), static_cast<int32_t>(f0 + f), pre[p]}))
        return false;
  }
  return true;
}

// Blocks of positions from the first with features on. With a top-k each thread begins at another: two that go
// through them in step would wait for each other's locks.
struct Rounds {
  int64_t first, count, shift;

  Rounds(const EncodeInput& in, bool apart)
      : first(in.first_position / kPositionBlock),
        count((in.positions + kPositionBlock - 1) / kPositionBlock - first),
        shift(apart ? count * omp_get_thread_num() / omp_get_num_threads() : 0) {}

  int64_t operator[](int64_t i) const { return (first + (i + shift) % count) * kPositionBlock; }
};

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
