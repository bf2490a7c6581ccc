// encode by screening: a product of rows rounded to bfloat16 for every block of 32 positions x 32 features, then
// from float32 what may be active. Entries of a top-k wait as intervals until k others are better or the call
// ends. Layout: x in strips for all threads, a panel of features for each thread (screen.h). Bytes: w_enc once
// from memory, and again the rows of what may be active. Parallel over blocks of features.
#pragma once
#include <cstdlib>

#include "cpu/pre_activations.h"
#include "cpu/screen.h"

#if defined(__AMX_BF16__)

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kWorthScreening = 16;  // positions for which w_enc is worth rounding
constexpr int64_t kCrowd = 128;          // candidates of a block for which all of it is computed

// Scratch of one thread that screens.
struct ScreenScratch {
  Reaches features;                        // of a block
  alignas(64) float pre[kBlock * kBlock];  // [positions, features], of rounded rows and without biases
  Pair pairs[kCrowd];
  float values[kCrowd];
  alignas(64) Part panel[];  // the features
};

// Ends of the pre-activations of a position at sixteen features, and those of them that there are.
struct Bounds {
  __m512 low, high;
  __mmask16 present;
};

inline Bounds bounds_of(const EncodeInput& in, const Screen& screen, const ScreenScratch& s, int64_t f0, int64_t p,
                        int64_t lane) {
  const Reaches& own = screen.reaches[p / kBlock];
  const __mmask16 present = first_lanes(in.w_enc.rows - f0 - lane);
  const __m512 bias = _mm512_maskz_loadu_ps(present, in.b_enc + f0 + lane);
  const __m512 value = _mm512_load_ps(s.pre + p % kBlock * kBlock + lane) + bias;
  const __m512 slack = _mm512_abs_ps(bias) * _mm512_set1_ps(0x1p-22f) + _mm512_set1_ps(1e-30f);
  const __m512 radius = _mm512_load_ps(s.features.losses + lane) * _mm512_set1_ps(own.lengths[p % kBlock]) +
                        _mm512_load_ps(s.features.lengths + lane) * _mm512_set1_ps(own.losses[p % kBlock]) + slack;
  return {value - radius, value + radius, present};
}

// Append entries of a position at sixteen features that are not at most their thresholds to s.pairs; false if
// there is no room for them.
inline bool add_pairs(const EncodeInput& in, const Screen& screen, int64_t f0, int64_t p, int64_t lane,
                      ScreenScratch& s, int64_t& count) {
  const Bounds bounds = bounds_of(in, screen, s, f0, p, lane);
  const __m512 threshold = in.threshold_stride ? _mm512_maskz_loadu_ps(bounds.present, in.threshold + f0 + lane)
                                               : _mm512_set1_ps(*in.threshold);
  uint32_t above = _mm512_mask_cmp_ps_mask(bounds.present, bounds.high, threshold, _CMP_NLE_UQ);
  if (count + __builtin_popcount(above) > kCrowd) return false;
  for (; above; above &= above - 1)
    s.pairs[count++] = {static_cast<int32_t>(p), static_cast<int32_t>(f0 + lane + __builtin_ctz(above))};
  return true;
}

// Append the block's entries that are not at most their thresholds.
bool keep_screened(const EncodeInput& in, const Screen& screen, int64_t f0, int64_t features, int64_t p0,
                   ScreenScratch& s, Scratch& all, EntryList& out) {
  const int64_t end = smaller(p0 + kBlock, in.positions);
  int64_t count = 0;
  for (int64_t p = larger(p0, in.first_position); p < end; ++p)
    for (int64_t lane = 0; lane < kBlock; lane += kLanes) {
      if (add_pairs(in, screen, f0, p, lane, s, count)) continue;
      // Dot products, whose sums are those of exact_values: no entry's value depends on its neighbours.
      if (in.w_enc.element == Element::bfloat16)
        pre_activations_of_few<uint16_t>(in, f0, features, p0, end - p0, all);
      else
        pre_activations_of_few<float>(in, f0, features, p0, end - p0, all);
      return keep_above(in, f0, features, p0, end - p0, all, out);
    }
  exact_values(in, s.pairs, count, s.values);
  for (int64_t i = 0; i < count; ++i)
    if (!(s.values[i] <= in.threshold[s.pairs[i].feature * in.threshold_stride]) &&
        !append(out, {s.pairs[i].position, s.pairs[i].feature, s.values[i]}))
      return false;
  return true;
}

// Keys of sixteen numbers; of NaN the highest.
inline __m512i keys_of(__m512 value) {
  const __m512i bits = reinterpret_cast<__m512i>(value + _mm512_setzero_ps());
  const __m512i flip = _mm512_maskz_srli_epi32(0xffff, _mm512_maskz_srai_epi32(0xffff, bits, 31), 1);
  const __mmask16 nan = _mm512_mask_cmp_ps_mask(0xffff, value, value, _CMP_UNORD_Q);
  return _mm512_mask_set1_epi32(_mm512_maskz_xor_epi32(0xffff, bits, flip), nan, INT32_MAX);
}

