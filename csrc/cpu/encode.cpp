// encode: pre[p, f] = x[p] . w_enc[f] + b_enc[f]; active features in CSR by position.
// By AMX: rows rounded to bfloat16 first, then what may be active (screen.h), a panel of features at a time.
// Otherwise all of it in float32.
// Layout: x and w_enc rows in place; a block of x transposed to [depth, positions] so that one weight multiplies
// a vector of positions; a thread has the pre-activations of one block of features x positions at a time.
// Bytes: w_enc once from memory, x once per feature block from cache. Parallel over blocks of features.
#include <omp.h>

#include <cstdlib>

#include "cpu/dot.h"
#include "cpu/entries.h"
#include "cpu/ops.h"
#include "cpu/screen.h"
#include "cpu/tile.h"
#include "cpu/top_k.h"

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

// Offer candidates to the k best; few beat their position's k-th best so far, so 32 positions are compared at a
// time.
void offer(const EncodeInput& in, int64_t f0, int64_t features, int64_t p0, int64_t positions, const Scratch& s,
           TopK& best) {
  const int64_t begin = larger(0, in.first_position - p0);
  best.lock(p0 / kPositionBlock);
  for (int64_t f = 0; f < features; ++f) {
    const float* pre = s.pre + f * kPositionBlock;
    VecInt enters[kPositionBlock / kLanes], entering{};
    for (int64_t v = 0; v < kPositionBlock / kLanes; ++v) {
      enters[v] = ~(load(pre + v * kLanes) < load(best.floor + p0 + v * kLanes));
      entering |= enters[v];
    }
    if (!any(entering)) continue;
    int32_t lanes[kPositionBlock];
    std::memcpy(lanes, enters, sizeof lanes);
    for (int64_t p = begin; p < positions; ++p)
      if (lanes[p]) {
        best.offer(p0 + p, static_cast<int32_t>(f0 + f), pre[p]);
        if (!best.has_room(p0 + p, 1)) best.shrink_values(p0 + p);
      }
  }
  best.unlock(p0 / kPositionBlock);
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

bool encode_block(const EncodeInput& in, int64_t block, Scratch& s, EntryList* lists, TopK* best) {
  const int64_t f0 = block * kFeatureBlock, features = smaller(kFeatureBlock, in.w_enc.rows - f0);
  const Rounds rounds(in, best);
  for (int64_t i = 0; i < rounds.count; ++i) {
    const int64_t p0 = rounds[i];
    const int64_t positions = smaller(kPositionBlock, in.positions - p0);
    pre_activations(in, f0, features, p0, positions, s);
    if (best)
      offer(in, f0, features, p0, positions, s, *best);
    else if (!keep_above(in, f0, features, p0, positions, s, lists[block]))
      return false;
  }
  trim(lists[block]);
  return true;
}

// Every pre-activation in float32. Each block by whichever thread is free: its entries do not depend on the
// thread.
struct Plain {
  static constexpr int64_t kFeatures = kFeatureBlock, kSpare = 32;
  static constexpr bool kIntervals = false;

  bool run(const EncodeInput& in, int64_t blocks, EntryList* lists, TopK* best) {
    bool ok = true;
#pragma omp parallel num_threads(static_cast<int>(larger(1, smaller(in.threads, blocks))))
    {
      Scratch* scratch = static_cast<Scratch*>(std::aligned_alloc(64, round_up(sizeof(Scratch), 64)));
      if (scratch) std::memset(scratch, 0, sizeof(Scratch));
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < blocks; ++b)
        if (!scratch || !encode_block(in, b, *scratch, lists, best)) {
#pragma omp atomic write
          ok = false;
        }
#pragma omp for schedule(dynamic, 4)
      for (int64_t p = 0; p < (best ? in.positions : 0); ++p) {
        best->shrink_values(p);
        best->sort(p);
      }
      std::free(scratch);
    }
    return ok;
  }

  int64_t bytes(const EncodeInput&, int64_t threads) const { return threads * sizeof(Scratch); }
};

#if defined(__AMX_BF16__)

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

#endif

template <class Way>
EncodeResult encode_by(const EncodeInput& in) {
  Way way{};
  EncodeResult out{};
  out.positions = in.positions;
  const int64_t blocks = (in.w_enc.rows + Way::kFeatures - 1) / Way::kFeatures;
  out.row_ptr = static_cast<int64_t*>(std::calloc(in.positions + 1, sizeof(int64_t)));
  EntryList* lists = static_cast<EntryList*>(std::calloc(blocks + 1, sizeof(EntryList)));
  TopK best{};
  bool ok = out.row_ptr && lists;
  if (ok && in.top_k > 0)
    ok = best.allocate(in.positions, smaller(in.top_k, in.w_enc.rows), kPositionBlock, Way::kSpare,
                       Way::kIntervals);
  ok = ok && way.run(in, blocks, lists, in.top_k > 0 ? &best : nullptr);
  ok = ok && (in.top_k > 0 ? gather_best(best, in.keep_negative, out) : gather_lists(lists, blocks, out));
  out.workspace_bytes = way.bytes(in, smaller(in.threads, blocks)) + best.bytes();
  for (int64_t b = 0; lists && b < blocks; ++b) {
    out.workspace_bytes += lists[b].capacity * static_cast<int64_t>(sizeof(Entry));
    std::free(lists[b].entries);
  }
  std::free(lists);
  best.release();
  out.status = {ok ? Outcome::ok : Outcome::out_of_memory};
  return out;
}

}  // namespace

EncodeResult encode(const EncodeInput& in) {
#if defined(__AMX_BF16__)
  if (in.positions - in.first_position >= kWorthScreening) return encode_by<Screened>(in);
#endif
  return encode_by<Plain>(in);
}

void encode_free(EncodeResult& result) {
  std::free(result.row_ptr);
  std::free(result.index);
  std::free(result.value);
  result = EncodeResult{};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
