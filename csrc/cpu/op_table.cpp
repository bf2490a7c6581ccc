#include "cpu/op_table.h"

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace pycircuit {

extern const OpTable PYCIRCUIT_PASTE(op_table_, PYCIRCUIT_ISA);
const OpTable PYCIRCUIT_PASTE(op_table_, PYCIRCUIT_ISA) = {
    PYCIRCUIT_STRING(PYCIRCUIT_ISA),  PYCIRCUIT_NAMESPACE::multiply_adds, PYCIRCUIT_NAMESPACE::stream_read,
    PYCIRCUIT_NAMESPACE::encode,      PYCIRCUIT_NAMESPACE::encode_free,   PYCIRCUIT_NAMESPACE::decode,
    PYCIRCUIT_NAMESPACE::attend_back, PYCIRCUIT_NAMESPACE::edge_scores,   PYCIRCUIT_NAMESPACE::influence,
    PYCIRCUIT_NAMESPACE::reconstruct, PYCIRCUIT_NAMESPACE::adam,          PYCIRCUIT_NAMESPACE::product,
};

}  // namespace pycircuit
