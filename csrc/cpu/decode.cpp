// out[s, p] = bias[s] + sum over the entries e of position p of value[e] * w_dec[index[e], s], entries in order.
// Layout: w_dec rows of `slots` times `width` float32 or bfloat16, any strides; out [slots, positions, width].
// Bytes: every active row once per position it is active at, eight rows side by side; out once (partial sums in
// L2). Parallel over (position, column block), cut so that each thread has as much to read; no element is shared.
#include "cpu/ops.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

// One stream of loads per core leaves DRAM half idle; several rows at once keep it busy, without prefetches.
constexpr int kRows = 8;
constexpr int64_t kBlock = 64;            // columns; two threads meet inside a row only at multiples of it
constexpr int64_t kWrite = 2;             // cost of writing out, in rows read
constexpr int64_t kThreadBytes = 131072;  // below this a second thread costs more than it brings

// out[c] = from[c] + sum over g < G of value[g] * row[g][offset + c]; from may be out, or null for zeros.
template <class W, int G>
void add(const W* const* row, int64_t offset, const float* value, const float* from, float* out, int64_t n) {
  const W* r[G + 1];
  Vec v[G + 1];
  for (int g = 0; g < G; ++g) r[g] = row[g] + offset, v[g] = splat(value[g]);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Vec sum = from ? load(from + c) : Vec{};
    for (int g = 0; g < G; ++g) sum += v[g] * load(r[g] + c);
    store(out + c, sum);
  }
  for (; c < n; ++c) {
    float sum = from ? from[c] : 0.f;
    for (int g = 0; g < G; ++g) sum += value[g] * load_one(r[g] + c);
    out[c] = sum;
  }
}

template <class W>
using Add = void (*)(const W* const*, int64_t, const float*, const float*, float*, int64_t);

template <class W>
constexpr Add<W> kAdd[kRows + 1] = {add<W, 0>, add<W, 1>, add<W, 2>, add<W, 3>, add<W, 4>,
                                    add<W, 5>, add<W, 6>, add<W, 7>, add<W, 8>};

int64_t blocks_per_slot(const DecodeInput& in) { return (in.w_dec.width + kBlock - 1) / kBlock; }

// Blocks first .. last of one position's [slots, width].
template <class W>
void decode_position(const DecodeInput& in, int64_t p, int64_t first, int64_t last) {
  const int64_t begin = in.features.row_ptr[p], end = in.features.row_ptr[p + 1];
  const int64_t width = in.w_dec.width, per_slot = blocks_per_slot(in);
  int64_t e = begin;
  do {
    const int64_t count = smaller(kRows, end - e);
    const W* row[kRows];
    for (int64_t g = 0; g < count; ++g)
      row[g] = static_cast<const W*>(in.w_dec.data) + in.features.index[e + g] * in.w_dec.row_stride;
    for (int64_t b = first, s; b < last; b = (s + 1) * per_slot) {
      s = b / per_slot;
      const int64_t column = (b - s * per_slot) * kBlock, stop = smaller(width, (last - s * per_slot) * kBlock);
      float* out = in.out + (s * in.features.positions + p) * width + column;
      const float* bias = in.bias ? in.bias + s * width + column : nullptr;
      kAdd<W>[count](row, s* in.w_dec.slot_stride + column, in.features.value + e, e == begin ? bias : out, out,
                     stop - column);
    }
    e += count;
  } while (e < end);
}

// Cost of all positions before p, for each block.
int64_t cost_before(const DecodeInput& in, int64_t p) { return in.features.row_ptr[p] + kWrite * p; }

struct Cut {
  int64_t position, block;
};

// Start of thread t of `threads`: t / threads of the work comes before it.
Cut cut(const DecodeInput& in, int64_t t, int64_t threads) {
  const int64_t positions = in.features.positions, blocks = in.w_dec.slots * blocks_per_slot(in);
  if (t == threads) return {positions, 0};
  const int64_t work = cost_before(in, positions) * blocks / threads * t;
  int64_t low = 0, high = positions;  // cost_before(low) * blocks <= work < cost_before(high) * blocks
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (cost_before(in, middle) * blocks <= work ? low : high) = middle;
  }
  return {low, (work - cost_before(in, low) * blocks) / (cost_before(in, low + 1) - cost_before(in, low))};
}

template <class W>
void decode_typed(const DecodeInput& in) {
  const int64_t blocks = in.w_dec.slots * blocks_per_slot(in);
  const int64_t bytes = cost_before(in, in.features.positions) * blocks * kBlock * int64_t{sizeof(W)};
  const int threads = static_cast<int>(smaller(in.threads, 1 + bytes / kThreadBytes));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    const Cut from = cut(in, t, threads), to = cut(in, t + 1, threads);
    for (int64_t p = from.position; p <= to.position && p < in.features.positions; ++p) {
      const int64_t first = p == from.position ? from.block : 0, last = p == to.position ? to.block : blocks;
      if (first < last) decode_position<W>(in, p, first, last);
    }
  }
}

}  // namespace

Status decode(const DecodeInput& in) {
  if (in.features.positions == 0 || in.w_dec.slots == 0 || in.w_dec.width == 0) return {};
  if (in.w_dec.element == Element::bfloat16)
    decode_typed<uint16_t>(in);
  else
    decode_typed<float>(in);
  return {};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
