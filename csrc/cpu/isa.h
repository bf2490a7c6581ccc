// Per-ISA names and vectors. Everything in an ISA's files lives in a namespace of its own and has internal
// linkage where it is a template: one weak symbol compiled for AVX-512 would be shared with the baseline.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PYCIRCUIT_PASTE_(a, b) a##b
#define PYCIRCUIT_PASTE(a, b) PYCIRCUIT_PASTE_(a, b)
#define PYCIRCUIT_STRING_(a) #a
#define PYCIRCUIT_STRING(a) PYCIRCUIT_STRING_(a)
#define PYCIRCUIT_NAMESPACE PYCIRCUIT_PASTE(isa_, PYCIRCUIT_ISA)

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// One hardware register of floats; arithmetic is elementwise, a * b + c fuses where the ISA has FMA.
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec splat(float s) { return s - Vec{}; }

inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const uint16_t* p) { return widen(*p); }

// bfloat16 is the upper half of a float32. GCC widens a vector of halves by unpacking and re-joining it, which
// made bfloat16 rows in cache 1.7 times as slow as the one instruction.
inline Vec load(const uint16_t* p) {
#if defined(__AVX512F__)
  // The unmasked form warns of an uninitialised variable of its own in GCC 12.
  const VecBits wide = reinterpret_cast<VecBits>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  const VecBits wide =
      reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecHalf half;
  std::memcpy(&half, p, sizeof half);
  const VecBits wide = __builtin_convertvector(half, VecBits);
#endif
  const VecBits bits = wide << 16;
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

typedef float Vec4 __attribute__((vector_size(16)));

// Lanes i, i + 4, i + 8, ... added.
inline Vec4 fold(Vec v) {
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int width = kLanes / 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

inline float sum(Vec v) {
  const Vec4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

// The sums of four vectors at once.
inline Vec4 sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Vec4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Vec4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
