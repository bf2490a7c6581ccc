// attend_back: z[t, j, g] = sum over the heads h of group g and over i >= j of A^h[i, j] y[t, i, h].
// Layout: y and z ragged rows in place; A one block [queries, keys] at a time, copied out of the stored
// pattern or recomputed, and used for every target at once, so making it costs 1 / targets of the product. In
// bfloat16 parts where asked (parts.h). Bytes: y once a block of keys, z once a block of queries, A (or Q, K)
// once. Parallel over (group, block of keys, share of the targets): every z has one owner.
#include <cstdlib>

#include "cpu/ops.h"
#include "cpu/parts.h"
#include "cpu/tile.h"
#include "cpu/vecmath.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kKeyBlock = 192;  // a multiple of every tile height and vector
constexpr int64_t kQueryBlock = 256;
static_assert(kQueryBlock >= kKeyBlock, "the diagonal block must reach every key");

// A block of the pattern in strips of keys, as the tile reads it: [strips, queries, kTileRows]. One target's y in
// panels of columns: [panels, queries, kPanel]. Both padded with zeros. The keys, transposed: [qk_width, keys].
// Where numbers are multiplied in parts the block is [queries, keys], and both have strips and panels of parts.h.
struct Scratch {
  float* pattern;
  float* y;
  float* keys;
  uint16_t* pattern_parts;
  uint16_t* y_parts;
};

// Queries i0 .. i0 + queries of one head, keys j0 .. j0 + keys.
struct Block {
  int64_t head, i0, queries, j0, keys;
};

// Number of keys of the block that query i attends to, from j0.
int64_t seen(const Block& b, int64_t i) { return smaller(b.keys, b.i0 + i - b.j0 + 1); }

// Copy keys begin .. end of query i into the strips, with zeros elsewhere in every strip that a tile may read.
void scatter(const float* __restrict row, int64_t begin, int64_t end, int64_t i, int64_t keys,
             float* __restrict out) {
  for (int64_t j = 0; j < keys; j += kTileRows) {
    float* strip = out + (j / kTileRows * kQueryBlock + i) * kTileRows;
    if (j >= begin && j + kTileRows <= end)
      std::memcpy(strip, row + j, sizeof(float) * kTileRows);
    else
      for (int64_t r = 0; r < kTileRows; ++r) strip[r] = j + r >= begin && j + r < end ? row[j + r] : 0.f;
  }
}

// Either way to place keys begin .. end of query i in the block.
typedef void Place(const float* row, int64_t begin, int64_t end, int64_t i, int64_t keys, float* out);

void copy_block(const AttendBackInput& in, const Block& b, Place place, float* out) {
  for (int64_t i = 0; i < b.queries; ++i)
    place(in.pattern + (b.head * in.positions + b.i0 + i) * in.positions + b.j0, 0, seen(b, i), i, b.keys, out);
}

// rows[r, j] = query[i + r] . key[j] for the keys that the last of these queries attends to
void logits(const AttendBackInput& in, const Block& b, int64_t i, const float* keys, float* __restrict rows) {
  const float* query = in.query + (b.head * in.positions + b.i0 + i) * in.qk_width;
  const int64_t count = smaller(kTileRows, b.queries - i), end = seen(b, i + count - 1);
  for (int64_t j = 0; j < end; j += kPanel) {
    if (count == kTileRows)
      tile<kTileRows, kTileVecs, true>(in.qk_width, query, in.qk_width, 1, keys + j, kKeyBlock, rows + j,
                                       kKeyBlock);
    else
      for (int64_t r = 0; r < count; ++r)
        tile<1, kTileVecs, true>(in.qk_width, query + r * in.qk_width, 0, 1, keys + j, kKeyBlock,
                                 rows + r * kKeyBlock + j, kKeyBlock);
  }
}

