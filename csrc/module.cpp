// The only file that knows Python. Addresses come in as integers, checked by pycircuit/ops/checks.py; the
// GIL is released around every kernel.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/op_table.h"
#ifdef PYCIRCUIT_HAS_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using namespace pycircuit;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const OpTable& table(int isa) {
  if (isa < 0 || isa >= isa_count()) throw std::out_of_range("isa: no such table in this build");
  const IsaEntry entry = isa_entry(isa);
  if (!entry.supported) throw std::runtime_error("isa: this machine cannot run " + std::string(entry.table->isa));
  return *entry.table;
}

void raise_on(const Status& status, const char* op) {
  switch (status.outcome) {
    case Outcome::ok:
      return;
    case Outcome::out_of_memory:
      throw std::bad_alloc();
    case Outcome::unsupported:
      throw std::runtime_error(std::string(op) + ": this ISA multiplies no bfloat16 parts");
    case Outcome::not_in_order:
      throw py::value_error(std::string(op) +
                            ": rows must be in layer order, outputs first, then the highest layer, got row " +
                            std::to_string(status.index) +
                            " with an edge to a node whose own row does not come later; sort them, or pass order");
  }
}

// Result of encode, whose size is not known beforehand: Python reads count, allocates, and copies out.
struct EncodeHandle {
  EncodeResult result;
  void (*release)(EncodeResult&);
  EncodeHandle(const EncodeResult& r, void (*f)(EncodeResult&)) : result(r), release(f) {}
  EncodeHandle(const EncodeHandle&) = delete;
  ~EncodeHandle() { release(result); }
  int64_t count() const { return result.row_ptr[result.positions]; }
  void copy(uintptr_t row_ptr, uintptr_t index, uintptr_t value) const {
    const size_t n = static_cast<size_t>(count());
    std::memcpy(pointer<int64_t>(row_ptr), result.row_ptr, sizeof(int64_t) * (result.positions + 1));
    if (n == 0) return;
    std::memcpy(pointer<int64_t>(index), result.index, sizeof(int64_t) * n);
    std::memcpy(pointer<float>(value), result.value, sizeof(float) * n);
  }
};

Weights weights(const py::tuple& t) {
  if (t.size() != 7) throw std::invalid_argument("weights: expected seven numbers");
  return {pointer<void>(t[0].cast<uintptr_t>()),
          static_cast<Element>(t[1].cast<int>()),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<int64_t>(),
          t[6].cast<int64_t>()};
}

SparseFeatures features(const py::tuple& t) {
  if (t.size() != 4) throw std::invalid_argument("features: expected four numbers");
  return {pointer<int64_t>(t[0].cast<uintptr_t>()), pointer<int64_t>(t[1].cast<uintptr_t>()),
          pointer<float>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>()};
}

std::unique_ptr<EncodeHandle> encode(int isa, uintptr_t x, int64_t positions, int64_t width, int64_t x_stride,
                                     const py::tuple& w_enc, uintptr_t b_enc, uintptr_t threshold,
                                     int64_t threshold_stride, int64_t top_k, bool keep_negative,
                                     int64_t first_position, int threads) {
  const OpTable& ops = table(isa);
  const EncodeInput in{
      pointer<float>(x),         positions,        width, x_stride,      weights(w_enc), pointer<float>(b_enc),
      pointer<float>(threshold), threshold_stride, top_k, keep_negative, first_position, threads};
  EncodeResult result;
  {
    py::gil_scoped_release release;
    result = ops.encode(in);
  }
  auto handle = std::make_unique<EncodeHandle>(result, ops.encode_free);
  raise_on(result.status, "encode");
  return handle;
}

void decode(int isa, const py::tuple& f, const py::tuple& w_dec, uintptr_t bias, uintptr_t out, int threads) {
  const OpTable& ops = table(isa);
  const DecodeInput in{features(f), weights(w_dec), pointer<float>(bias), pointer<float>(out), threads};
  Status status;
  {
    py::gil_scoped_release release;
    status = ops.decode(in);
  }
  raise_on(status, "decode");
}

void attend_back(int isa, uintptr_t y, uintptr_t prefix_ptr, int64_t targets, int64_t heads, int64_t kv_heads,
                 int64_t width, uintptr_t z, uintptr_t pattern, int64_t positions, uintptr_t query, uintptr_t key,
                 uintptr_t log_sum_exp, int64_t qk_width, float scale, float softcap, int64_t window, int threads,
                 int parts) {
  const OpTable& ops = table(isa);
  const AttendBackInput in{pointer<float>(y),
                           pointer<int64_t>(prefix_ptr),
                           targets,
                           heads,
                           kv_heads,
                           width,
                           pointer<float>(z),
                           pointer<float>(pattern),
                           positions,
                           pointer<float>(query),
                           pointer<float>(key),
                           pointer<float>(log_sum_exp),
                           qk_width,
                           scale,
                           softcap,
                           window,
                           threads,
                           parts};
  Status status;
  {
    py::gil_scoped_release release;
    status = ops.attend_back(in);
  }
  raise_on(status, "attend_back");
}

void edge_scores(int isa, uintptr_t gradient, int64_t gradient_stride, uintptr_t prefix_ptr, int64_t targets,
                 const py::tuple& f, const py::tuple& w_dec, uintptr_t out, int64_t out_stride, int threads) {
  const OpTable& ops = table(isa);
  const EdgeScoresInput in{pointer<float>(gradient),
                           gradient_stride,
                           pointer<int64_t>(prefix_ptr),
                           targets,
                           features(f),
                           weights(w_dec),
                           pointer<float>(out),
                           out_stride,
                           threads};
  Status status;
  {
    py::gil_scoped_release release;
    status = ops.edge_scores(in);
  }
  raise_on(status, "edge_scores");
}

