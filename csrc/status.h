// Outcome of a kernel. Python checks shapes, types and ranges before it calls; these are the failures that only
// show while a kernel runs.
#pragma once
#include <cstdint>

namespace pycircuit {

enum class Outcome : int32_t {
  ok = 0,
  out_of_memory = 1,  // a workspace could not be allocated
  not_in_order = 2,   // influence: a row has an edge to a node whose own row does not come later
  unsupported = 3,    // this ISA has no instructions for bfloat16 parts
};

struct Status {
  Outcome outcome = Outcome::ok;
  int64_t index = -1;  // the row at fault, -1 where there is none
};

}  // namespace pycircuit
