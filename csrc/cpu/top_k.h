// k best candidates of every position, offered in any order by any thread. The order of candidates is total
// (value, then lower feature), so the result does not depend on the order of offers.
#pragma once
#include <cstdlib>

#include "cpu/isa.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

struct Candidate {
  float value;
  int32_t feature;
};

// NaN is above everything, so that it is never dropped.
inline bool better(Candidate a, Candidate b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) return a_nan != b_nan ? a_nan : a.feature < b.feature;
  return a.value != b.value ? a.value > b.value : a.feature < b.feature;
}

// Quickselect: moves the k best of n to the front, in no order.
void select_best(Candidate* c, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const Candidate pivot = c[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (better(c[i], pivot)) ++i;
      while (better(pivot, c[j])) --j;
      if (i <= j) {
        const Candidate swap = c[i];
        c[i++] = c[j];
        c[j--] = swap;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      return;
  }
}

int by_feature(const void* a, const void* b) {
  return static_cast<const Candidate*>(a)->feature - static_cast<const Candidate*>(b)->feature;
}

struct TopK {
  int64_t k, positions, block, capacity;
  Candidate* candidates;  // [positions, capacity]
  int64_t* counts;
  float* floor;  // [positions, to a whole block] the k-th best so far; NaN until there are k, +inf past the end
  int* locks;

  bool allocate(int64_t positions_, int64_t k_, int64_t block_) {
    k = k_, positions = positions_, block = block_, capacity = k_ + larger(16, k_ / 2);
    const int64_t padded = round_up(positions, block);
    candidates = static_cast<Candidate*>(std::malloc(sizeof(Candidate) * (positions * capacity + 1)));
    counts = static_cast<int64_t*>(std::calloc(positions + 1, sizeof(int64_t)));
    floor = static_cast<float*>(std::malloc(sizeof(float) * (padded + 1)));
    locks = static_cast<int*>(std::calloc(padded / block + 1, sizeof(int)));
    if (!candidates || !counts || !floor || !locks) return false;
    for (int64_t p = 0; p < padded; ++p) floor[p] = p < positions ? __builtin_nanf("") : __builtin_inff();
    return true;
  }

  void release() {
    std::free(candidates);
    std::free(counts);
    std::free(floor);
    std::free(locks);
  }

  int64_t bytes() const {
    return candidates
               ? positions * static_cast<int64_t>(sizeof(Candidate) * capacity + sizeof(int64_t) + sizeof(float))
               : 0;
  }

  void lock(int64_t b) {
    while (__atomic_exchange_n(&locks[b], 1, __ATOMIC_ACQUIRE))
      while (__atomic_load_n(&locks[b], __ATOMIC_RELAXED)) {
      }
  }
  void unlock(int64_t b) { __atomic_store_n(&locks[b], 0, __ATOMIC_RELEASE); }

  Candidate* candidates_of(int64_t p) { return candidates + p * capacity; }

  // Under the lock of its block. A candidate equal to the floor may still win by its lower feature.
  void offer(int64_t p, Candidate c) {
    candidates_of(p)[counts[p]++] = c;
    if (counts[p] == capacity) shrink(p);
  }

  void shrink(int64_t p) {
    if (counts[p] <= k) return;
    select_best(candidates_of(p), counts[p], k);
    counts[p] = k;
    Candidate last = candidates_of(p)[0];
    for (int64_t i = 1; i < k; ++i)
      if (better(last, candidates_of(p)[i])) last = candidates_of(p)[i];
    floor[p] = last.value;
  }

  // Sort the k best by ascending feature; returns their number.
  int64_t finish(int64_t p) {
    shrink(p);
    std::qsort(candidates_of(p), counts[p], sizeof(Candidate), by_feature);
    return counts[p];
  }
};

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
