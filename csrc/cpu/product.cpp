// product: out[i, j] (+)= sum over k of a[i, k] / divisor[i] * b[k, j].
// Layout: a block of the depth at a time, a in strips of rows, [strips, depth, kTileRows], b in panels of columns,
// [panels, depth, kPanel]; out in place. Every element is one sum in the order of k, whatever is computed with it.
// Bytes: a and b once to be packed, out once a block of the depth. Parallel over blocks of rows, where there are
// enough of them: b is packed for all threads, a by each. Otherwise over groups of panels, the other way round.
#include <omp.h>
#include <unistd.h>

#include <cstdlib>

#include "cpu/ops.h"
#include "cpu/tile.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kStripSlack = 16;       // floats past the end of a strip that packing may write
constexpr int64_t kGroupPanels = 8;       // packed together: neighbours in the rows of b
constexpr int64_t kRowsAhead = 8;         // of b, which lie in other pages, where no prefetcher follows
constexpr int64_t kSerialWork = 1 << 19;  // multiply-adds that are not worth another thread

int64_t cache_bytes([[maybe_unused]] int name, int64_t otherwise) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const int64_t bytes = sysconf(name);
  return bytes > 0 ? bytes : otherwise;
#else
  return otherwise;
#endif
}

#if defined(_SC_LEVEL1_DCACHE_SIZE)
constexpr int kCacheNames[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
#else
constexpr int kCacheNames[] = {0, 0, 0};
#endif

// Quarters of the first cache that a panel may fill. Vectors of AVX-512 do so much with a line of it that the
// second cache follows, and a deeper block visits out less often.
constexpr int64_t kPanelQuarters = kLanes == 16 ? 6 : 3;

// Sizes of blocks: a panel stays near the first cache, a block of strips in the second, all panels in the third.
struct Blocks {
  int64_t depth, strips, panels;
};

Blocks cache_blocks() {
  const int64_t first = cache_bytes(kCacheNames[0], 32 << 10), second = cache_bytes(kCacheNames[1], 512 << 10),
                third = cache_bytes(kCacheNames[2], 8 << 20);
  const int64_t depth = larger(64, first * kPanelQuarters / 4 / (kPanel * sizeof(float)) / 8 * 8);
  const int64_t line = depth * static_cast<int64_t>(sizeof(float));
  return {depth, larger(2, second / 2 / (line * kTileRows)), larger(8, third / 4 / (line * kPanel))};
}

// Strips of a product differ by one row at most.
struct Shape {
  int64_t strips, panels, depth, strip_size, panel_size;  // depth: of a block; sizes in floats
};

Shape shape_of(const ProductInput& in, const Blocks& blocks) {
  const int64_t depths = larger(1, (in.depth + blocks.depth - 1) / blocks.depth);
  const int64_t depth = larger(8, round_up((in.depth + depths - 1) / depths, 8));
  return {(in.rows + kTileRows - 1) / kTileRows, (in.columns + kPanel - 1) / kPanel, depth,
          depth * kTileRows + kStripSlack, depth * kPanel};
}

int64_t strip_row(const ProductInput& in, const Shape& shape, int64_t strip) {
  return strip * in.rows / shape.strips;
}

// Rows of a strip and a block of the depth from k0 on, transposed: [depth, kTileRows]. Missing rows repeat the
// last.
void pack_strip(const ProductInput& in, const Shape& shape, int64_t strip, int64_t k0, int64_t depth,
                float* __restrict out) {
  constexpr int64_t kRows = (kTileRows + 7) / 8 * 8;
  const int64_t first = strip_row(in, shape, strip), last = strip_row(in, shape, strip + 1) - 1;
  const float* row[kRows];
  float divisor[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    row[r] = in.a + smaller(first + r, last) * in.a_stride + k0;
    divisor[r] = in.divisor ? in.divisor[smaller(first + r, last)] : 1.f;
  }
  alignas(64) float quotient[8][8];
  const float* quotients[8];
  for (int r = 0; r < 8; ++r) quotients[r] = quotient[r];
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8)
    for (int64_t r = kRows - 8; r >= 0; r -= 8) {
      float* to = out + k * kTileRows + r;
      if (!in.divisor) {
        transpose_eight(row + r, k, to, kTileRows);
        continue;
      }
      for (int i = 0; i < 8; ++i)
        for (int c = 0; c < 8; ++c) quotient[i][c] = row[r + i][k + c] / divisor[r + i];
      transpose_eight(quotients, 0, to, kTileRows);
    }
  for (; k < depth; ++k)
    for (int64_t r = 0; r < kTileRows; ++r)
      out[k * kTileRows + r] = in.divisor ? row[r][k] / divisor[r] : row[r][k];
}

