// edge_scores: out[t, e] += value[e] * gradient[t, p] . w_dec[index[e]] for every entry e at a position p of t.
// Layout: a position's decoder rows are transposed into panels, [width, kPanel], that every group of targets runs
// over; gradient rows in place. For few targets, or few entries as errors have, decoder rows in place too.
// Bytes: a decoder row once per position, a gradient row once per block of panels, or per kDotColumns of few
// entries. Parallel over positions: every element of out has one owner.
#include <cstdlib>

#include "cpu/dot.h"
#include "cpu/ops.h"
#include "cpu/tile.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {
namespace {

constexpr int64_t kTargets = 6;             // per tile
constexpr int64_t kTargetList = 256;        // whose rows are looked up together
constexpr int64_t kFewTargets = 32;         // up to here dot products beat panels: no transposing,
constexpr int64_t kFewEntries = 4;          // no empty lanes
constexpr int64_t kPanelFloats = 48 << 10;  // of all panels in memory at once, at least one panel

// Rows of the targets that reach one position.
struct Reaching {
  int64_t count;
  const float* gradient[kTargetList];
  float* out[kTargetList];
};

// Fill `reaching` with targets from t on; return the first target not looked at.
int64_t next_targets(const EdgeScoresInput& in, int64_t position, int64_t t, Reaching& reaching) {
  reaching.count = 0;
  for (; t < in.targets && reaching.count < kTargetList; ++t) {
    const int64_t row = in.prefix_ptr[t] + position;
    if (row >= in.prefix_ptr[t + 1]) continue;
    reaching.gradient[reaching.count] = in.gradient + row * in.gradient_stride;
    reaching.out[reaching.count++] = in.out + t * in.out_stride;
  }
  return t;
}

// Transpose decoder rows of the entries begin .. end: [panels, width, kPanel]. Missing ones repeat the last.
template <class W>
void transpose_rows(const EdgeScoresInput& in, int64_t begin, int64_t end, float* __restrict panels) {
  constexpr int64_t kBlock = 64;  // lines of a panel that are filled together
  const W* w = static_cast<const W*>(in.w_dec.data);
  const int64_t width = in.w_dec.width;
  for (int64_t first = begin; first < end; first += kPanel, panels += width * kPanel)
    for (int64_t k0 = 0; k0 < width; k0 += kBlock)
      for (int64_t e = 0; e < kPanel; e += 8) {
        const W* row[8];
        for (int64_t r = 0; r < 8; ++r)
          row[r] = w + in.features.index[smaller(first + e + r, end - 1)] * in.w_dec.row_stride;
        const int64_t stop = smaller(k0 + kBlock, width);
        int64_t k = k0;
        for (; k + 8 <= stop; k += 8) transpose_eight(row, k, panels + k * kPanel + e, kPanel);
        for (; k < stop; ++k)
          for (int64_t r = 0; r < 8; ++r) panels[k * kPanel + e + r] = load_one(row[r] + k);
      }
}

// products[r, 0 .. kPanel) = sum over k of gradient[r][k] * panel[k]
void panel_tile(int64_t width, const float* const* gradient, const float* __restrict panel,
                float* __restrict products) {
  Vec sums[kTargets][kTileVecs] = {};
  for (int64_t k = 0; k < width; ++k) {
    Vec line[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) line[v] = load(panel + k * kPanel + v * kLanes);
    for (int r = 0; r < kTargets; ++r) {
      const Vec factor = splat(gradient[r][k]);
      for (int v = 0; v < kTileVecs; ++v) sums[r][v] += factor * line[v];
    }
  }
  for (int r = 0; r < kTargets; ++r)
    for (int v = 0; v < kTileVecs; ++v) store(products + r * kPanel + v * kLanes, sums[r][v]);
}

// Add the scores of targets and entries begin .. end. Missing targets repeat the last one and are not written.
void add_scores(const EdgeScoresInput& in, const float* const* gradient, float* const* out, int64_t targets,
                int64_t begin, int64_t end, const float* panels) {
  alignas(64) float products[kTargets * kPanel];
  const float* rows[kTargets];
  for (int64_t r = 0; r < kTargets; ++r) rows[r] = gradient[smaller(r, targets - 1)];
  for (int64_t first = begin; first < end; first += kPanel, panels += in.w_dec.width * kPanel) {
    panel_tile(in.w_dec.width, rows, panels, products);
    for (int64_t t = 0; t < targets; ++t)
      for (int64_t e = first; e < smaller(first + kPanel, end); ++e)
        out[t][e] += in.features.value[e] * products[t * kPanel + e - first];
  }
}

// products[c * kDotRows + r] of `columns` decoder rows and kDotRows gradients.
template <int Columns, class W>
void products_of(int64_t columns, int64_t width, const float* const* gradient, const W* const* w_dec,
                 float* products) {
  if (columns == Columns)
    dot_tile<Columns>(width, gradient, w_dec, products);
  else if constexpr (Columns > 1)
    products_of<Columns - 1>(columns, width, gradient, w_dec, products);
}

// Decoder rows of some entries, and of the next ones, which other targets' products give time to fetch.
template <class W>
struct DecoderRows {
  int64_t begin, columns, next;
  const W* row[2 * kDotColumns];
};

template <class W>
DecoderRows<W> decoder_rows(const EdgeScoresInput& in, int64_t begin, int64_t end) {
  DecoderRows<W> rows{begin, smaller(kDotColumns, end - begin), smaller(2 * kDotColumns, end - begin), {}};
  for (int64_t c = 0; c < rows.next; ++c)
    rows.row[c] = static_cast<const W*>(in.w_dec.data) + in.features.index[begin + c] * in.w_dec.row_stride;
  return rows;
}

// Fetch a share of the next rows.
template <class W>
void fetch_ahead(const DecoderRows<W>& rows, int64_t share, int64_t shares, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(W);
  const int64_t length = round_up((width + shares - 1) / shares, kLine), begin = share * length;
  for (int64_t c = rows.columns; c < rows.next; ++c)
    for (int64_t k = begin; k < smaller(begin + length, width); k += kLine) __builtin_prefetch(rows.row[c] + k);
}

// Add the scores of some entries and all listed targets.
template <class W>
void add_scores(const EdgeScoresInput& in, const DecoderRows<W>& rows, const Reaching& reaching) {
  for (int64_t t = 0; t < reaching.count; t += kDotRows) {
    const float* gradient[kDotRows];
    float products[kDotColumns * kDotRows];
    for (int64_t r = 0; r < kDotRows; ++r) gradient[r] = reaching.gradient[smaller(t + r, reaching.count - 1)];
    fetch_ahead(rows, t / kDotRows, (reaching.count + kDotRows - 1) / kDotRows, in.w_dec.width);
    products_of<kDotColumns>(rows.columns, in.w_dec.width, gradient, rows.row, products);
    for (int64_t r = 0; r < smaller(kDotRows, reaching.count - t); ++r)
      for (int64_t c = 0; c < rows.columns; ++c)
        reaching.out[t + r][rows.begin + c] += in.features.value[rows.begin + c] * products[c * kDotRows + r];
  }
}

// All targets that reach position p, whose decoder rows stay in place.
template <class W>
void score_in_place(const EdgeScoresInput& in, int64_t p) {
  Reaching reaching;
  for (int64_t t = 0; t < in.targets;) {
    t = next_targets(in, p, t, reaching);
    for (int64_t e = in.features.row_ptr[p]; e < in.features.row_ptr[p + 1]; e += kDotColumns)
      add_scores(in, decoder_rows<W>(in, e, in.features.row_ptr[p + 1]), reaching);
  }
}

// All targets that reach position p. panels: memory for `block` / kPanel of them.
template <class W>
void score_position(const EdgeScoresInput& in, int64_t p, float* panels, int64_t block) {
  const int64_t stop = in.features.row_ptr[p + 1];
  if (in.targets <= kFewTargets || stop - in.features.row_ptr[p] <= kFewEntries) return score_in_place<W>(in, p);
  Reaching reaching;
  for (int64_t begin = in.features.row_ptr[p]; begin < stop; begin += block) {
    const int64_t end = smaller(begin + block, stop);
    bool transposed = false;
    for (int64_t t = 0; t < in.targets;) {
      t = next_targets(in, p, t, reaching);
      if (reaching.count && !transposed) transpose_rows<W>(in, begin, end, panels);
      transposed = transposed || reaching.count;
      for (int64_t i = 0; i < reaching.count; i += kTargets)
        add_scores(in, reaching.gradient + i, reaching.out + i, smaller(kTargets, reaching.count - i), begin, end,
                   panels);
    }
  }
}

}  // namespace

Status edge_scores(const EdgeScoresInput& in) {
  const bool half = in.w_dec.element == Element::bfloat16;
  const int64_t positions = in.features.positions, threads = larger(1, smaller(in.threads, positions));
  const int64_t width = larger(1, in.w_dec.width), block = larger(1, kPanelFloats / (width * kPanel)) * kPanel;
  // Neighbours share lines of out, so a thread takes several in a row; a few shares each, since later positions
  // have fewer targets.
  const int64_t share = larger(1, smaller(8, positions / (4 * threads)));
  bool ok = true;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(&& : ok)
  {
    float* panels = static_cast<float*>(std::aligned_alloc(64, round_up(sizeof(float) * width * block, 64)));
    ok = panels;
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < positions; first += share)
      for (int64_t p = first; ok && p < smaller(first + share, positions); ++p)
        half ? score_position<uint16_t>(in, p, panels, block) : score_position<float>(in, p, panels, block);
    std::free(panels);
  }
  return {ok ? Outcome::ok : Outcome::out_of_memory};
}

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
