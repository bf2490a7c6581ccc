// Products of float32 numbers as sums of bfloat16 numbers, their parts, by instructions that multiply bfloat16 and
// add in float32: tiles of AMX, or vectors of AVX512_BF16. A number has 24 bits and a part 8: three parts are the
// number, and the products of parts i and j with i + j < parts are those that a sum of this precision can see.
// That is so from 1e-33 to 3e38; the parts of infinity add to NaN. Layout: strips of kBlock rows and panels of
// kBlock columns, both in steps of kStep along the sum, a step of every part after the other: two tiles, 16 rows
// of a strip by 32, or 32 of the sum by 16 columns of a panel in pairs.
#pragma once
#include "cpu/isa.h"

#if defined(__AVX512BF16__)
#define PYCIRCUIT_PARTS 1

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kBlock = 32;                // rows of a strip, columns of a panel
constexpr int64_t kStep = 32;                 // along the sum
constexpr int64_t kTileSize = 16 * kStep;     // bfloat16 numbers
constexpr int64_t kPartSize = 2 * kTileSize;  // of a step of one part

typedef uint16_t Part;

// Write the parts of 32 numbers, in order.
template <int Parts>
inline void split(__m512 low, __m512 high, __m512i* parts) {
#pragma GCC unroll 3
  for (int p = 0; p < Parts; ++p) {
    parts[p] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    if (p + 1 == Parts) break;
    const __m512i left = _mm512_maskz_cvtepu16_epi32(0xffff, _mm512_castsi512_si256(parts[p]));
    const __m512i right = _mm512_maskz_cvtepu16_epi32(0xffff, _mm512_extracti64x4_epi64(parts[p], 1));
    low -= reinterpret_cast<__m512>(_mm512_maskz_slli_epi32(0xffff, left, 16));
    high -= reinterpret_cast<__m512>(_mm512_maskz_slli_epi32(0xffff, right, 16));
  }
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// Sixteen numbers, or fewer and zeros.
inline __m512 load_some(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }

// One row of a strip: `depth` numbers, divided, and zeros up to a whole step. out: the row's first place.
template <int Parts>
inline void pack_row(const float* __restrict row, int64_t depth, float divisor, Part* __restrict out) {
  for (int64_t k = 0; k < depth; k += kStep, out += Parts * kPartSize) {
    __m512 low = load_some(row + k, depth - k), high = load_some(row + k + 16, depth - k - 16);
    if (divisor != 1.f) {
      low = _mm512_maskz_div_ps(first_lanes(depth - k), low, _mm512_set1_ps(divisor));
      high = _mm512_maskz_div_ps(first_lanes(depth - k - 16), high, _mm512_set1_ps(divisor));
    }
    __m512i parts[Parts];
    split<Parts>(low, high, parts);
    for (int p = 0; p < Parts; ++p) _mm512_store_si512(out + p * kPartSize, parts[p]);
  }
}

// Rows of a strip; missing ones are zeros. divisor: one for each row, or null.
template <int Parts>
void pack_strip(const float* rows, int64_t stride, int64_t count, int64_t depth, const float* divisor, Part* out) {
  for (int64_t r = 0; r < kBlock; ++r)
    if (r < count)
      pack_row<Parts>(rows + r * stride, depth, divisor ? divisor[r] : 1.f, out + r * kStep);
    else
      for (int64_t k = 0; k < depth; k += kStep)
        for (int p = 0; p < Parts; ++p)
          std::memset(out + (k / kStep * Parts + p) * kPartSize + r * kStep, 0, sizeof(Part) * kStep);
}

// Columns of a panel from the rows along the sum; missing columns are zeros. rows: [depth, columns].
template <int Parts>
void pack_panel(const float* rows, int64_t stride, int64_t columns, int64_t depth, Part* __restrict out) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kPairs);
  for (int64_t k = 0; k < round_up(depth, kStep); k += 2)
    for (int64_t tile = 0; tile < 2; ++tile) {
      const float* row = rows + k * stride + tile * 16;
      const int64_t count = columns - tile * 16;
      __m512i parts[Parts];
      split<Parts>(load_some(row, k < depth ? count : 0), load_some(row + stride, k + 1 < depth ? count : 0),
                   parts);
      Part* to = out + k / kStep * Parts * kPartSize + tile * kTileSize + k % kStep * 16;
      for (int p = 0; p < Parts; ++p)
        _mm512_store_si512(to + p * kPartSize, _mm512_permutexvar_epi16(pairs, parts[p]));
    }
}