// Panels begin .. end of b and a block of the depth from k0 on. Columns past the last are zeros.
void pack_panels(const ProductInput& in, const Shape& shape, int64_t begin, int64_t end, int64_t k0, int64_t depth,
                 float* __restrict out) {
  if (in.b_transposed) {
    for (int64_t p = begin; p < end; ++p, out += shape.panel_size)
      transpose(in.b + p * kPanel * in.b_stride + k0, in.b_stride, smaller(kPanel, in.columns - p * kPanel), depth,
                out, kPanel);
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = in.b + (k0 + k) * in.b_stride;
    float* to = out + k * kPanel;
    for (int64_t p = begin; p < end; ++p, to += shape.panel_size) {
      if (k + kRowsAhead < depth) __builtin_prefetch(row + kRowsAhead * in.b_stride + p * kPanel);
      const int64_t count = in.columns - p * kPanel;
      if (count >= kPanel)
        std::memcpy(to, row + p * kPanel, sizeof(float) * kPanel);
      else
        for (int64_t c = 0; c < kPanel; ++c) to[c] = c < count ? row[p * kPanel + c] : 0.f;
    }
  }
}

template <int Rows>
void tile_rows(int64_t rows, bool fresh, int64_t depth, const float* strip, const float* panel, float* out,
               int64_t out_row) {
  if (rows == Rows) {
    for (int r = 0; r < Rows; ++r) __builtin_prefetch(out + r * out_row + kPanel - 1, 1);
    if (fresh)
      tile<Rows, kTileVecs, true>(depth, strip, 1, kTileRows, panel, kPanel, out, out_row);
    else
      tile<Rows, kTileVecs>(depth, strip, 1, kTileRows, panel, kPanel, out, out_row);
  } else if constexpr (Rows > 1) {
    tile_rows<Rows - 1>(rows, fresh, depth, strip, panel, out, out_row);
  }
}

// Add the product of a strip and a panel (fresh: write it), the last columns through a copy.
void add_tile(const ProductInput& in, const Shape& shape, int64_t strip, int64_t panel, bool fresh, int64_t depth,
              const float* left, const float* right) {
  const int64_t first = strip_row(in, shape, strip), rows = strip_row(in, shape, strip + 1) - first;
  const int64_t columns = smaller(kPanel, in.columns - panel * kPanel);
  float* out = in.out + first * in.out_stride + panel * kPanel;
  if (columns == kPanel) return tile_rows<kTileRows>(rows, fresh, depth, left, right, out, in.out_stride);
  alignas(64) float copy[kTileRows * kPanel];
  tile_rows<kTileRows>(rows, true, depth, left, right, copy, kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      float* to = out + r * in.out_stride + c;
      *to = (fresh ? 0.f : *to) + copy[r * kPanel + c];
    }
}

// A block of out; packed memory begins with its first strip and panel.
struct Range {
  int64_t strip, strips_end, panel, panels_end;
};

void add_block(const ProductInput& in, const Shape& shape, const Range& range, bool fresh, int64_t depth,
               const float* strips, const float* panels) {
  for (int64_t p = range.panel; p < range.panels_end; ++p, panels += shape.panel_size) {
    const float* strip = strips;
    for (int64_t s = range.strip; s < range.strips_end; ++s, strip += shape.strip_size)
      add_tile(in, shape, s, p, fresh, depth, strip, panels);
  }
}

