// Screening: pre-activations from rows rounded to bfloat16, and how far off they can be. Few can be active, so
// only these are computed again, from float32. Whatever the rows, with x~ and w~ for rounded ones,
//
//     |x . w - x~ . w~| <= |x - x~| |w| + |x~| |w - w~|
//
// by the lengths of the rows and of what rounding took from them, to which the rounding of sums is added.
// Layout: x in strips and a block of w_enc in one panel, as in parts.h.
#pragma once
#include <cstdlib>

#include "cpu/ops.h"
#include "cpu/parts.h"
#include "cpu/top_k.h"

#if defined(__AMX_BF16__)

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

// A row's length, and the length of what its rounding loses, with a share for the rounding of sums; neither is
// smaller than it is.
struct Reach {
  float length, lost;
};

inline __m512 widen_low(__m512i bits) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm512_castsi512_si256(bits));
  return reinterpret_cast<__m512>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}

inline __m512 widen_high(__m512i bits) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm512_extracti64x4_epi64(bits, 1));
  return reinterpret_cast<__m512>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}

// square, lost: sums of squares. Numbers below 1e-19 have a square of zero in float32, which kTiny stands for;
// products of numbers above 1e19 may be infinite.
inline Reach reach(__m512 square, __m512 lost, int64_t depth) {
  constexpr float kSums = 1.001f, kTiny = 1e-17f, kRounding = 0x1p-23f, kLong = 1e19f;
  const float length = __builtin_sqrtf(sum(reinterpret_cast<Vec>(square))) * kSums + kTiny;
  const float rest = __builtin_sqrtf(sum(reinterpret_cast<Vec>(lost))) * kSums + kTiny;
  if (!(length < kLong)) return {length, __builtin_inff()};
  return {length + rest, rest + kRounding * static_cast<float>(depth + 8) * length};
}

// Write a row rounded to bfloat16, in steps of two tiles, and zeros up to a whole step.
inline Reach pack_rounded(const float* __restrict row, int64_t depth, Part* __restrict out) {
  __m512 square = _mm512_setzero_ps(), lost = square;
  for (int64_t k = 0; k < depth; k += kStep, out += kPartSize) {
    const __m512 low = load_some(row + k, depth - k), high = load_some(row + k + 16, depth - k - 16);
    const __m512i bits = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_store_si512(out, bits);
    const __m512 rest = low - widen_low(bits), high_rest = high - widen_high(bits);
    square += low * low + high * high;
    lost += rest * rest + high_rest * high_rest;
  }
  return reach(square, lost, depth);
}

inline Reach pack_rounded(const uint16_t* __restrict row, int64_t depth, Part* __restrict out) {
  __m512 square = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += kStep, out += kPartSize) {
    const __mmask32 present = depth - k >= kStep ? ~__mmask32{0} : (__mmask32{1} << (depth - k)) - 1;
    const __m512i bits = _mm512_maskz_loadu_epi16(present, row + k);
    _mm512_store_si512(out, bits);
    square += widen_low(bits) * widen_low(bits) + widen_high(bits) * widen_high(bits);
  }
  return reach(square, _mm512_setzero_ps(), depth);
}

// Reaches of the rows of a block, and zeros where there are fewer.
struct Reaches {
  alignas(64) float lengths[kBlock], losses[kBlock];
};

// Rows of a strip; missing ones are zeros.
template <class W>
void pack_rounded_strip(const W* rows, int64_t stride, int64_t count, int64_t depth, Part* out, Reaches& reaches) {
  for (int64_t r = 0; r < kBlock; ++r) {
    Reach own{};
    if (r < count)
      own = pack_rounded(rows + r * stride, depth, out + r * kStep);
    else
      for (int64_t k = 0; k < depth; k += kStep)
        std::memset(out + k * (kPartSize / kStep) + r * kStep, 0, sizeof(Part) * kStep);
    reaches.lengths[r] = own.length, reaches.losses[r] = own.lost;
  }
}

template <class W>
void pack_rounded_panel(const W* rows, int64_t stride, int64_t count, int64_t depth, Part* out, Reaches& reaches) {
  pack_rounded_strip(rows, stride, count, depth, out, reaches);
  for (int64_t tile = 0; tile < 2 * ((depth + kStep - 1) / kStep); ++tile) transpose_pairs(out + tile * kTileSize);
}

