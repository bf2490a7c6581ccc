// influence[c] = sum over rows r of scale[r] * |rows[r, c]|, scale[r] = (weight[r] + influence[node[r]]) / sum
// |rows[r]|, row r being the stored row order[r] where there is an order. Layout: rows [stored, columns],
// row_stride apart. Bytes: rows once from DRAM, once more from cache: blocks of four are summed while the block
// before is added. Parallel over columns, in chunks of fixed size; partial sums join in chunk order, so threads
// change no bit.
#include <omp.h>

#include <cstdlib>

#include "cpu/ops.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int kRows = 4;              // per block: eight streams of loads keep DRAM and cache busy together
constexpr int64_t kChunk = 1024;      // columns per partial sum; floats inside, doubles across
constexpr int64_t kThreadChunks = 4;  // with fewer chunks per thread the barriers cost more
constexpr float kSmallest = 1.17549435e-38f;
constexpr float kZeros[kChunk] = {};  // in place of rows before the first block and after the last
constexpr uint32_t kSign = 0x80000000u;

inline uint32_t bits_of(float f) {
  uint32_t b;
  std::memcpy(&b, &f, sizeof b);
  return b;
}

inline VecBits bits_of(Vec f) {
  VecBits b;
  std::memcpy(&b, &f, sizeof b);
  return b;
}

inline float float_of(uint32_t b) {
  float f;
  std::memcpy(&f, &b, sizeof f);
  return f;
}

inline Vec float_of(VecBits b) {
  Vec f;
  std::memcpy(&f, &b, sizeof f);
  return f;
}

inline float magnitude(float f) { return float_of(bits_of(f) & ~kSign); }

// One block of rows being added and the next being summed, over one chunk of columns.
struct Step {
  const float* row[kRows];
  float scale[kRows];
  const float* next[kRows];
  double total[kRows];
  uint32_t late;  // sign bit set: a row had an entry in a closed column
};

// Influence is never negative, so its sign bit is free: set, it says that the column is closed, its own row having
// been read. An entry's magnitude plus 0x7fffffff carries into the sign bit unless the entry is zero.
void tail(Step& step, float* influence, int64_t c, int64_t n) {
  for (; c < n; ++c) {
    const uint32_t old = bits_of(influence[c]), closed = old & kSign;
    float added = 0.f;
    for (int g = 0; g < kRows; ++g) {
      const uint32_t entry = bits_of(step.row[g][c]) & ~kSign;
      step.late |= (entry + ~kSign) & closed;
      added += step.scale[g] * float_of(entry);
      step.total[g] += magnitude(step.next[g][c]);
    }
    influence[c] = float_of((bits_of(float_of(old & ~kSign) + added) & ~kSign) | closed);
  }
}

void add_and_sum(Step& step, float* influence, int64_t n) {
  Vec scale[kRows], sums[kRows] = {};
  for (int g = 0; g < kRows; ++g) scale[g] = splat(step.scale[g]);
  VecBits late = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const VecBits old = bits_of(load(influence + c)), closed = old & kSign;
    VecBits entries = {};
    Vec added = {};
    for (int g = 0; g < kRows; ++g) {
      const VecBits entry = bits_of(load(step.row[g] + c)) & ~kSign;
      entries |= entry;
      added += scale[g] * float_of(entry);
      sums[g] += float_of(bits_of(load(step.next[g] + c)) & ~kSign);
    }
    late |= (entries + ~kSign) & closed;
    store(influence + c, float_of((bits_of(float_of(old & ~kSign) + added) & ~kSign) | closed));
  }
  for (int lane = 0; lane < kLanes; ++lane) step.late |= late[lane];
  for (int g = 0; g < kRows; ++g) step.total[g] = sum(sums[g]);
  tail(step, influence, c, n);
}

struct Run {
  const InfluenceInput& in;
  int64_t chunks;
  double* totals;   // [2, kRows, chunks] sums of |row|, of even and of odd blocks
  float* entering;  // [2, kRows] influence of a row's node when its block begins

  const float* row(int64_t r) const {
    if (r < 0 || r >= in.count) return nullptr;
    return in.rows + (in.order ? in.order[r] : r) * in.row_stride;
  }
};

