// The tiles of the on-chip engine and the model of a GPU, in the development module _core.
#include "core_cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../core/cell_info.h"
#include "../core/cuda_model.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

const char* const kOperands[] = {"half", "tf32", "float32", "float64"};

Operand operand_of(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kOperands[i]) return static_cast<Operand>(i);
  throw std::invalid_argument("rnnfast: no operand is called " + name);
}

Exchange exchange_of(const std::string& name) {
  for (int i = 0; i < kNumExchanges; ++i)
    if (name == exchange_name(static_cast<Exchange>(i))) return static_cast<Exchange>(i);
  throw std::invalid_argument("rnnfast: no exchange is called " + name);
}

const OnchipTile& tile_at(int index) {
  if (index < 0 || index >= kNumOnchipTiles) throw std::invalid_argument("rnnfast: no such tile");
  return kOnchipTiles[index];
}

// A layer, and what its pass reads and keeps; P 0: no projection.
struct Layer {
  CudaPass pass;
  Layer(int cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, const std::string& operand,
        bool backward, bool saving)
      : pass{{}, operand_of(operand), backward, saving} {
    if (cell < 0 || cell >= kNumCells) throw std::invalid_argument("rnnfast: no such cell");
    if (T < 1 || B < 1 || I < 0 || H < 1) throw std::invalid_argument("rnnfast: no such size");
    const int itemsize = pass.operand == Operand::kHalf      ? 2
                         : pass.operand == Operand::kFloat64 ? 8
                                                             : 4;
    pass.shape = {cell, T, B, I, H, P > 0 ? P : H, T * B, itemsize};
  }
};

struct Device {
  CudaDevice device;
  Device(int capability, int multiprocessors, int shared_bytes)
      : device{capability, multiprocessors, shared_bytes} {
    if (multiprocessors < 1) throw std::invalid_argument("rnnfast: no multiprocessors");
  }
};

py::dict tile_dict(const OnchipTile& t) {
  py::dict d;
  d["exchange"] = exchange_name(t.exchange);
  d["gates"] = t.gates;
  d["operand"] = kOperands[static_cast<int>(t.operand)];
  d["backward"] = t.backward;
  d["hidden"] = t.hidden;
  d["blocks"] = t.blocks;
  d["parts"] = t.parts;
  d["units"] = t.units;
  d["kept"] = t.kept;
  d["splits"] = t.splits;
  d["built"] = is_built(t.exchange);
  d["own_units"] = t.own_units();
  d["depth_units"] = t.depth_units();
  d["slices"] = t.slices();
  d["warps"] = t.warps();
  d["threads"] = t.threads();
  d["row_tiles"] = t.row_tiles();
  d["chains"] = t.chains();
  d["operand_bytes"] = t.operand_bytes();
  d["shared_weights"] = t.shared_weights();
  d["shared_bytes"] = t.shared_bytes();
  d["weight_registers"] = t.weight_registers();
  d["registers"] = t.registers();
  return d;
}

py::dict estimate_dict(const CudaEstimate& e) {
  py::dict parts;
  parts["product"] = e.parts.product;
  parts["weights"] = e.parts.weights;
  parts["operands"] = e.parts.operands;
  parts["gates"] = e.parts.gates;
  parts["exchange"] = e.parts.exchange;
  parts["gathered"] = e.parts.gathered;
  parts["input"] = e.parts.input;
  py::dict floors;
  floors["operations"] = e.floors.operations;
  floors["weights"] = e.floors.weights;
  floors["gathered"] = e.floors.gathered;
  floors["exchanges"] = e.floors.exchanges;
  floors["gates"] = e.floors.gates;
  py::dict d;
  d["engine"] = e.engine;
  d["tile"] = e.tile ? static_cast<int>(e.tile - kOnchipTiles) : -1;
  d["at_once"] = e.at_once;
  d["rounds"] = e.rounds;
  d["parts"] = parts;
  d["floors"] = floors;
  d["binding"] = e.floors.binding();
  d["step"] = e.step;
  d["start"] = e.start;
  d["around"] = e.around;
  d["total"] = e.total;
  d["why_not"] = e.why_not;
  return d;
}

CudaRates rates_of(bool special) { return special ? with_special_functions() : CudaRates{}; }

}  // namespace

void add_cuda(py::module_& m) {
  py::class_<Layer>(m, "CudaLayer")
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&, bool,
                    bool>(),
           py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
           py::arg("P") = 0, py::arg("operand") = "half", py::arg("backward") = false,
           py::arg("saving") = false);
  py::class_<Device>(m, "CudaDevice")
      .def(py::init<int, int, int>(), py::arg("capability") = 90, py::arg("multiprocessors") = 132,
           py::arg("shared_bytes") = 232448);
  m.def("onchip_tiles", [] {
    std::vector<py::dict> tiles;
    for (int i = 0; i < kNumOnchipTiles; ++i) tiles.push_back(tile_dict(kOnchipTiles[i]));
    return tiles;
  });
  m.def(
      "find_tile",
      [](const Layer& layer, const std::string& exchange, const Device& device) {
        std::string why;
        const int tile = find_tile(layer.pass.shape, layer.pass.operand, layer.pass.backward,
                                   exchange_of(exchange), device.device, &why);
        return py::make_tuple(tile, why);
      },
      py::arg("layer"), py::arg("exchange"), py::arg("device"),
      "The index of the smallest tile that serves, or -1 and why not.");
  m.def(
      "why_not_tile",
      [](int tile, const Layer& layer, const Device& device) {
        return why_not_tile(tile_at(tile), layer.pass.shape, device.device);
      },
      py::arg("tile"), py::arg("layer"), py::arg("device"));
  m.def(
      "estimate_tile",
      [](int tile, const Layer& layer, const Device& device, bool special) {
        return estimate_dict(
            estimate_tile(tile_at(tile), layer.pass, device.device, rates_of(special)));
      },
      py::arg("tile"), py::arg("layer"), py::arg("device"), py::arg("special") = false);
  m.def(
      "rank_engines",
      [](const Layer& layer, const Device& device, bool special) {
        std::vector<py::dict> all;
        for (const CudaEstimate& e : rank_engines(layer.pass, device.device, rates_of(special)))
          all.push_back(estimate_dict(e));
        return all;
      },
      py::arg("layer"), py::arg("device"), py::arg("special") = false,
      "Estimates, those that can serve first. `special`: gate maths by special function units.");
  m.def(
      "best_engine",
      [](const Layer& layer, const Device& device, bool special) {
        return estimate_dict(best_engine(layer.pass, device.device, rates_of(special)));
      },
      py::arg("layer"), py::arg("device"), py::arg("special") = false);
}

}  // namespace rnnfast