void recompute_block(const AttendBackInput& in, const Block& b, const float* keys, Place place, float* out) {
  alignas(64) float rows[kTileRows * kKeyBlock];
  for (int64_t i0 = 0; i0 < b.queries; i0 += kTileRows) {
    logits(in, b, i0, keys, rows);
    for (int64_t i = i0; i < smaller(i0 + kTileRows, b.queries); ++i) {
      float* row = rows + (i - i0) * kKeyBlock;
      const int64_t end = seen(b, i), hidden = in.window ? b.i0 + i - b.j0 - in.window + 1 : 0;
      const Vec lse = splat(in.log_sum_exp[b.head * in.positions + b.i0 + i]);
      for (int64_t j = 0; j < end; j += kLanes) {
        Vec logit = load(row + j) * splat(in.scale);
        if (in.softcap != 0.f) logit = splat(in.softcap) * tanh(logit / splat(in.softcap));
        store(row + j, exp(logit - lse));
      }
      place(row, hidden, end, i, b.keys, out);
    }
  }
}

void make_block(const AttendBackInput& in, const Block& b, Place place, const Scratch& s) {
  if (in.pattern)
    copy_block(in, b, place, s.pattern);
  else
    recompute_block(in, b, s.keys, place, s.pattern);
}

void pack_y(const float* __restrict y, int64_t y_step, int64_t queries, int64_t width, float* __restrict out) {
  for (int64_t c = 0; c < width; c += kPanel, out += kQueryBlock * kPanel)
    for (int64_t i = 0; i < queries; ++i)
      if (c + kPanel <= width)
        std::memcpy(out + i * kPanel, y + i * y_step + c, sizeof(float) * kPanel);
      else
        for (int64_t v = 0; v < kPanel; ++v) out[i * kPanel + v] = c + v < width ? y[i * y_step + c + v] : 0.f;
}