// Add the rows from `first` - kRows and sum the rows from `first`, over the columns of one thread.
void walk(const Run& run, Step& step, int64_t first, int64_t chunk, int64_t last_chunk) {
  double* totals = run.totals + (first / kRows & 1) * kRows * run.chunks;
  for (; chunk < last_chunk; ++chunk) {
    const int64_t c = chunk * kChunk;
    for (int g = 0; g < kRows; ++g) {
      const float *row = run.row(first - kRows + g), *next = run.row(first + g);
      step.row[g] = row ? row + c : kZeros;
      step.next[g] = next ? next + c : kZeros;
    }
    add_and_sum(step, run.in.influence + c, smaller(kChunk, run.in.columns - c));
    for (int g = 0; g < kRows; ++g) totals[g * run.chunks + chunk] = step.total[g];
  }
}

// Close those of the columns begin .. end whose rows were added; store the influence that enters rows from `first`
// on.
void close_and_enter(const Run& run, int64_t first, int64_t begin, int64_t end) {
  const InfluenceInput& in = run.in;
  for (int64_t r = larger(0, first - kRows); r < smaller(first + kRows, in.count); ++r) {
    const int64_t c = in.node[r];
    if (c < begin || c >= end) continue;
    if (r < first)
      in.influence[c] = float_of(bits_of(in.influence[c]) | kSign);
    else
      run.entering[(first / kRows & 1) * kRows + r - first] = magnitude(in.influence[c]);
  }
}

// Compute scales of the rows from `first` on. A row may feed a later one of its block; every thread repeats this.
void weigh(const Run& run, Step& step, int64_t first) {
  const InfluenceInput& in = run.in;
  const int64_t half = first / kRows & 1, rows = smaller(kRows, in.count - first);
  for (int g = 0; g < kRows; ++g) step.scale[g] = 0.f;
  for (int64_t g = 0; g < rows; ++g) {
    const int64_t node = in.node[first + g];
    double total = 0;
    for (int64_t k = 0; k < run.chunks; ++k) total += run.totals[(half * kRows + g) * run.chunks + k];
    double weight = in.weight[first + g];
    if (node >= 0) weight += run.entering[half * kRows + g];
    for (int64_t q = 0; q < g && node >= 0; ++q)
      weight += static_cast<double>(step.scale[q]) * magnitude(run.row(first + q)[node]);
    for (int64_t q = 0; q <= g; ++q) {
      const int64_t earlier = in.node[first + q];
      if (earlier >= 0 && run.row(first + g)[earlier] != 0.f) step.late |= kSign;
    }
    // A row without edges passes nothing on, but a weight that is NaN stays one.
    step.scale[g] = static_cast<float>(total == 0 ? weight * 0 : weight / (total < kSmallest ? kSmallest : total));
  }
}

// The first row with an edge to a node whose own row does not come later. Only called after such a row was seen.
int64_t first_out_of_order(const Run& run) {
  for (int64_t r = 0; r < run.in.count; ++r)
    for (int64_t earlier = 0; earlier <= r; ++earlier) {
      const int64_t node = run.in.node[earlier];
      if (node >= 0 && run.row(r)[node] != 0.f) return r;
    }
  return -1;
}

bool run_thread(const Run& run, int64_t thread, int64_t threads) {
  const InfluenceInput& in = run.in;
  const int64_t chunk = run.chunks * thread / threads, last_chunk = run.chunks * (thread + 1) / threads;
  const int64_t begin = chunk * kChunk, end = smaller(last_chunk * kChunk, in.columns);
  for (int64_t c = begin; c < end; ++c) in.influence[c] = 0.f;
  Step step = {};
  for (int64_t first = 0; first < in.count + kRows; first += kRows) {
    walk(run, step, first, chunk, last_chunk);
    close_and_enter(run, first, begin, end);
#pragma omp barrier
    weigh(run, step, first);
  }
  for (int64_t c = begin; c < end; ++c) in.influence[c] = magnitude(in.influence[c]);
  return step.late >= kSign;
}

}  // namespace

Status influence(const InfluenceInput& in) {
  const int64_t chunks = (in.columns + kChunk - 1) / kChunk;
  const int threads = static_cast<int>(larger(1, smaller(in.threads, chunks / kThreadChunks)));
  double* totals = static_cast<double*>(std::malloc(2 * kRows * (chunks * sizeof(double) + sizeof(float))));
  if (!totals) return {Outcome::out_of_memory};
  const Run run{in, chunks, totals, reinterpret_cast<float*>(totals + 2 * kRows * chunks)};
  bool late = false;
#pragma omp parallel num_threads(threads) reduction(|| : late)
  late = run_thread(run, omp_get_thread_num(), omp_get_num_threads()) || late;
  std::free(totals);
  if (late) return {Outcome::not_in_order, first_out_of_order(run)};
  return {};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
