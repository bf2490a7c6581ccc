// encode: pre[p, f] = x[p] . w_enc[f] + b_enc[f]; active features in CSR by position.
// Layout: x and w_enc rows in place; a block of x transposed to [depth, positions] so that one weight multiplies
// a vector of positions; a thread has the pre-activations of one block of features x positions at a time.
// Bytes: w_enc once from memory, x once per feature block from cache. Parallel over blocks of features.
#include <cstdlib>

#include "cpu/dot.h"
#include "cpu/ops.h"
#include "cpu/tile.h"
#include "cpu/top_k.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kFeatureBlock = 132;  // a multiple of every tile height
constexpr int64_t kPositionBlock = 32;  // a multiple of every panel
constexpr int64_t kDepthBlock = 128;
constexpr int64_t kFewPositions = 8;  // up to here dot products beat tiles: no transposing, no empty lanes

struct Entry {
  int32_t position, feature;
  float value;
};

// Active entries of one block of features, in the order position block, feature, position.
struct EntryList {
  Entry* entries;
  int64_t count, capacity;
};

bool append(EntryList& list, Entry entry) {
  if (list.count == list.capacity) {
    const int64_t capacity = larger(32, 2 * list.capacity);
    void* grown = std::realloc(list.entries, sizeof(Entry) * capacity);
    if (!grown) return false;
    list.entries = static_cast<Entry*>(grown);
    list.capacity = capacity;
  }
  list.entries[list.count++] = entry;
  return true;
}

void trim(EntryList& list) {
  void* smaller_block = list.count ? std::realloc(list.entries, sizeof(Entry) * list.count) : nullptr;
  if (!smaller_block) return;
  list.entries = static_cast<Entry*>(smaller_block);
  list.capacity = list.count;
}

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
      if (lanes[p]) best.offer(p0 + p, {pre[p], static_cast<int32_t>(f0 + f)});
  }
  best.unlock(p0 / kPositionBlock);
}

bool encode_block(const EncodeInput& in, int64_t block, Scratch& s, EntryList* lists, TopK* best) {
  const int64_t f0 = block * kFeatureBlock, features = smaller(kFeatureBlock, in.w_enc.rows - f0);
  const int64_t start = in.first_position / kPositionBlock * kPositionBlock;
  for (int64_t p0 = start; p0 < in.positions; p0 += kPositionBlock) {
    const int64_t positions = smaller(kPositionBlock, in.positions - p0);
    if (in.w_enc.element == Element::bfloat16)
      pre_activations<uint16_t>(in, f0, features, p0, positions, s);
    else
      pre_activations<float>(in, f0, features, p0, positions, s);
    if (best)
      offer(in, f0, features, p0, positions, s, *best);
    else if (!keep_above(in, f0, features, p0, positions, s, lists[block]))
      return false;
  }
  trim(lists[block]);
  return true;
}

// Blocks hold ascending features, so walking them in order leaves every position sorted.
bool gather_lists(const EntryList* lists, int64_t blocks, EncodeResult& out) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < lists[b].count; ++i) ++out.row_ptr[lists[b].entries[i].position + 1];
  for (int64_t p = 0; p < out.positions; ++p) out.row_ptr[p + 1] += out.row_ptr[p];
  const int64_t n = out.row_ptr[out.positions];
  out.index = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * (n + 1)));
  out.value = static_cast<float*>(std::malloc(sizeof(float) * (n + 1)));
  int64_t* cursor = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * (out.positions + 1)));
  const bool ok = out.index && out.value && cursor;
  if (ok) {
    std::memcpy(cursor, out.row_ptr, sizeof(int64_t) * out.positions);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < lists[b].count; ++i) {
        const Entry entry = lists[b].entries[i];
        const int64_t place = cursor[entry.position]++;
        out.index[place] = entry.feature;
        out.value[place] = entry.value;
      }
  }
  std::free(cursor);
  return ok;
}

bool gather_best(TopK& best, bool keep_negative, EncodeResult& out) {
  out.index = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * (best.k * out.positions + 1)));
  out.value = static_cast<float*>(std::malloc(sizeof(float) * (best.k * out.positions + 1)));
  if (!out.index || !out.value) return false;
  int64_t n = 0;
  for (int64_t p = 0; p < out.positions; ++p) {
    const int64_t count = best.finish(p);
    const Candidate* chosen = best.candidates_of(p);
    for (int64_t i = 0; i < count; ++i) {
      if (!keep_negative && chosen[i].value <= 0.f) continue;
      out.index[n] = chosen[i].feature;
      out.value[n++] = chosen[i].value;
    }
    out.row_ptr[p + 1] = n;
  }
  return true;
}

// Encode all blocks, each by whichever thread is free: a block's entries do not depend on the thread.
bool encode_blocks(const EncodeInput& in, int64_t blocks, EntryList* lists, TopK* best) {
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
    std::free(scratch);
  }
  return ok;
}

}  // namespace

EncodeResult encode(const EncodeInput& in) {
  EncodeResult out{};
  out.positions = in.positions;
  const int64_t blocks = (in.w_enc.rows + kFeatureBlock - 1) / kFeatureBlock;
  out.row_ptr = static_cast<int64_t*>(std::calloc(in.positions + 1, sizeof(int64_t)));
  EntryList* lists = static_cast<EntryList*>(std::calloc(blocks + 1, sizeof(EntryList)));
  TopK best{};
  bool ok = out.row_ptr && lists;
  if (ok && in.top_k > 0) ok = best.allocate(in.positions, smaller(in.top_k, in.w_enc.rows), kPositionBlock);
  ok = ok && encode_blocks(in, blocks, lists, in.top_k > 0 ? &best : nullptr);
  ok = ok && (in.top_k > 0 ? gather_best(best, in.keep_negative, out) : gather_lists(lists, blocks, out));
  out.workspace_bytes = smaller(in.threads, blocks) * static_cast<int64_t>(sizeof(Scratch)) + best.bytes();
  for (int64_t b = 0; lists && b < blocks; ++b) {
    out.workspace_bytes += lists[b].capacity * static_cast<int64_t>(sizeof(Entry));
    std::free(lists[b].entries);
  }
  std::free(lists);
  best.release();
  out.status = {ok ? Outcome::ok : Outcome::out_of_memory};
  return out;
}

void encode_free(EncodeResult& result) {
  std::free(result.row_ptr);
  std::free(result.index);
  std::free(result.value);
  result = EncodeResult{};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
