// Limits of one ISA on this machine: multiply_adds runs x = x * a + b in registers, stream_read sums an array.
// Layout: no memory for the first; float32 [count], 64-byte lines, for the second.
// Bytes: none for the first; every byte of the array once, several streams side by side, for the second.
// Parallel over threads, each with chains or streams of its own.
#include "cpu/ops.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

// Two multiply-adds may start in a cycle and take four, or six where multiplying and adding are apart: twelve
// chains keep both units busy, and with both constants they fit the sixteen registers of the smallest ISA.
constexpr int kChains = 12;
constexpr int64_t kLine = 16;  // floats in a cache line
constexpr int kStreams = 8;    // one stream of loads per core leaves DRAM half idle

float run_chains(int64_t rounds) {
  const Vec a = splat(0.999f), b = splat(0.001f);
  Vec chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = splat(0.5f + 0.01f * static_cast<float>(c));
  for (int64_t r = 0; r < rounds; ++r)
    for (int c = 0; c < kChains; ++c) chain[c] = chain[c] * a + b;
  Vec total = chain[0];
  for (int c = 1; c < kChains; ++c) total += chain[c];
  return sum(total);
}

// Sum of kStreams arrays that lie one after another, read side by side.
float read_streams(const float* data, int64_t length) {
  Vec total[kStreams] = {};
  for (int64_t c = 0; c < length; c += kLanes)
    for (int s = 0; s < kStreams; ++s) total[s] += load(data + s * length + c);
  for (int s = 1; s < kStreams; ++s) total[0] += total[s];
  return sum(total[0]);
}

}  // namespace

Rate multiply_adds(int64_t rounds, int threads) {
  float total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
  for (int t = 0; t < threads; ++t) total += run_chains(rounds);
  return {2.0 * kLanes * kChains * static_cast<double>(rounds) * threads, total};
}

Rate stream_read(const float* data, int64_t count, int threads) {
  // An odd number of cache lines: at a power of two all streams would fall into the same sets.
  const int64_t length = ((count / threads / kStreams / kLine - 1) | 1) * kLine;
  if (length < 0) return {0, 0};
  float total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
  for (int t = 0; t < threads; ++t) total += read_streams(data + t * kStreams * length, length);
  return {static_cast<double>(length * kStreams * threads) * sizeof(float), total};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
