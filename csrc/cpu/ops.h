// The entry points of one ISA, declared once: each <op>.cpp defines its own.
#pragma once
#include "cpu/isa.h"
#include "cpu/op_table.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {

Rate multiply_adds(int64_t rounds, int threads);
Rate stream_read(const float* data, int64_t count, int threads);
EncodeResult encode(const EncodeInput& in);
void encode_free(EncodeResult& result);
Status decode(const DecodeInput& in);
Status attend_back(const AttendBackInput& in);
Status edge_scores(const EdgeScoresInput& in);
Status influence(const InfluenceInput& in);
Status reconstruct(const ReconstructInput& in);
Status adam(const AdamInput& in);
Status product(const ProductInput& in);
Status product_of_parts(const ProductInput& in);

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