// Offer the block's entries that may be among the k best.
void offer_screened(const EncodeInput& in, const Screen& screen, int64_t f0, int64_t p0, const ScreenScratch& s,
                    TopK& best) {
  const __m512 least = _mm512_set1_ps(-__builtin_inff());
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t end = smaller(p0 + kBlock, in.positions);
  best.lock(p0 / kBlock);
  for (int64_t p = larger(p0, in.first_position); p < end; ++p)
    for (int64_t lane = 0; lane < kBlock; lane += kLanes) {
      const Bounds bounds = bounds_of(in, screen, s, f0, p, lane);
      const __mmask16 enters =
          _mm512_mask_cmp_ps_mask(bounds.present, bounds.high, _mm512_set1_ps(best.floor[p]), _CMP_NLT_UQ);
      if (!enters) continue;
      if (!best.has_room(p, kLanes)) make_room(in, best, p);
      const int64_t place = p * best.capacity + best.counts[p];
      const __m512 low = _mm512_maskz_max_ps(0xffff, bounds.low, least);  // NaN, of infinities: -infinity
      const __m512i feature = _mm512_maskz_add_epi32(0xffff, lanes, _mm512_set1_epi32(f0 + lane));
      _mm512_mask_compressstoreu_epi32(best.keys + place, enters, keys_of(low));
      _mm512_mask_compressstoreu_epi32(best.highs + place, enters, keys_of(bounds.high));
      _mm512_mask_compressstoreu_epi32(best.features + place, enters, feature);
      best.counts[p] += __builtin_popcount(enters);
    }
  best.unlock(p0 / kBlock);
}

bool screen_block(const EncodeInput& in, const Screen& screen, int64_t block, ScreenScratch& s, Scratch* all,
                  EntryList* lists, TopK* best) {
  const int64_t f0 = block * kBlock, features = smaller(kBlock, in.w_enc.rows - f0);
  const int64_t stride = in.w_enc.row_stride;
  if (in.w_enc.element == Element::bfloat16)
    pack_rounded_panel(static_cast<const uint16_t*>(in.w_enc.data) + f0 * stride, stride, features, in.width,
                       s.panel, s.features);
  else
    pack_rounded_panel(static_cast<const float*>(in.w_enc.data) + f0 * stride, stride, features, in.width, s.panel,
                       s.features);
  const Rounds rounds(in, best);
  for (int64_t i = 0; i < rounds.count; ++i) {
    const int64_t p0 = rounds[i];
    add_block<1>(screen.steps, screen.strip(p0), s.panel, s.pre, kBlock, true);
    if (best)
      offer_screened(in, screen, f0, p0, s, *best);
    else if (!keep_screened(in, screen, f0, features, p0, s, *all, lists[block]))
      return false;
  }
  trim(lists[block]);
  return true;
}

// Rounded rows first, then what may be active.
struct Screened {
  static constexpr int64_t kFeatures = kBlock, kSpare = 64;
  static constexpr bool kIntervals = true;
  Screen screen;

  int64_t scratch_bytes() const { return round_up(sizeof(ScreenScratch) + screen.size() * sizeof(Part), 64); }

  bool run(const EncodeInput& in, int64_t blocks, EntryList* lists, TopK* best) {
    bool ok = screen.allocate(in);
#pragma omp parallel num_threads(static_cast<int>(larger(1, smaller(in.threads, blocks)))) if (ok)
    {
      const Tiles tiles;
      auto* own = static_cast<ScreenScratch*>(std::aligned_alloc(64, scratch_bytes()));
      Scratch* all = best ? nullptr : static_cast<Scratch*>(std::aligned_alloc(64, round_up(sizeof(Scratch), 64)));
      if (all) std::memset(all, 0, sizeof(Scratch));
      const bool ready = ok && own && (best || all);
#pragma omp for schedule(static)
      for (int64_t p0 = in.first_position / kBlock * kBlock; p0 < (ok ? in.positions : 0); p0 += kBlock)
        screen.fill(in, p0);
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < blocks; ++b)
        if (!ready || !screen_block(in, screen, b, *own, all, lists, best)) {
#pragma omp atomic write
          ok = false;
        }
#pragma omp for schedule(dynamic, 4)
      for (int64_t p = 0; p < (best ? in.positions : 0); ++p) {
        best->shrink(p);
        compute_candidates(in, *best, p);
        best->sort(p);
      }
      std::free(all);
      std::free(own);
    }
    workspace = screen.bytes(in.positions);
    screen.release();
    return ok;
  }

  int64_t workspace = 0;
  int64_t bytes(const EncodeInput& in, int64_t threads) const {
    return workspace + threads * (scratch_bytes() + (in.top_k > 0 ? 0 : static_cast<int64_t>(sizeof(Scratch))));
  }
};

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
#endif
