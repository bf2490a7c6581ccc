#include "cpu/ops.h"
namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {
template <class W>
void scores_typed(const EdgeScoresInput& in) {
  const int64_t width = in.w_dec.width;
  const W* w = static_cast<const W*>(in.w_dec.data);
#pragma omp parallel for schedule(static) num_threads(in.threads)
  for (int64_t t = 0; t < in.targets; ++t) {
    const int64_t prefix = smaller(in.prefix_ptr[t + 1] - in.prefix_ptr[t], in.features.positions);
    for (int64_t p = 0; p < prefix; ++p) {
      const float* g = in.gradient + (in.prefix_ptr[t] + p) * in.gradient_stride;
      for (int64_t e = in.features.row_ptr[p]; e < in.features.row_ptr[p + 1]; ++e) {
        const W* row = w + in.features.index[e] * in.w_dec.row_stride;
        float dot = 0;
        for (int64_t c = 0; c < width; ++c) dot += g[c] * load_one(row + c);
        in.out[t * in.out_stride + e] += in.features.value[e] * dot;
      }
    }
  }
}
}  // namespace
Status edge_scores(const EdgeScoresInput& in) {
  if (in.w_dec.element == Element::bfloat16)
    scores_typed<uint16_t>(in);
  else
    scores_typed<float>(in);
  return Status::ok;
}
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
