// Views of memory that Python owns: a pointer, lengths and strides, all strides in elements.
#pragma once
#include <cstdint>

namespace pycircuit {

enum class Element : int32_t { float32 = 0, bfloat16 = 1 };

// Weight rows [rows, slots, width] in place: `width` contiguous, any strides between rows and slots.
struct Weights {
  const void* data;
  Element element;
  int64_t rows, slots, width;
  int64_t row_stride, slot_stride;
};

// Sparse features, compressed by position: entries row_ptr[p] .. row_ptr[p + 1] are active at p.
struct SparseFeatures {
  const int64_t* row_ptr;
  const int64_t* index;
  const float* value;
  int64_t positions;
};

}  // namespace pycircuit
