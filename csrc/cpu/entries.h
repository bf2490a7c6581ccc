// Active features as encode finds them, and their collection in CSR by position.
#pragma once
#include <cstdlib>

#include "cpu/ops.h"
#include "cpu/top_k.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

struct Entry {
  int32_t position, feature;
  float value;
};

// Active entries of one block of features; those of a position by ascending feature.
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

// The k best of every position, sorted.
bool gather_best(const TopK& best, bool keep_negative, EncodeResult& out) {
  out.index = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * (best.k * out.positions + 1)));
  out.value = static_cast<float*>(std::malloc(sizeof(float) * (best.k * out.positions + 1)));
  if (!out.index || !out.value) return false;
  int64_t n = 0;
  for (int64_t p = 0; p < out.positions; ++p) {
    for (int64_t i = p * best.capacity; i < p * best.capacity + best.counts[p]; ++i) {
      const float value = value_of(best.keys[i]);
      if (!keep_negative && value <= 0.f) continue;
      out.index[n] = best.features[i];
      out.value[n++] = value;
    }
    out.row_ptr[p + 1] = n;
  }
  return true;
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