float* allocate(int64_t floats) {
  return static_cast<float*>(std::aligned_alloc(64, round_up(larger(1, floats) * sizeof(float), 64)));
}

// Many rows: all threads pack the panels; each then takes a block of strips at a time and packs it.
bool multiply_rows(const ProductInput& in, const Shape& shape, const Blocks& blocks, int threads) {
  const int64_t all = smaller(shape.panels, blocks.panels), own = blocks.strips * shape.strip_size;
  float* memory = allocate(all * shape.panel_size + threads * round_up(own, 16));
  if (!memory) return false;
#pragma omp parallel num_threads(threads)
  {
    float* strips = memory + all * shape.panel_size + omp_get_thread_num() * round_up(own, 16);
    for (int64_t p0 = 0; p0 < shape.panels; p0 += all)
      for (int64_t k0 = 0; k0 == 0 || k0 < in.depth; k0 += shape.depth) {
        const int64_t p1 = smaller(p0 + all, shape.panels), depth = smaller(shape.depth, in.depth - k0);
        const bool fresh = k0 == 0 && !in.add;
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = p0; p < p1; p += kGroupPanels)
          pack_panels(in, shape, p, smaller(p + kGroupPanels, p1), k0, depth,
                      memory + (p - p0) * shape.panel_size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t s0 = 0; s0 < shape.strips; s0 += blocks.strips) {
          const int64_t s1 = smaller(s0 + blocks.strips, shape.strips);
          for (int64_t s = s0; s < s1; ++s)
            pack_strip(in, shape, s, k0, depth, strips + (s - s0) * shape.strip_size);
          add_block(in, shape, {s0, s1, p0, p1}, fresh, depth, strips, memory);
        }
      }
  }
  std::free(memory);
  return true;
}

// Few rows: all threads pack the strips; each then takes a group of panels at a time and packs it.
bool multiply_columns(const ProductInput& in, const Shape& shape, const Blocks& blocks, int threads) {
  const int64_t groups = round_up((shape.panels + kGroupPanels - 1) / kGroupPanels, threads);
  const int64_t all = round_up(shape.strips * shape.strip_size, 16), own = kGroupPanels * shape.panel_size;
  float* memory = allocate(all + threads * own);
  if (!memory) return false;
#pragma omp parallel num_threads(threads)
  {
    float* panels = memory + all + omp_get_thread_num() * own;
    for (int64_t k0 = 0; k0 == 0 || k0 < in.depth; k0 += shape.depth) {
      const int64_t depth = smaller(shape.depth, in.depth - k0);
      const bool fresh = k0 == 0 && !in.add;
#pragma omp for schedule(dynamic, 1)
      for (int64_t s = 0; s < shape.strips; ++s)
        pack_strip(in, shape, s, k0, depth, memory + s * shape.strip_size);
#pragma omp for schedule(dynamic, 1)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t p0 = g * shape.panels / groups, p1 = (g + 1) * shape.panels / groups;
        pack_panels(in, shape, p0, p1, k0, depth, panels);
        for (int64_t s0 = 0; s0 < shape.strips; s0 += blocks.strips)
          add_block(in, shape, {s0, smaller(s0 + blocks.strips, shape.strips), p0, p1}, fresh, depth,
                    memory + s0 * shape.strip_size, panels);
      }
    }
  }
  std::free(memory);
  return true;
}

}  // namespace

Status product(const ProductInput& in) {
  if (in.parts) return product_of_parts(in);
  if (in.rows == 0 || in.columns == 0) return {};
  static const Blocks blocks = cache_blocks();
  const Shape shape = shape_of(in, blocks);
  const int64_t work = in.rows * in.columns * larger(1, in.depth);
  const int threads = static_cast<int>(larger(1, smaller(in.threads, work / kSerialWork)));
  const bool tall = shape.strips >= 2 * threads * blocks.strips;
  const bool ok = tall ? multiply_rows(in, shape, blocks, threads) : multiply_columns(in, shape, blocks, threads);
  return {ok ? Outcome::ok : Outcome::out_of_memory};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
