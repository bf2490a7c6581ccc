// reconstruct: gradient[p] = scale * (bias + sum_e value[e] * w_dec[index[e]] - target[p]), and its products with
// those rows; adam: row f by the gradient sum_e value[e] * source[position[e]], made in L1 and used at once.
// Layout: rows in place; no gradient of a weight is in memory.
// Bytes: a decoder row per entry; three floats read and written per weight. Parallel over positions and over rows.
#include <cstdlib>

#include "cpu/dot.h"
#include "cpu/ops.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kRows = 4;         // added at a time
constexpr int64_t kShare = 16;       // positions or rows that a thread takes at a time
constexpr int64_t kWorthwhile = 64;  // fewer for a thread cost more than it brings

// out[0 .. width) += sum over g < kRows of value[g] * row[g]
void add_rows(const float* const* row, const float* value, int64_t width, float* __restrict out) {
  int64_t c = 0;
  const Vec v[kRows] = {splat(value[0]), splat(value[1]), splat(value[2]), splat(value[3])};
  for (; c + kLanes <= width; c += kLanes) {
    Vec sum = load(out + c);
    for (int g = 0; g < kRows; ++g) sum += v[g] * load(row[g] + c);
    store(out + c, sum);
  }
  for (; c < width; ++c)
    for (int g = 0; g < kRows; ++g) out[c] += value[g] * row[g][c];
}

// out = from, or zeros, + the sum of the rows source[index[e]] times value[e], e < count, in order.
void sum_of_rows(const float* source, int64_t stride, const int64_t* index, const float* value, int64_t count,
                 const float* from, int64_t width, float* __restrict out) {
  if (from)
    std::memcpy(out, from, sizeof(float) * width);
  else
    std::memset(out, 0, sizeof(float) * width);
  for (int64_t e = 0; e < count; e += kRows) {
    const float* row[kRows];
    float factor[kRows];
    for (int64_t g = 0; g < kRows; ++g) {
      const bool present = e + g < count;
      row[g] = source + index[present ? e + g : e] * stride;
      factor[g] = present ? value[e + g] : 0.f;
    }
    add_rows(row, factor, width, out);
  }
}

// out = scale * (out - target); returns the square of the difference. target_square: that of the target.
float difference(const float* __restrict target, float scale, int64_t width, float* __restrict out,
                 float& target_square) {
  Vec square{}, of_target{};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    const Vec t = load(target + c), d = load(out + c) - t;
    square += d * d;
    of_target += t * t;
    store(out + c, d * splat(scale));
  }
  float total = sum(square);
  target_square = sum(of_target);
  for (; c < width; ++c) {
    const float d = out[c] - target[c];
    total += d * d;
    target_square += target[c] * target[c];
    out[c] = d * scale;
  }
  return total;
}

// out[e] = source[index[e]] . x
void products(const float* source, int64_t stride, const int64_t* index, int64_t count, const float* x,
              int64_t width, float* out) {
  for (int64_t e = 0; e < count; e += kDotRows) {
    const float* row[kDotRows];
    float dots[kDotRows];
    for (int64_t r = 0; r < kDotRows; ++r) row[r] = source + index[smaller(e + r, count - 1)] * stride;
    dot_tile<1>(width, row, &x, dots);
    for (int64_t r = 0; r < smaller(kDotRows, count - e); ++r) out[e + r] = dots[r];
  }
}

inline Vec root(Vec v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Adam's step of one row, by its gradient g.
void adam_row(const AdamInput& in, const float* __restrict g, float* __restrict weight, float* __restrict mean,
              float* __restrict square) {
  int64_t c = 0;
  for (; c + kLanes <= in.width; c += kLanes) {
    const Vec gradient = load(g + c);
    const Vec m = load(mean + c) + splat(in.mean_share) * (gradient - load(mean + c));
    const Vec s = load(square + c) + splat(in.square_share) * (gradient * gradient - load(square + c));
    store(mean + c, m);
    store(square + c, s);
    const Vec size = root(s) / splat(in.correction) + splat(in.epsilon);
    store(weight + c, load(weight + c) - splat(in.rate) * m / size);
  }
  for (; c < in.width; ++c) {
    mean[c] += in.mean_share * (g[c] - mean[c]);
    square[c] += in.square_share * (g[c] * g[c] - square[c]);
    weight[c] -= in.rate * mean[c] / (__builtin_sqrtf(square[c]) / in.correction + in.epsilon);
  }
}

int thread_count(int threads, int64_t count) {
  return static_cast<int>(larger(1, smaller(threads, count / kWorthwhile)));
}

}  // namespace

Status reconstruct(const ReconstructInput& in) {
  const int64_t positions = in.features.positions, width = in.width;
#pragma omp parallel for schedule(dynamic, kShare) num_threads(thread_count(in.threads, positions))
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t begin = in.features.row_ptr[p], count = in.features.row_ptr[p + 1] - begin;
    const int64_t* index = in.features.index + begin;
    float* gradient = in.gradient + p * width;
    sum_of_rows(in.w_dec, in.w_dec_stride, index, in.features.value + begin, count, in.bias, width, gradient);
    float target_square;
    in.squares[2 * p] = difference(in.target + p * in.target_stride, in.scale, width, gradient, target_square);
    in.squares[2 * p + 1] = target_square;
    products(in.w_dec, in.w_dec_stride, index, count, gradient, width, in.value_gradient + begin);
  }
  return {};
}

Status adam(const AdamInput& in) {
  bool ok = true;
#pragma omp parallel num_threads(thread_count(in.threads, in.gradient.positions)) reduction(&& : ok)
  {
    float* row = static_cast<float*>(std::aligned_alloc(64, round_up(sizeof(float) * (in.width + 1), 64)));
    ok = row;
#pragma omp for schedule(dynamic, kShare)
    for (int64_t f = 0; f < in.gradient.positions; ++f) {
      if (!ok) continue;
      const int64_t begin = in.gradient.row_ptr[f], count = in.gradient.row_ptr[f + 1] - begin;
      sum_of_rows(in.source, in.source_stride, in.gradient.index + begin, in.gradient.value + begin, count,
                  nullptr, in.width, row);
      adam_row(in, row, in.weight + f * in.width, in.mean + f * in.width, in.square + f * in.width);
    }
    std::free(row);
  }
  return {ok ? Outcome::ok : Outcome::out_of_memory};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