// Add a tile that reaches past z's rows or columns, through a copy.
void edge_tile(int64_t depth, const float* a, const float* y, float* z, int64_t z_row, int64_t rows,
               int64_t columns, bool fresh) {
  alignas(64) float product[kTileRows * kPanel];
  tile<kTileRows, kTileVecs, true>(depth, a, 1, kTileRows, y, kPanel, product, kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      z[r * z_row + c] = product[r * kPanel + c] + (fresh ? 0.f : z[r * z_row + c]);
}

// One target: z[j0 ..] += pattern^T y[i0 ..], each strip of keys from its own first query on. The diagonal block
// of the first head reaches every row of z and comes first: it writes where the others add.
void apply_block(const AttendBackInput& in, const Block& b, int64_t target, const Scratch& s) {
  const int64_t first = in.prefix_ptr[target], prefix = in.prefix_ptr[target + 1] - first;
  const int64_t keys = smaller(b.keys, prefix - b.j0), queries = smaller(b.queries, prefix - b.i0);
  const int64_t group = b.head / (in.heads / in.kv_heads), z_row = in.kv_heads * in.width;
  pack_y(in.y + ((first + b.i0) * in.heads + b.head) * in.width, in.heads * in.width, queries, in.width, s.y);
  float* z = in.z + ((first + b.j0) * in.kv_heads + group) * in.width;
  const bool fresh = b.i0 == b.j0 && b.head % (in.heads / in.kv_heads) == 0;
  for (int64_t c = 0; c < in.width; c += kPanel) {
    const float* panel = s.y + c * kQueryBlock;
    for (int64_t j = 0; j < keys; j += kTileRows) {
      const int64_t start = larger(0, b.j0 + j - b.i0);
      if (start >= queries) break;
      const float* a = s.pattern + (j / kTileRows * kQueryBlock + start) * kTileRows;
      const float* from = panel + start * kPanel;
      float* to = z + j * z_row + c;
      if (j + kTileRows > keys || c + kPanel > in.width)
        edge_tile(queries - start, a, from, to, z_row, smaller(kTileRows, keys - j), smaller(kPanel, in.width - c),
                  fresh);
      else if (fresh)
        tile<kTileRows, kTileVecs, true>(queries - start, a, 1, kTileRows, from, kPanel, to, z_row);
      else
        tile<kTileRows, kTileVecs>(queries - start, a, 1, kTileRows, from, kPanel, to, z_row);
    }
  }
}

#if defined(PYCIRCUIT_PARTS)

constexpr int64_t kQuerySteps = kQueryBlock / kStep;
static_assert(kKeyBlock % kBlock == 0 && kQueryBlock % kStep == 0, "blocks must be whole strips and steps");

// Copy keys begin .. end of query i into its row, with zeros elsewhere.
void copy_row(const float* __restrict row, int64_t begin, int64_t end, int64_t i, int64_t keys,
              float* __restrict out) {
  float* to = out + i * kKeyBlock;
  begin = larger(0, begin);
  for (int64_t j = 0; j < smaller(begin, end); ++j) to[j] = 0.f;
  if (begin < end) std::memcpy(to + begin, row + begin, sizeof(float) * (end - begin));
  for (int64_t j = end; j < keys; ++j) to[j] = 0.f;
}

// The block of the pattern, [queries, kKeyBlock], in strips of keys.
template <int Parts>
void pack_pattern(const Block& b, const float* pattern, Part* out) {
  for (int64_t j = 0; j < b.keys; j += kBlock, out += kQuerySteps * Parts * kPartSize)
    pack_strip_of_columns<Parts>(pattern + j, kKeyBlock, smaller(kBlock, b.keys - j), b.queries, out);
}

// As apply_block, in parts.
template <int Parts>
void apply_parts(const AttendBackInput& in, const Block& b, int64_t target, const Scratch& s) {
  const int64_t first = in.prefix_ptr[target], prefix = in.prefix_ptr[target + 1] - first;
  const int64_t keys = smaller(b.keys, prefix - b.j0), queries = smaller(b.queries, prefix - b.i0);
  const int64_t per_group = in.heads / in.kv_heads, z_row = in.kv_heads * in.width;
  const float* y = in.y + ((first + b.i0) * in.heads + b.head) * in.width;
  float* z = in.z + ((first + b.j0) * in.kv_heads + b.head / per_group) * in.width;
  const bool fresh = b.i0 == b.j0 && b.head % per_group == 0;
  for (int64_t c = 0; c < in.width; c += kBlock) {
    const int64_t columns = smaller(kBlock, in.width - c);
    pack_panel<Parts>(y + c, in.heads * in.width, columns, queries, s.y_parts);
    for (int64_t j = 0; j < keys; j += kBlock) {
      const int64_t step = larger(0, b.j0 + j - b.i0) / kStep;
      if (step * kStep >= queries) break;
      const Part* strip = s.pattern_parts + (j / kBlock * kQuerySteps + step) * Parts * kPartSize;
      add_some<Parts>((queries + kStep - 1) / kStep - step, strip, s.y_parts + step * Parts * kPartSize,
                      z + j * z_row + c, z_row, smaller(kBlock, keys - j), columns, fresh);
    }
  }
}

template <int Parts>
void run_block(const AttendBackInput& in, const Block& b, int64_t t0, int64_t t1, const Scratch& s) {
  make_block(in, b, copy_row, s);
  const Tiles tiles;
  pack_pattern<Parts>(b, s.pattern, s.pattern_parts);
  for (int64_t t = t0; t < t1; ++t)
    if (in.prefix_ptr[t + 1] - in.prefix_ptr[t] > b.i0) apply_parts<Parts>(in, b, t, s);
}

#else

template <int Parts>
void run_block(const AttendBackInput&, const Block&, int64_t, int64_t, const Scratch&) {}

#endif

template <>
void run_block<0>(const AttendBackInput& in, const Block& b, int64_t t0, int64_t t1, const Scratch& s) {
  make_block(in, b, scatter, s);
  for (int64_t t = t0; t < t1; ++t)
    if (in.prefix_ptr[t + 1] - in.prefix_ptr[t] > b.i0) apply_block(in, b, t, s);
}

// Targets t0 .. t1, keys j0 .. of one group.
struct Task {
  int64_t group, j0, t0, t1;
};

void run_task(const AttendBackInput& in, const Task& task, const Scratch& s) {
  int64_t longest = 0;
  for (int64_t t = task.t0; t < task.t1; ++t) longest = larger(longest, in.prefix_ptr[t + 1] - in.prefix_ptr[t]);
  const int64_t per_group = in.heads / in.kv_heads, keys = smaller(kKeyBlock, longest - task.j0);
  const int64_t reach = in.window ? smaller(longest, task.j0 + kKeyBlock + in.window - 1) : longest;
  if (!in.pattern)
    transpose(in.key + (task.group * in.positions + task.j0) * in.qk_width, in.qk_width, keys, in.qk_width, s.keys,
              kKeyBlock);
  for (int64_t head = task.group * per_group; head < (task.group + 1) * per_group; ++head)
    for (int64_t i0 = task.j0; i0 < reach; i0 += kQueryBlock) {
      const Block b{head, i0, smaller(kQueryBlock, reach - i0), task.j0, keys};
      const auto run = in.parts == 0 ? run_block<0> : in.parts == 1 ? run_block<1> : run_block<2>;
      run(in, b, task.t0, task.t1, s);
    }
}

}  // namespace

