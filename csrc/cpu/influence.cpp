#include <cmath>

#include "cpu/ops.h"
namespace pycircuit::PYCIRCUIT_NAMESPACE {
Status influence(const InfluenceInput& in) {
  for (int64_t c = 0; c < in.columns; ++c) in.influence[c] = 0.f;
  Status status = Status::ok;
  for (int64_t r = 0; r < in.count; ++r) {
    const float* row = in.rows + r * in.row_stride;
    double total = 0;
    for (int64_t c = 0; c < in.columns; ++c) total += std::fabs(row[c]);
    const float weight = in.weight[r] + (in.node[r] >= 0 ? in.influence[in.node[r]] : 0.f);
    const float scale = total > 0 ? static_cast<float>(weight / total) : 0.f;
    for (int64_t c = 0; c < in.columns; ++c) in.influence[c] += scale * std::fabs(row[c]);
    for (int64_t q = 0; q <= r; ++q)
      if (in.node[q] >= 0 && scale * row[in.node[q]] != 0.f) status = Status::not_in_order;
  }
  return status;
}
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
