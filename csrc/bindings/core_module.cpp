// The development module _core: the torch-free core by pybind11,
// so that tests reach maths, micro-kernel, cells and choose_engine
// from Python. Built with RNNFAST_DEV=1, never part of a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "../cells/list.h"
#include "../core/cell_info.h"
#include "../cpu/dispatch.h"
#include "core_cuda.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

template <class scalar_t>
using Array = py::array_t<scalar_t, py::array::c_style | py::array::forcecast>;

Isa isa_of(const std::string& name) {
  for (int i = 0; i < kNumIsas; ++i)
    if (name == isa_name(static_cast<Isa>(i)) && isa_available(static_cast<Isa>(i)))
      return static_cast<Isa>(i);
  throw std::invalid_argument("rnnfast: isa " + name + " is not available here");
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i)
    if (isa_available(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  return names;
}

template <class scalar_t>
Array<scalar_t> apply_math(const std::string& isa, const std::string& function,
                           const Array<scalar_t>& in) {
  static const std::map<std::string, MathFunction> functions = {{"exp", MathFunction::kExp},
                                                                {"sigmoid", MathFunction::kSigmoid},
                                                                {"tanh", MathFunction::kTanh}};
  Array<scalar_t> out(in.size());
  const KernelTable& table = kernels(isa_of(isa));
  if constexpr (sizeof(scalar_t) == 4)
    table.math32(functions.at(function), in.size(), in.data(), out.mutable_data());
  else
    table.math64(functions.at(function), in.size(), in.data(), out.mutable_data());
  return out;
}

template <class scalar_t>
Array<scalar_t> product(const std::string& isa, bool packed, const Array<scalar_t>& a,
                        const Array<scalar_t>& w) {
  if (a.ndim() != 2 || w.ndim() != 2 || a.shape(1) != w.shape(1))
    throw std::invalid_argument("rnnfast: a must be (rows, K) and w (units, K)");
  Array<scalar_t> out({a.shape(0), w.shape(0)});
  const KernelTable& table = kernels(isa_of(isa));
  const Kernel kernel = packed ? Kernel::kPacked : Kernel::kDirect;
  if constexpr (sizeof(scalar_t) == 4)
    table.product32(kernel, a.shape(0), w.shape(0), a.shape(1), a.data(), w.data(),
                    out.mutable_data());
  else
    table.product64(kernel, a.shape(0), w.shape(0), a.shape(1), a.data(), w.data(),
                    out.mutable_data());
  return out;
}

// 16-bit numbers are their bits.
Array<float> widen_bits(const std::string& isa, bool brain, const Array<uint16_t>& in) {
  Array<float> out(in.size());
  kernels(isa_of(isa)).widen(in.size(), brain, in.data(), out.mutable_data());
  return out;
}
Array<uint16_t> narrow_bits(const std::string& isa, bool brain, const Array<float>& in) {
  Array<uint16_t> out(in.size());
  kernels(isa_of(isa)).narrow(in.size(), brain, in.data(), out.mutable_data());
  return out;
}

// One unit of a cell in double precision: what the engines run, without an engine.
template <class Cell>
py::dict run_cell(const std::vector<double>& gx_in, const std::vector<double>& gh_in,
                  const std::vector<double>& state_in, const std::vector<double>& dstate_in,
                  int64_t code, const std::vector<double>& parameters) {
  constexpr int kParameters = RNNFAST_TARGET::kParametersOf<Cell>;
  double p[RNNFAST_TARGET::at_least_one<kParameters>] = {},
         dp[RNNFAST_TARGET::at_least_one<kParameters>] = {};
  double gx[Cell::kGates], gh[Cell::kGates], prev[Cell::kStates], next[Cell::kStates],
      dstate[Cell::kStates];
  double saved[RNNFAST_TARGET::at_least_one<Cell::kSaved>] = {}, dgx[Cell::kGates],
         dgh[Cell::kGates];
  if (gx_in.size() != Cell::kGates || gh_in.size() != Cell::kGates ||
      state_in.size() != Cell::kStates || dstate_in.size() != Cell::kStates)
    throw std::invalid_argument(
        "rnnfast: gx, gh need one number a gate, state and dstate one a state");
  if (!parameters.empty() &&
      parameters.size() != kParameters + RNNFAST_TARGET::kNormParameters<Cell>)
    throw std::invalid_argument("rnnfast: p needs one number a parameter");
  for (int k = 0; k < kParameters && !parameters.empty(); ++k) p[k] = parameters[k];
  for (int g = 0; g < Cell::kGates; ++g) gx[g] = gx_in[g], gh[g] = gh_in[g];
  for (int k = 0; k < Cell::kStates; ++k) prev[k] = next[k] = state_in[k], dstate[k] = dstate_in[k];
  const Cell cell = RNNFAST_TARGET::make_cell<Cell>(options_of_code(code));
  if constexpr (RNNFAST_TARGET::kLinkOf<Cell> != RNNFAST_TARGET::Link::kNone) {
    // What stands between the halves is the link itself, or a product with 1.
    constexpr int kFree = RNNFAST_TARGET::kFreeGatesOf<Cell>;
    double link, dlink = 0;
    cell.begin(gx, gh, next, link);
    for (int g = kFree; g < Cell::kGates; ++g) gh[g] = gh_in[g] + link;
    next[0] = prev[0];
    cell.finish(gx, gh, link, next, saved);
    cell.finish_backward(saved, link, prev, next, dstate, dgx, dlink);
    for (int g = kFree; g < Cell::kGates; ++g) dlink += dgx[g];
    cell.begin_backward(saved, prev, next, dlink, dstate, dgx, link);
    for (int g = 0; g < Cell::kGates; ++g) dgh[g] = dgx[g];
  } else {
    RNNFAST_TARGET::cell_forward(cell, p, gx, gh, next, saved);
    RNNFAST_TARGET::cell_backward(cell, p, dp, saved, prev, next, dstate, dgx, dgh);
  }
  py::dict result;
  result["state"] = std::vector<double>(next, next + Cell::kStates);
  result["dstate"] = std::vector<double>(dstate, dstate + Cell::kStates);
  result["dgx"] = std::vector<double>(dgx, dgx + Cell::kGates);
  result["dgh"] = std::vector<double>(dgh, dgh + Cell::kGates);
  result["dp"] = std::vector<double>(dp, dp + kParameters);
  return result;
}

py::dict cell(const std::string& name, const std::vector<double>& gx, const std::vector<double>& gh,
              const std::vector<double>& state, const std::vector<double>& dstate, int64_t code,
              const std::vector<double>& p) {
#define RNNFAST_RUN_CELL(id, cell_name, Type) \
  if (name == #cell_name) return run_cell<RNNFAST_TARGET::Type>(gx, gh, state, dstate, code, p);
  RNNFAST_CELLS(RNNFAST_RUN_CELL)
  throw std::invalid_argument("rnnfast: no cell is called " + name);
}

std::vector<py::dict> cells() {
  std::vector<py::dict> list;
  for (int i = 0; i < kNumCells; ++i) {
    const CellInfo& info = cell_info(i);
    py::dict entry;
    entry["id"] = i;
    entry["name"] = info.name;
    entry["gates"] = info.gates;
    entry["states"] = info.states;
    entry["saved"] = info.saved;
    entry["parameters"] = info.parameters;
    entry["dense"] = info.dense;
    entry["diagonal"] = info.diagonal;
    entry["stages"] = info.stages;
    list.push_back(entry);
  }
  return list;
}

py::dict choose(int cell_id, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t rows,
                int itemsize, int max_threads, int forced, int forced_split,
                int64_t private_cache) {
  if (cell_id < 0 || cell_id >= kNumCells) throw std::invalid_argument("rnnfast: no such cell");
  static const char* const splits[] = {"serial", "batch", "units"};
  static const char* const kernel_names[] = {"packed", "direct", "none"};
  const Choice choice = choose_engine({cell_id, T, B, I, H, P, rows, itemsize},
                                      {max_threads, private_cache}, {forced, forced_split});
  py::dict result;
  result["threads"] = choice.threads;
  result["split"] = splits[static_cast<int>(choice.split)];
  result["kernel_ih"] = kernel_names[static_cast<int>(choice.kernel_ih)];
  result["kernel_hh"] = kernel_names[static_cast<int>(choice.kernel_hh)];
  return result;
}

// (how many passes at the same time, threads of each, rows of a chunk)
py::tuple group_choice(int cell_id, int64_t T, int64_t B, int64_t I, int64_t H, int count,
                       bool chained, bool backward, int max_threads, int forced_split) {
  if (cell_id < 0 || cell_id >= kNumCells || count < 1)
    throw std::invalid_argument("rnnfast: no such cell, or no pass");
  std::vector<Shape> passes(count, Shape{cell_id, T, B, chained ? H : I, H, H, T * B, 4});
  passes[0].input_size = I;
  const GroupChoice choice = choose_group({passes.data(), count, chained, backward},
                                          {max_threads, int64_t{1} << 20}, {-1, forced_split});
  return py::make_tuple(choice.teams, choice.each.threads, choice.each.chunk_rows);
}

// Seconds of one barrier of `workers` threads with nothing between, for bench/model.py; 0: the
// threads did not run at once.
double barrier_seconds(int workers, int rounds) {
  struct Context {
    int rounds;
    double seconds;
  } measured{rounds, 0};
  const auto thread_per_part = [](int count, void (*run)(long, long, void*), void* context) {
    std::vector<std::thread> threads;
    for (int i = 1; i < count; ++i) threads.emplace_back([=] { run(i, i + 1, context); });
    run(0, 1, context);
    for (auto& thread : threads) thread.join();
  };
  const auto work = [](void* context, const Worker& worker) {
    auto& c = *static_cast<Context*>(context);
    barrier(worker);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < c.rounds; ++i) barrier(worker);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (worker.index == 0 && worker.count > 1) c.seconds = took.count() / c.rounds;
  };
  // A thread of its own, since one whose team came late works alone for a while.
  std::thread([&] { run_team(workers, thread_per_part, work, &measured); }).join();
  return measured.seconds;
}

}  // namespace
}  // namespace rnnfast