// x rounded, for all threads: a strip for every kBlock positions.
struct Screen {
  int64_t steps;
  Part* strips;  // [blocks, steps, 2 tiles]
  Reaches* reaches;

  bool allocate(const EncodeInput& in) {
    const int64_t blocks = (in.positions + kBlock - 1) / kBlock;
    steps = (in.width + kStep - 1) / kStep;
    strips = static_cast<Part*>(std::aligned_alloc(64, round_up(blocks * size() * sizeof(Part) + 1, 64)));
    reaches = static_cast<Reaches*>(std::aligned_alloc(64, sizeof(Reaches) * (blocks + 1)));
    return strips && reaches;
  }

  void release() {
    std::free(strips);
    std::free(reaches);
  }

  int64_t size() const { return steps * kPartSize; }  // of a strip or panel
  int64_t bytes(int64_t positions) const {
    const int64_t block = size() * sizeof(Part) + sizeof(Reaches);
    return strips && reaches ? (positions + kBlock - 1) / kBlock * block : 0;
  }
  const Part* strip(int64_t p0) const { return strips + p0 / kBlock * size(); }

  // Round the positions from p0 on.
  void fill(const EncodeInput& in, int64_t p0) {
    pack_rounded_strip(in.x + p0 * in.x_stride, in.x_stride, smaller(kBlock, in.positions - p0), in.width,
                       strips + p0 / kBlock * size(), reaches[p0 / kBlock]);
  }
};

// An entry that may be active.
struct Pair {
  int32_t position, feature;
};

// Pre-activations of some pairs, from float32 x: out[i] = x . w + b of pairs[i]. The sums are dot_tile's, bit for
// bit.
template <class W>
void exact_values(const EncodeInput& in, const Pair* pairs, int64_t count, float* out) {
  constexpr int kPairs = 4;
  for (int64_t i = 0; i < count; i += kPairs) {
    const float* x[kPairs];
    const W* w[kPairs];
    Vec acc[kPairs] = {};
    for (int64_t j = 0; j < kPairs; ++j) {
      const Pair pair = pairs[smaller(i + j, count - 1)];
      x[j] = in.x + pair.position * in.x_stride;
      w[j] = static_cast<const W*>(in.w_enc.data) + pair.feature * in.w_enc.row_stride;
    }
    int64_t k = 0;
    for (; k + kLanes <= in.width; k += kLanes)
      for (int j = 0; j < kPairs; ++j) acc[j] += load(x[j] + k) * load(w[j] + k);
    Vec4 total = sums(acc[0], acc[1], acc[2], acc[3]);
    for (; k < in.width; ++k)
      total += Vec4{x[0][k], x[1][k], x[2][k], x[3][k]} *
               Vec4{load_one(w[0] + k), load_one(w[1] + k), load_one(w[2] + k), load_one(w[3] + k)};
    for (int64_t j = 0; j < kPairs && i + j < count; ++j) out[i + j] = total[j] + in.b_enc[pairs[i + j].feature];
  }
}

inline void exact_values(const EncodeInput& in, const Pair* pairs, int64_t count, float* out) {
  if (in.w_enc.element == Element::bfloat16)
    exact_values<uint16_t>(in, pairs, count, out);
  else
    exact_values<float>(in, pairs, count, out);
}

// Compute the candidates of a position, which were intervals, and keep the k best.
inline void compute_candidates(const EncodeInput& in, TopK& best, int64_t p) {
  constexpr int64_t kMost = 64;
  int32_t *key = best.keys + p * best.capacity, *high = best.highs + p * best.capacity;
  const int32_t* feature = best.features + p * best.capacity;
  for (int64_t begin = 0; begin < best.counts[p]; begin += kMost) {
    Pair pairs[kMost];
    float values[kMost];
    const int64_t count = smaller(kMost, best.counts[p] - begin);
    for (int64_t i = 0; i < count; ++i) pairs[i] = {static_cast<int32_t>(p), feature[begin + i]};
    exact_values(in, pairs, count, values);
    for (int64_t i = 0; i < count; ++i) key[begin + i] = high[begin + i] = key_of(values[i]);
  }
  best.shrink_values(p);
}

// Make room for another candidate.
inline void make_room(const EncodeInput& in, TopK& best, int64_t p) {
  best.shrink(p);
  if (2 * best.counts[p] > best.k + best.capacity) compute_candidates(in, best, p);
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
#endif
