#include <cmath>

#include "cpu/ops.h"
namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {
float weight(const AttendBackInput& in, int64_t head, int64_t i, int64_t j) {
  if (in.pattern) return in.pattern[(head * in.positions + i) * in.positions + j];
  if (in.window && i - j >= in.window) return 0.f;
  const float* q = in.query + (head * in.positions + i) * in.qk_width;
  const float* k = in.key + (head / (in.heads / in.kv_heads) * in.positions + j) * in.qk_width;
  float dot = 0;
  for (int64_t c = 0; c < in.qk_width; ++c) dot += q[c] * k[c];
  dot *= in.scale;
  if (in.softcap != 0.f) dot = in.softcap * std::tanh(dot / in.softcap);
  return std::exp(dot - in.log_sum_exp[head * in.positions + i]);
}
}  // namespace
Status attend_back(const AttendBackInput& in) {
  const int64_t group = in.heads / in.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(in.threads)
  for (int64_t t = 0; t < in.targets; ++t) {
    const int64_t first = in.prefix_ptr[t], prefix = in.prefix_ptr[t + 1] - first;
    for (int64_t j = 0; j < prefix; ++j)
      for (int64_t kv = 0; kv < in.kv_heads; ++kv) {
        float* z = in.z + ((first + j) * in.kv_heads + kv) * in.width;
        for (int64_t c = 0; c < in.width; ++c) z[c] = 0.f;
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
          for (int64_t i = j; i < prefix; ++i) {
            const float a = weight(in, h, i, j);
            const float* y = in.y + ((first + i) * in.heads + h) * in.width;
            for (int64_t c = 0; c < in.width; ++c) z[c] += a * y[c];
          }
      }
  }
  return Status::ok;
}
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
