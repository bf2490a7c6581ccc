// edge_scores: out[t, e] += value[e] * gradient[t, p] . w_dec[index[e]] for every entry e at a position p of t.
// Layout: gradient and w_dec rows where they lie; at one position a grid of dot products, four features by as
// many targets as registers hold, in pieces of the width that keep the rows at hand in the first cache.
// Bytes: a decoder row once a position, a gradient row once. Parallel over positions: out has one owner.
#include "cpu/dot.h"
#include "cpu/ops.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kFewTargets = 2 * kDotColumns;
constexpr int64_t kWidthBlock = 768;
constexpr int64_t kTargetList = 256;  // targets whose rows are looked up at one time

// Rows of the targets that reach one position.
struct Reaching {
  int64_t count;
  const float* gradient[kTargetList];
  float* out[kTargetList];
};

// Fills `found` with the targets from t on; returns where to go on.
int64_t reaching(const EdgeScoresInput& in, int64_t position, int64_t t, Reaching& found) {
  found.count = 0;
  for (; t < in.targets && found.count < kTargetList; ++t) {
    const int64_t row = in.prefix_ptr[t] + position;
    if (row >= in.prefix_ptr[t + 1]) continue;
    found.gradient[found.count] = in.gradient + row * in.gradient_stride;
    found.out[found.count++] = in.out + t * in.out_stride;
  }
  return t;
}

// Rows are a few pages long and lie anywhere, too short for the hardware to find: ask for them early.
void prefetch(const void* row, int64_t begin, int64_t end) {
  for (int64_t byte = begin / 64 * 64; byte < end; byte += 64)
    __builtin_prefetch(static_cast<const char*>(row) + byte, 0, 2);
}

// out[t, e .. e + 4) += value * found[t], for the entries there are.
void add(const EdgeScoresInput& in, const float* found, int64_t e, int64_t entries, float* out) {
  if (entries == kDotRows) {
    Vec4 sum, value, dot;
    std::memcpy(&sum, out + e, sizeof sum);
    std::memcpy(&value, in.features.value + e, sizeof value);
    std::memcpy(&dot, found, sizeof dot);
    sum += value * dot;
    std::memcpy(out + e, &sum, sizeof sum);
  } else {
    for (int64_t r = 0; r < entries; ++r) out[e + r] += in.features.value[e + r] * found[r];
  }
}

// A few targets against the entries begin .. end, while the next targets' gradients arrive. Missing entries and
// targets repeat the last one and are not written.
template <class W>
void few_targets(const EdgeScoresInput& in, const float* const* gradient, float* const* out, int64_t targets,
                 int64_t begin, int64_t end, int64_t coming) {
  const W* w = static_cast<const W*>(in.w_dec.data);
  const int64_t bytes = in.w_dec.width * static_cast<int64_t>(sizeof(float));
  const int64_t share = round_up(bytes * kDotRows / (end - begin) + 1, 64);
  for (int64_t k = 0; k < in.w_dec.width; k += kWidthBlock) {
    const int64_t depth = smaller(kWidthBlock, in.w_dec.width - k);
    for (int64_t e = begin; e < end; e += kDotRows) {
      const W* left[kDotRows];
      for (int64_t r = 0; r < kDotRows; ++r)
        left[r] = w + in.features.index[smaller(e + r, end - 1)] * in.w_dec.row_stride + k;
      const int64_t ask = (e - begin) / kDotRows * share;
      for (int64_t t = 0; k == 0 && t < coming; ++t)
        prefetch(gradient[targets + t], ask, smaller(ask + share, bytes));
      for (int64_t t = 0; t < targets; t += kDotColumns) {
        const float* right[kDotColumns];
        float found[kDotColumns * kDotRows];
        for (int64_t c = 0; c < kDotColumns; ++c) right[c] = gradient[smaller(t + c, targets - 1)] + k;
        dot_tile<kDotColumns>(depth, left, right, found);
        for (int64_t c = 0; c < smaller(kDotColumns, targets - t); ++c)
          add(in, found + c * kDotRows, e, smaller(kDotRows, end - e), out[t + c]);
      }
    }
  }
}

template <class W>
void one_position(const EdgeScoresInput& in, int64_t p, int64_t next) {
  const int64_t begin = in.features.row_ptr[p], end = in.features.row_ptr[p + 1];
  const int64_t coming = next < in.features.positions ? in.features.row_ptr[next] : 0;
  const int64_t coming_end = next < in.features.positions ? in.features.row_ptr[next + 1] : 0;
  const int64_t share = (coming_end - coming) * kFewTargets / larger(1, smaller(in.targets, kTargetList)) + 1;
  const W* w = static_cast<const W*>(in.w_dec.data);
  Reaching found;
  for (int64_t t = 0; begin < end && t < in.targets;) {
    t = reaching(in, p, t, found);
    for (int64_t i = 0; i < found.count; i += kFewTargets) {
      const int64_t ask = coming + i / kFewTargets * share, left = found.count - i;
      for (int64_t e = ask; e < smaller(ask + share, coming_end); ++e)
        prefetch(w + in.features.index[e] * in.w_dec.row_stride, 0,
                 in.w_dec.width * static_cast<int64_t>(sizeof(W)));
      few_targets<W>(in, found.gradient + i, found.out + i, smaller(kFewTargets, left), begin, end,
                     larger(0, smaller(kFewTargets, left - kFewTargets)));
    }
  }
}

}  // namespace

Status edge_scores(const EdgeScoresInput& in) {
  const bool half = in.w_dec.element == Element::bfloat16;
  const int64_t positions = in.features.positions, threads = larger(1, smaller(in.threads, positions));
  // Neighbours share lines of out, so a thread takes several in a row; a few shares each, since later positions
  // have fewer targets.
  const int64_t share = larger(1, smaller(8, positions / (4 * threads)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
  for (int64_t first = 0; first < positions; first += share)
    for (int64_t p = first; p < smaller(first + share, positions); ++p)
      half ? one_position<uint16_t>(in, p, p + 1) : one_position<float>(in, p, p + 1);
  return Status::ok;
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