Status attend_back(const AttendBackInput& in) {
  int64_t longest = 0;
  for (int64_t t = 0; t < in.targets; ++t) longest = larger(longest, in.prefix_ptr[t + 1] - in.prefix_ptr[t]);
  const int64_t blocks = (longest + kKeyBlock - 1) / kKeyBlock;
  // Enough tasks for every thread, but a block of the pattern is worth its cost only for 16 targets or more.
  const int64_t wanted = larger(1, 4 * in.threads / larger(1, blocks * in.kv_heads));
  const int64_t shares = larger(1, smaller(wanted, in.targets / 16)),
                per_share = (in.targets + shares - 1) / shares;
  const int64_t tasks = blocks * in.kv_heads * shares,
                y_size = in.parts ? 0 : kQueryBlock * round_up(in.width, kPanel);
  bool ok = true;
#if !defined(PYCIRCUIT_PARTS)
  if (in.parts) return {Outcome::unsupported};
#endif
#pragma omp parallel num_threads(static_cast<int>(larger(1, smaller(in.threads, tasks))))
  {
    // Strips and one panel in parts, each of half a float.
    const int64_t pattern_size = kQueryBlock * kKeyBlock, keys_size = in.qk_width * kKeyBlock;
    const int64_t parts_size = (pattern_size + kQueryBlock * 32) * in.parts / 2;
    const int64_t size = pattern_size + y_size + keys_size + parts_size;
    float* memory = static_cast<float*>(std::aligned_alloc(64, round_up(sizeof(float) * size, 64)));
    float* keys = memory + pattern_size + y_size;
    uint16_t* parts = reinterpret_cast<uint16_t*>(keys + keys_size);
    const Scratch scratch{memory, memory + pattern_size, keys, parts, parts + pattern_size * in.parts};
    // The first blocks of keys have the most queries, so they go first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; ++n) {
      const int64_t share = n % shares, block = n / shares, t0 = share * per_share;
      const Task task{block % in.kv_heads, block / in.kv_heads * kKeyBlock, t0,
                      smaller(t0 + per_share, in.targets)};
      if (memory) {
        run_task(in, task, scratch);
      } else {
#pragma omp atomic write
        ok = false;
      }
    }
    std::free(memory);
  }
  return {ok ? Outcome::ok : Outcome::out_of_memory};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