PYBIND11_MODULE(_core, m) {
  using namespace rnnfast;
  m.doc() = "The torch-free core of rnnfast, for its tests.";
  m.def("isas", &isas, "Instruction sets that this build has and this processor runs.");
  m.def("math32", &apply_math<float>, py::arg("isa"), py::arg("function"), py::arg("values"));
  m.def("math64", &apply_math<double>, py::arg("isa"), py::arg("function"), py::arg("values"));
  m.def("product32", &product<float>, py::arg("isa"), py::arg("packed"), py::arg("a"),
        py::arg("w"));
  m.def("product64", &product<double>, py::arg("isa"), py::arg("packed"), py::arg("a"),
        py::arg("w"));
  m.def("widen", &widen_bits, py::arg("isa"), py::arg("brain"), py::arg("bits"));
  m.def("narrow", &narrow_bits, py::arg("isa"), py::arg("brain"), py::arg("values"));
  m.def("cell", &cell, py::arg("name"), py::arg("gx"), py::arg("gh"), py::arg("state"),
        py::arg("dstate"), py::arg("code") = 0, py::arg("p") = std::vector<double>());
  m.def("cells", &cells, "The list of cells with their numbers.");
  m.def("choose", &choose, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("P"), py::arg("rows"), py::arg("itemsize"), py::arg("max_threads"),
        py::arg("forced") = -1, py::arg("forced_split") = -1,
        py::arg("private_cache") = int64_t{1} << 20);
  m.def("choose_group", &group_choice, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::arg("count"), py::arg("chained"), py::arg("backward"),
        py::arg("max_threads"), py::arg("forced_split") = -1);
  add_cuda(m);
  m.def("barrier_seconds", &barrier_seconds, py::arg("workers"), py::arg("rounds"),
        py::call_guard<py::gil_scoped_release>(), "Seconds of one barrier; 0: not at once.");
  m.def(
      "spin_tile",
      [](const std::string& isa, int64_t repeats) {
        py::gil_scoped_release release;
        return kernels(isa_of(isa)).spin_tile(repeats);
      },
      py::arg("isa"), py::arg("repeats"),
      "Runs the micro-kernel on data in the first cache; returns the operations done.");
}
