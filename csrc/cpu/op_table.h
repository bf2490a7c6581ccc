// The five operations, the matrix product, and two that measure the machine, as one table of functions. Every
// ISA compiles its own table; select.cpp picks one.
#pragma once
#include <cstdint>

#include "status.h"
#include "tensor.h"

namespace pycircuit {

struct EncodeInput {
  const float* x;  // [positions, width], rows x_stride apart
  int64_t positions, width, x_stride;
  Weights w_enc;  // [features, 1, width]
  const float* b_enc;
  const float* threshold;  // [features], or one value when threshold_stride is 0; ignored by top_k
  int64_t threshold_stride;
  int64_t top_k;  // 0: every feature above its threshold
  bool keep_negative;
  int64_t first_position;  // positions before it have no features
  int threads;
};

// Sparse output of unknown size: the caller reads the counts, allocates, copies and frees.
struct EncodeResult {
  Status status;
  int64_t positions;
  int64_t* row_ptr;  // [positions + 1]
  int64_t* index;    // [row_ptr[positions]]
  float* value;
  int64_t workspace_bytes;  // most scratch memory in use at any time, the result excluded
};

struct DecodeInput {
  SparseFeatures features;
  Weights w_dec;      // [features, slots, width]
  const float* bias;  // [slots, width] or null
  float* out;         // [slots, positions, width]
  int threads;
};

struct AttendBackInput {
  const float* y;             // [rows, heads, width], contiguous
  const int64_t* prefix_ptr;  // [targets + 1]
  int64_t targets, heads, kv_heads, width;
  float* z;  // [rows, kv_heads, width], contiguous

  const float* pattern;  // [heads, positions, positions], contiguous, or null: recompute from here on
  int64_t positions;
  const float* query;        // [heads, positions, qk_width]
  const float* key;          // [kv_heads, positions, qk_width]
  const float* log_sum_exp;  // [heads, positions], sinks included
  int64_t qk_width;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none; else i - j < window
  int threads;
  int parts;  // of every number in bfloat16, 1 or 2; 0: the numbers themselves
};

struct EdgeScoresInput {
  const float* gradient;  // [rows, width], rows gradient_stride apart
  int64_t gradient_stride;
  const int64_t* prefix_ptr;  // [targets + 1]
  int64_t targets;
  SparseFeatures features;
  Weights w_dec;  // [features, 1, width]
  float* out;     // [targets, entries], rows out_stride apart, added to
  int64_t out_stride;
  int threads;
};

struct InfluenceInput {
  const float* rows;  // [stored, columns], rows row_stride apart
  int64_t count, columns, row_stride;
  const int64_t* node;   // [count] the column that row r explains, or -1 for an output
  const float* weight;   // [count] where influence enters
  const int64_t* order;  // [count] which stored row comes r-th, or null: as they lie
  float* influence;      // [columns]
  int threads;
};

// One layer of a training step: the error of a reconstruction and what its gradient needs.
struct ReconstructInput {
  SparseFeatures features;
  const float* w_dec;  // [features, width], rows w_dec_stride apart
  int64_t w_dec_stride, width;
  const float* bias;    // [width]
  const float* target;  // [positions, width], rows target_stride apart
  int64_t target_stride;
  float scale;            // of the error in the gradient
  float* gradient;        // [positions, width]
  float* value_gradient;  // [entries] the products of the gradient and the decoder rows
  float* squares;         // [positions, 2] of the error, of the target
  int threads;
};

// Adam's step of rows whose gradients are sums of source rows: features of a "position" are source rows.
struct AdamInput {
  float *weight, *mean, *square;  // [rows, width], contiguous
  SparseFeatures gradient;
  const float* source;  // rows source_stride apart
  int64_t source_stride, width;
  float rate;                      // over the bias of the mean
  float mean_share, square_share;  // of the gradient in the moments, 1 - beta
  float correction, epsilon;       // correction: the root of the square's bias
  int threads;
};

struct ProductInput {
  const float* a;  // [rows, depth], rows a_stride apart
  int64_t rows, depth, a_stride;
  const float* b;  // [depth, columns], or [columns, depth] when b_transposed; rows b_stride apart
  int64_t columns, b_stride;
  bool b_transposed;
  const float* divisor;  // [rows], by which a is divided, or null
  float* out;            // [rows, columns], rows out_stride apart
  int64_t out_stride;
  bool add;  // to out
  int threads;
  int parts;  // of every number in bfloat16; 0: the numbers themselves
};

// Work of a call that measures a rate: operations or bytes, and a sum of what it computed or read.
struct Rate {
  double work;
  float sum;
};

struct OpTable {
  const char* isa;
  Rate (*multiply_adds)(int64_t rounds, int threads);
  Rate (*stream_read)(const float* data, int64_t count, int threads);
  EncodeResult (*encode)(const EncodeInput&);
  void (*encode_free)(EncodeResult&);
  Status (*decode)(const DecodeInput&);
  Status (*attend_back)(const AttendBackInput&);
  Status (*edge_scores)(const EdgeScoresInput&);
  Status (*influence)(const InfluenceInput&);
  Status (*reconstruct)(const ReconstructInput&);
  Status (*adam)(const AdamInput&);
  Status (*product)(const ProductInput&);
};

// ISAs of this binary, best last, and if this machine can run each (select.cpp).
struct IsaEntry {
  const OpTable* table;
  bool supported;
};
int isa_count();
IsaEntry isa_entry(int i);

}  // namespace pycircuit
