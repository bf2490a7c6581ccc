// What a kernel answers. Python checks shapes, types and ranges before it calls; what is left can only
// be found while running.
#pragma once
#include <cstdint>

namespace pycircuit {

enum class Status : int32_t {
  ok = 0,
  out_of_memory = 1,  // a workspace could not be allocated
  not_in_order = 2,   // influence: a row added to a node whose own row had been read already
};

}  // namespace pycircuit
