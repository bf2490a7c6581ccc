#include "cpu/ops.h"
namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {
template <class W>
void decode_typed(const DecodeInput& in) {
  const int64_t slots = in.w_dec.slots, width = in.w_dec.width, positions = in.features.positions;
  const W* w = static_cast<const W*>(in.w_dec.data);
#pragma omp parallel for collapse(2) schedule(static) num_threads(in.threads)
  for (int64_t s = 0; s < slots; ++s)
    for (int64_t p = 0; p < positions; ++p) {
      float* __restrict out = in.out + (s * positions + p) * width;
      for (int64_t c = 0; c < width; ++c) out[c] = in.bias ? in.bias[s * width + c] : 0.f;
      for (int64_t e = in.features.row_ptr[p]; e < in.features.row_ptr[p + 1]; ++e) {
        const W* row = w + in.features.index[e] * in.w_dec.row_stride + s * in.w_dec.slot_stride;
        const float value = in.features.value[e];
        int64_t c = 0;
        for (; c + kLanes <= width; c += kLanes) store(out + c, load(out + c) + value * load(row + c));
        for (; c < width; ++c) out[c] += value * load_one(row + c);
      }
    }
}
}  // namespace
Status decode(const DecodeInput& in) {
  if (in.w_dec.element == Element::bfloat16)
    decode_typed<uint16_t>(in);
  else
    decode_typed<float>(in);
  return Status::ok;
}
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
