// k best candidates of every position, offered in any order by any thread. The order of candidates is total
// (value, then lower feature), so the result does not depend on the order of offers. Values are kept as integers
// of the same order, with NaN above infinity, so that it is never dropped. A candidate may be an interval that its
// value lies in; it stays while its high end is not below the k-th best low end.
#pragma once
#include <cstdlib>

#include "cpu/isa.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

inline int32_t key_of(float value) {
  if (value != value) return INT32_MAX;
  int32_t bits;
  value += 0.f;  // -0 is 0
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

inline float value_of(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline VecInt load_keys(const int32_t* p) {
  VecInt v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecInt splat_key(int32_t key) { return key - VecInt{}; }

inline int64_t lanes_in(VecInt mask) {
  int32_t lanes[kLanes];
  std::memcpy(lanes, &mask, sizeof lanes);
  int32_t total = 0;
  for (int32_t lane : lanes) total -= lane;
  return total;
}

// The lowest of the keys that are not below a bound; one is there.
inline int32_t lowest_from(const int32_t* keys, int64_t n, int32_t bound) {
  VecInt lowest = splat_key(INT32_MAX);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecInt key = load_keys(keys + i);
    lowest = (key >= splat_key(bound)) & (key < lowest) ? key : lowest;
  }
  int32_t lanes[kLanes], result = INT32_MAX;
  std::memcpy(lanes, &lowest, sizeof lanes);
  for (int32_t lane : lanes) result = lane < result ? lane : result;
  return result;
}

// The k-th largest of n keys, found bit by bit. Keys are INT32_MIN up to a whole vector.
inline int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k) {
  uint32_t found = 0;  // from INT32_MIN
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    const int32_t trial = static_cast<int32_t>((found | bit) ^ (1u << 31));
    VecInt above{};
    for (int64_t i = 0; i < n; i += kLanes) above += load_keys(keys + i) >= splat_key(trial);
    const int64_t count = lanes_in(above);
    if (count == k) return lowest_from(keys, n, trial);
    if (count > k) found |= bit;
  }
  return static_cast<int32_t>(found ^ (1u << 31));
}

// The k-th lowest feature among those with this key.
inline int32_t kth_feature(const int32_t* features, const int32_t* keys, int32_t key, int64_t n, int64_t k) {
  int32_t below = 0;  // no more than k - 1 are under it
  for (int32_t bit = 1 << 30; bit; bit >>= 1) {
    VecInt lower{};
    for (int64_t i = 0; i < n; i += kLanes)
      lower += (load_keys(features + i) < splat_key(below | bit)) & (load_keys(keys + i) == splat_key(key));
    if (lanes_in(lower) < k) below |= bit;
  }
  return below;
}

struct TopK {
  int64_t k, positions, block, capacity;
  int32_t *keys, *highs,
      *features;  // [positions, capacity]; of intervals keys are the low ends and highs the others
  int64_t* counts;
  float* floor;  // [positions, to a whole block] the k-th best so far; NaN until there are k, +inf past the end
  int* locks;

  // spare: places beyond k, at least; intervals: whether candidates are some.
  bool allocate(int64_t positions_, int64_t k_, int64_t block_, int64_t spare, bool intervals) {
    k = k_, positions = positions_, block = block_, capacity = round_up(k + larger(spare, k / 2), kLanes);
    const int64_t padded = round_up(positions, block), bytes = sizeof(int32_t) * (positions * capacity + 1);
    keys = static_cast<int32_t*>(std::malloc(bytes));
    features = static_cast<int32_t*>(std::malloc(bytes));
    highs = intervals ? static_cast<int32_t*>(std::malloc(bytes)) : nullptr;
    counts = static_cast<int64_t*>(std::calloc(positions + 1, sizeof(int64_t)));
    floor = static_cast<float*>(std::malloc(sizeof(float) * (padded + 1)));
    locks = static_cast<int*>(std::calloc(padded / block + 1, sizeof(int)));
    if (!keys || !features || (intervals && !highs) || !counts || !floor || !locks) return false;
    for (int64_t p = 0; p < padded; ++p) floor[p] = p < positions ? __builtin_nanf("") : __builtin_inff();
    return true;
  }

  void release() {
    std::free(keys);
    std::free(highs);
    std::free(features);
    std::free(counts);
    std::free(floor);
    std::free(locks);
  }

  int64_t bytes() const {
    const int64_t each = static_cast<int64_t>(sizeof(int32_t)) * (highs ? 3 : 2) * capacity;
    return keys ? positions * (each + static_cast<int64_t>(sizeof(int64_t) + sizeof(float))) : 0;
  }

  void lock(int64_t b) {
    while (__atomic_exchange_n(&locks[b], 1, __ATOMIC_ACQUIRE))
      while (__atomic_load_n(&locks[b], __ATOMIC_RELAXED)) {
      }
  }
  void unlock(int64_t b) { __atomic_store_n(&locks[b], 0, __ATOMIC_RELEASE); }

  bool has_room(int64_t p, int64_t count) const { return counts[p] + count <= capacity; }

  // Under the lock of its block, where it is not full. Not for candidates below the floor; one that is equal to it
  // may still win by its lower feature.
  void offer(int64_t p, int32_t feature, float value) {
    const int64_t place = p * capacity + counts[p]++;
    keys[place] = key_of(value), features[place] = feature;
  }

  // Drop candidates that k others are better than; returns the k-th best key.
  int32_t shrink(int64_t p) {
    if (counts[p] < k) return INT32_MIN;
    int32_t* key = keys + p * capacity;
    for (int64_t i = counts[p]; i < round_up(counts[p], kLanes); ++i) key[i] = INT32_MIN;
    const int32_t least = kth_largest(key, counts[p], k);
    floor[p] = value_of(least);
    keep(p, least, INT32_MAX);
    return least;
  }

  // The same where all are values: k stay.
  void shrink_values(int64_t p) {
    const int32_t least = shrink(p);
    if (counts[p] <= k) return;
    int32_t *key = keys + p * capacity, *feature = features + p * capacity;
    int64_t above = 0;
    for (int64_t i = 0; i < counts[p]; ++i) above += key[i] > least;
    for (int64_t i = counts[p]; i < round_up(counts[p], kLanes); ++i) key[i] = INT32_MIN, feature[i] = 0;
    keep(p, least, kth_feature(feature, key, least, counts[p], k - above));
  }

  // Sort by ascending feature. Blocks of features come nearly in order.
  void sort(int64_t p) {
    int32_t *key = keys + p * capacity, *feature = features + p * capacity;
    constexpr int64_t kGaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
    for (int64_t gap : kGaps)
      for (int64_t i = gap; i < counts[p]; ++i) {
        const int32_t own = feature[i], own_key = key[i];
        int64_t j = i;
        for (; j >= gap && feature[j - gap] > own; j -= gap) feature[j] = feature[j - gap], key[j] = key[j - gap];
        feature[j] = own, key[j] = own_key;
      }
  }

 private:
  // Keep what is above a key, and of what is equal to it features up to the last.
  void keep(int64_t p, int32_t least, int32_t last) {
    int32_t *key = keys + p * capacity, *feature = features + p * capacity;
    int32_t* high = highs ? highs + p * capacity : key;
    int64_t kept = 0;
    for (int64_t i = 0; i < counts[p]; ++i) {
      const bool stays = high[i] > least || (high[i] == least && feature[i] <= last);
      key[kept] = key[i], feature[kept] = feature[i], high[kept] = high[i];
      kept += stays;
    }
    counts[p] = kept;
  }
};

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
