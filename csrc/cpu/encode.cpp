// encode: pre[p, f] = x[p] . w_enc[f] + b_enc[f]; active features in CSR by position.
// By AMX what may be active is found first (screened_encode.h); otherwise all of it is computed in float32:
// Layout: x and w_enc rows in place; a block of x transposed to [depth, positions] so that one weight multiplies
// a vector of positions; a thread has the pre-activations of one block of features x positions at a time.
// Bytes: w_enc once from memory, x once per feature block from cache. Parallel over blocks of features.
#include <cstdlib>

#include "cpu/pre_activations.h"
#include "cpu/screened_encode.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

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
  static constexpr int64_t kFeatures = kFeatureBlock, kSpare = 16;
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
