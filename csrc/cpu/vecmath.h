// exp and tanh of a vector to about one unit in the last place; NaN stays NaN.
#pragma once
#include "cpu/isa.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

inline Vec choose(VecInt mask, Vec yes, Vec no) { return mask ? yes : no; }

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, ln 2 in two parts so that r is exact.
inline Vec exp(Vec x) {
  const Vec low = splat(-87.33f), high = splat(88.37f);
  const VecInt under = x < low;
  const VecInt over = x > high;
  const Vec inside = choose(under, low, choose(over, high, x));
  const Vec shift = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (inside * splat(1.44269504088896341f) + shift) - shift;
  const Vec r = (inside - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.f);
  const VecInt ok = inside == inside;  // a NaN has no exponent to shift
  const VecInt bits = (__builtin_convertvector(choose(ok, n, Vec{}), VecInt) + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  const Vec result = p * power;
  return choose(under, Vec{}, choose(over, splat(__builtin_inff()), result));
}

// An odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const Vec near = p * square * x + x;
  const Vec far = splat(1.f) - splat(2.f) / (exp(x + x) + splat(1.f));
  return choose(square < splat(0.390625f), near, far);
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
