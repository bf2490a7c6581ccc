// product_of_parts: out[i, j] (+)= sum over k of a[i, k] / divisor[i] * b[k, j], each number in bfloat16 parts
// (parts.h). Layout: a block of the depth at a time, b in panels, [panels, steps, parts, 2 tiles]; some strips of
// a a thread, likewise; out in place. Every element is one sum in the order of k, whatever is computed with it.
// Bytes: a and b once to be packed, out once a block of the depth. Parallel over blocks of strips and panels.
#include <cstdlib>

#include "cpu/ops.h"
#include "cpu/parts.h"

namespace pycircuit::PYCIRCUIT_NAMESPACE {

#if defined(PYCIRCUIT_PARTS)
namespace {

constexpr int64_t kPanelBytes = 32 << 10;  // of a block of the depth: a panel stays in the first cache
constexpr int64_t kStripsEach = 16;        // of a thread, packed at a time: they stay in the second
constexpr int64_t kSerialWork = 1 << 20;   // multiply-adds that are not worth another thread

struct Shape {
  int64_t strips, panels, steps, size;  // steps: of a block of the depth; size: of a strip or panel of as many
};

template <int Parts>
Shape shape_of(const ProductInput& in) {
  const int64_t steps = (in.depth + kStep - 1) / kStep, most = kPanelBytes / (Parts * kPartSize * sizeof(Part));
  const int64_t blocks = larger(1, (steps + most - 1) / most), each = larger(1, (steps + blocks - 1) / blocks);
  return {(in.rows + kBlock - 1) / kBlock, (in.columns + kBlock - 1) / kBlock, each, each * Parts * kPartSize};
}

template <int Parts>
void pack_b(const ProductInput& in, int64_t panel, int64_t k0, int64_t depth, Part* out) {
  const int64_t c0 = panel * kBlock, columns = smaller(kBlock, in.columns - c0);
  if (in.b_transposed)
    pack_panel_of_rows<Parts>(in.b + c0 * in.b_stride + k0, in.b_stride, columns, depth, out);
  else
    pack_panel<Parts>(in.b + k0 * in.b_stride + c0, in.b_stride, columns, depth, out);
}

template <int Parts>
void multiply_block(const ProductInput& in, int64_t strip, int64_t panel, bool fresh, int64_t depth,
                    const Part* left, const Part* right) {
  float* out = in.out + strip * kBlock * in.out_stride + panel * kBlock;
  add_some<Parts>((depth + kStep - 1) / kStep, left, right, out, in.out_stride,
                  smaller(kBlock, in.rows - strip * kBlock), smaller(kBlock, in.columns - panel * kBlock), fresh);
}

template <int Parts>
Status multiply(const ProductInput& in) {
  const Shape shape = shape_of<Parts>(in);
  const int64_t work = in.rows * in.columns * larger(1, in.depth);
  const int threads = static_cast<int>(larger(1, smaller(in.threads, work / kSerialWork)));
  const int64_t chunk = smaller(shape.strips, kStripsEach * threads);
  Part* memory = static_cast<Part*>(std::aligned_alloc(64, (shape.panels + chunk) * shape.size * sizeof(Part)));
  if (!memory) return {Outcome::out_of_memory};
  Part* strips = memory + shape.panels * shape.size;
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    for (int64_t k0 = 0; k0 == 0 || k0 < in.depth; k0 += shape.steps * kStep) {
      const int64_t depth = smaller(shape.steps * kStep, in.depth - k0);
      const bool fresh = k0 == 0 && !in.add;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < shape.panels; ++p) pack_b<Parts>(in, p, k0, depth, memory + p * shape.size);
      for (int64_t s0 = 0; s0 < shape.strips; s0 += chunk) {
        const int64_t count = smaller(chunk, shape.strips - s0);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < count; ++s) {
          const int64_t r0 = (s0 + s) * kBlock;
          pack_strip<Parts>(in.a + r0 * in.a_stride + k0, in.a_stride, smaller(kBlock, in.rows - r0), depth,
                            in.divisor ? in.divisor + r0 : nullptr, strips + s * shape.size);
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < shape.panels; ++p)
          for (int64_t s = 0; s < count; ++s)
            multiply_block<Parts>(in, s0 + s, p, fresh, depth, strips + s * shape.size, memory + p * shape.size);
      }
    }
  }
  std::free(memory);
  return {};
}

}  // namespace

Status product_of_parts(const ProductInput& in) {
  if (in.rows == 0 || in.columns == 0) return {};
  if (in.parts == 1) return multiply<1>(in);
  return in.parts == 2 ? multiply<2>(in) : multiply<3>(in);
}

#else

Status product_of_parts(const ProductInput&) { return {Outcome::unsupported}; }

#endif

}  // namespace pycircuit::PYCIRCUIT_NAMESPACE
