#include <cstdlib>

#include "cpu/ops.h"
namespace pycircuit::PYCIRCUIT_NAMESPACE {
EncodeResult encode(const EncodeInput& in) {
  EncodeResult out{};
  out.positions = in.positions;
  out.row_ptr = static_cast<int64_t*>(std::calloc(in.positions + 1, sizeof(int64_t)));
  out.index = static_cast<int64_t*>(std::malloc((in.positions * in.w_enc.rows + 1) * sizeof(int64_t)));
  out.value = static_cast<float*>(std::malloc((in.positions * in.w_enc.rows + 1) * sizeof(float)));
  int64_t n = 0;
  for (int64_t p = 0; p < in.positions; ++p) {
    out.row_ptr[p] = n;
    if (p < in.first_position) continue;
    for (int64_t f = 0; f < in.w_enc.rows; ++f) {
      float dot = in.b_enc[f];
      for (int64_t c = 0; c < in.width; ++c)
        dot += in.x[p * in.x_stride + c] * (in.w_enc.element == Element::float32
                                                ? static_cast<const float*>(in.w_enc.data)[f * in.w_enc.row_stride + c]
                                                : widen(static_cast<const uint16_t*>(in.w_enc.data)[f * in.w_enc.row_stride + c]));
      if (!(dot <= in.threshold[f * in.threshold_stride])) {
        out.index[n] = f;
        out.value[n++] = dot;
      }
    }
  }
  out.row_ptr[in.positions] = n;
  return out;
}
void encode_free(EncodeResult& result) {
  std::free(result.row_ptr);
  std::free(result.index);
  std::free(result.value);
}
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