// Transpose a tile of 16 rows of 16 pairs, in place.
inline void transpose_pairs(Part* tile) {
  float* to = reinterpret_cast<float*>(tile);
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(to + i * 16);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
      a[i + 2 * j + 1] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88),
                 low_odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 high = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88),
                 high_odd = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_store_ps(to + i * 16, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_store_ps(to + (4 + i) * 16, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_store_ps(to + (8 + i) * 16, _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_store_ps(to + (12 + i) * 16, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

// Columns of a panel that lie in memory as rows: [columns, depth].
template <int Parts>
void pack_panel_of_rows(const float* rows, int64_t stride, int64_t columns, int64_t depth, Part* out) {
  pack_strip<Parts>(rows, stride, columns, depth, nullptr, out);
  for (int64_t tile = 0; tile < round_up(depth, kStep) / kStep * Parts * 2; ++tile)
    transpose_pairs(out + tile * kTileSize);
}

// Rows of a strip that lie in memory as columns: [depth, rows].
template <int Parts>
void pack_strip_of_columns(const float* columns, int64_t stride, int64_t count, int64_t depth, Part* out) {
  pack_panel<Parts>(columns, stride, count, depth, out);
  for (int64_t tile = 0; tile < round_up(depth, kStep) / kStep * Parts * 2; ++tile)
    transpose_pairs(out + tile * kTileSize);
}

#if defined(__AMX_BF16__)

// The eight tiles of a thread while they are in use: four of sums, two of a strip, two of a panel.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{};
    shape.palette = 1;
    for (int t = 0; t < 8; ++t) {
      shape.row_bytes[t] = 64;
      shape.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

inline void load_strip(const Part* a, int part) {
  _tile_loadd(4, a + part * kPartSize, 64);
  _tile_loadd(5, a + part * kPartSize + kTileSize, 64);
}

inline void load_panel(const Part* b, int part) {
  _tile_loadd(6, b + part * kPartSize, 64);
  _tile_loadd(7, b + part * kPartSize + kTileSize, 64);
}

inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// One step, small products before large ones.
template <int Parts>
inline void add_step(const Part* a, const Part* b) {
  for (int i = Parts - 1; i >= 0; --i) {
    load_strip(a, i);
    for (int j = Parts - i - 1; j >= 0; --j) {
      load_panel(b, j);
      add_products();
    }
  }
}

// c[kBlock, kBlock] (+)= a strip times a panel.
template <int Parts>
inline void add_block(int64_t steps, const Part* a, const Part* b, float* c, int64_t c_row, bool fresh) {
  asm volatile("" : : : "memory");  // GCC does not know that loading a tile reads memory
  const int64_t bytes = c_row * static_cast<int64_t>(sizeof(float));
  float *right = c + 16, *below = c + 16 * c_row;
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, right, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + 16, bytes);
  }
  for (int64_t s = 0; s < steps; ++s, a += Parts * kPartSize, b += Parts * kPartSize) add_step<Parts>(a, b);
  _tile_stored(0, c, bytes);
  _tile_stored(1, right, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + 16, bytes);
}

#else

struct Tiles {
  Tiles() {}  // a variable of the type is then in use
};

// c[8, kBlock] (+)= rows r0 .. r0 + 8 of a strip's tile times a panel.
template <int Parts>
inline void add_rows(int64_t steps, const Part* a, const Part* b, float* c, int64_t c_row, bool fresh) {
  constexpr int kRows = 8;
  __m512 sums[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) sums[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_row + v * 16);
  for (int64_t s = 0; s < steps; ++s, a += Parts * kPartSize, b += Parts * kPartSize)
    for (int i = Parts - 1; i >= 0; --i)
      for (int j = Parts - i - 1; j >= 0; --j)
        for (int64_t k = 0; k < kStep; k += 2) {
          const Part* line = b + j * kPartSize + k * 16;
          const __m512bh left = reinterpret_cast<__m512bh>(_mm512_load_si512(line));
          const __m512bh right = reinterpret_cast<__m512bh>(_mm512_load_si512(line + kTileSize));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            std::memcpy(&pair, a + i * kPartSize + r * kStep + k, sizeof pair);
            const __m512bh factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], factor, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], factor, right);
          }
        }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * c_row + v * 16, sums[r][v]);
}

// c[kBlock, kBlock] (+)= a strip times a panel.
template <int Parts>
inline void add_block(int64_t steps, const Part* a, const Part* b, float* c, int64_t c_row, bool fresh) {
  for (int r = 0; r < kBlock; r += 8) add_rows<Parts>(steps, a + r * kStep, b, c + r * c_row, c_row, fresh);
}

#endif

// The first rows and columns of such a block, through a copy where there are fewer than kBlock.
template <int Parts>
inline void add_some(int64_t steps, const Part* a, const Part* b, float* c, int64_t c_row, int64_t rows,
                     int64_t columns, bool fresh) {
  if (rows == kBlock && columns == kBlock) return add_block<Parts>(steps, a, b, c, c_row, fresh);
  alignas(64) float copy[kBlock * kBlock] = {};
  for (int64_t r = 0; r < rows && !fresh; ++r)
    std::memcpy(copy + r * kBlock, c + r * c_row, sizeof(float) * columns);
  add_block<Parts>(steps, a, b, copy, kBlock, fresh);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * c_row, copy + r * kBlock, sizeof(float) * columns);
}

}  // namespace
}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
#endif