void influence(int isa, uintptr_t rows, int64_t count, int64_t columns, int64_t row_stride, uintptr_t node,
               uintptr_t weight, uintptr_t order, uintptr_t out, int threads) {
  const OpTable& ops = table(isa);
  const InfluenceInput in{pointer<float>(rows),
                          count,
                          columns,
                          row_stride,
                          pointer<int64_t>(node),
                          pointer<float>(weight),
                          pointer<int64_t>(order),
                          pointer<float>(out),
                          threads};
  Status status;
  {
    py::gil_scoped_release release;
    status = ops.influence(in);
  }
  raise_on(status, "influence");
}

void reconstruct(int isa, const py::tuple& f, uintptr_t w_dec, int64_t w_dec_stride, int64_t width, uintptr_t bias,
                 uintptr_t target, int64_t target_stride, float scale, uintptr_t gradient,
                 uintptr_t value_gradient, uintptr_t squares, int threads) {
  const OpTable& ops = table(isa);
  const ReconstructInput in{features(f),
                            pointer<float>(w_dec),
                            w_dec_stride,
                            width,
                            pointer<float>(bias),
                            pointer<float>(target),
                            target_stride,
                            scale,
                            pointer<float>(gradient),
                            pointer<float>(value_gradient),
                            pointer<float>(squares),
                            threads};
  py::gil_scoped_release release;
  ops.reconstruct(in);
}

void adam(int isa, uintptr_t weight, uintptr_t mean, uintptr_t square, const py::tuple& gradient, uintptr_t source,
          int64_t source_stride, int64_t width, float rate, float mean_share, float square_share, float correction,
          float epsilon, int threads) {
  const OpTable& ops = table(isa);
  const AdamInput in{pointer<float>(weight),
                     pointer<float>(mean),
                     pointer<float>(square),
                     features(gradient),
                     pointer<float>(source),
                     source_stride,
                     width,
                     rate,
                     mean_share,
                     square_share,
                     correction,
                     epsilon,
                     threads};
  Status status;
  {
    py::gil_scoped_release release;
    status = ops.adam(in);
  }
  raise_on(status, "train");
}

void product(int isa, uintptr_t a, int64_t rows, int64_t depth, int64_t a_stride, uintptr_t b, int64_t columns,
             int64_t b_stride, bool b_transposed, uintptr_t divisor, uintptr_t out, int64_t out_stride, bool add,
             int threads, int parts) {
  const OpTable& ops = table(isa);
  const ProductInput in{pointer<float>(a),
                        rows,
                        depth,
                        a_stride,
                        pointer<float>(b),
                        columns,
                        b_stride,
                        b_transposed,
                        pointer<float>(divisor),
                        pointer<float>(out),
                        out_stride,
                        add,
                        threads,
                        parts};
  Status status;
  {
    py::gil_scoped_release release;
    status = ops.product(in);
  }
  raise_on(status, "product");
}

// (operations, a sum that keeps them from being left out)
py::tuple multiply_adds(int isa, int64_t rounds, int threads) {
  const OpTable& ops = table(isa);
  Rate rate;
  {
    py::gil_scoped_release release;
    rate = ops.multiply_adds(rounds, threads);
  }
  return py::make_tuple(rate.work, rate.sum);
}

// (bytes, the sum of what was read)
py::tuple stream_read(int isa, uintptr_t data, int64_t count, int threads) {
  const OpTable& ops = table(isa);
  Rate rate;
  {
    py::gil_scoped_release release;
    rate = ops.stream_read(pointer<float>(data), count, threads);
  }
  return py::make_tuple(rate.work, rate.sum);
}

py::list isas() {
  py::list names;
  for (int i = 0; i < isa_count(); ++i) {
    const IsaEntry entry = isa_entry(i);
    names.append(py::make_tuple(entry.table->isa, entry.supported));
  }
  return names;
}

// Versions and devices as the driver reports them; None in a build without CUDA.
py::object cuda() {
#ifdef PYCIRCUIT_HAS_CUDA
  const CudaVersions versions = cuda_versions();
  py::list devices;
  for (int i = 0; i < device_count(); ++i) {
    Device d;
    if (device(i, d)) devices.append(py::make_tuple(d.name, d.major, d.minor, d.multiprocessors, d.bytes));
  }
  return py::make_tuple(versions.runtime, versions.driver, devices);
#else
  return py::none();
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of pycircuit; call them through pycircuit.ops";
  m.attr("compiler") = PYCIRCUIT_COMPILER;
  m.def("isas", &isas, "(name, supported) of every ISA in this build, best last");
  m.def("cuda", &cuda, "(runtime, driver, [(name, major, minor, multiprocessors, bytes)]), or None");
  py::class_<EncodeHandle>(m, "EncodeResult")
      .def_property_readonly("count", &EncodeHandle::count)
      .def_property_readonly("workspace_bytes", [](const EncodeHandle& h) { return h.result.workspace_bytes; })
      .def("copy", &EncodeHandle::copy);
  m.def("multiply_adds", &multiply_adds);
  m.def("stream_read", &stream_read);
  m.def("encode", &encode);
  m.def("decode", &decode);
  m.def("attend_back", &attend_back);
  m.def("edge_scores", &edge_scores);
  m.def("influence", &influence);
  m.def("reconstruct", &reconstruct);
  m.def("adam", &adam);
  m.def("product", &product);
}
