#include "cuda_model.h"

#include <algorithm>
#include <tuple>

#include "cell_info.h"

namespace rnnfast {
namespace {

constexpr double kLeft = 0.25;   // of the shorter of parts that overlap
constexpr int kTensorCores = 4;  // of a multiprocessor, and its schedulers
constexpr int kSum = 4;          // bytes of a sum, of gx and of what is kept

double divide_up(double a, double b) {
  return static_cast<double>((static_cast<int64_t>(a) + static_cast<int64_t>(b) - 1) /
                             static_cast<int64_t>(b));
}

// Gate maths of one unit of one row: exp, sigmoid and tanh, how many of them wait for each other,
// and other instructions (counted in sm_90a code).
struct GateMaths {
  double activations, chain, others;
};
GateMaths gate_maths(int gates, bool backward) {
  if (backward) return gates == 4 ? GateMaths{1, 1, 23} : GateMaths{0, 0, gates == 3 ? 16. : 5.};
  return gates == 4 ? GateMaths{5, 2, 11} : gates == 3 ? GateMaths{3, 2, 8} : GateMaths{1, 1, 2};
}

struct GateClocks {
  double busy, latency;
  double all() const { return std::max(busy, latency) + kLeft * std::min(busy, latency); }
};
// `elements` units of rows, on one multiprocessor.
GateClocks gate_clocks(int gates, bool backward, double elements, const CudaRates& r) {
  const GateMaths maths = gate_maths(gates, backward);
  const double rest = maths.others + gates * r.around_gate;
  const double instructions = maths.activations * r.activation + rest;
  const double special = maths.activations * r.activation_special;
  const double busy = std::max(instructions / r.instructions, special / r.special);
  // A warp's instructions that wait for each other take four clocks each.
  const double latency = maths.chain * r.activation_latency + 4 * maths.others;
  return {busy * elements, latency};
}

// The longest in full, a quarter of the others.
void overlap(double& a, double& b, double& c) {
  const double longest = std::max({a, b, c});
  bool kept = false;
  for (double* part : {&a, &b, &c}) {
    if (*part == longest && !kept)
      kept = true;
    else
      *part *= kLeft;
  }
}

// What is left of `hidden` time beside `others`.
double beside(double hidden, double others) { return std::max(kLeft * hidden, hidden - others); }

int itemsize_of(Operand operand) {
  return operand == Operand::kHalf ? 2 : operand == Operand::kFloat64 ? 8 : 4;
}

// Multiplications a clock and multiprocessor.
double peak(Operand operand, const CudaRates& r) {
  const double tensor = kTensorCores * kRowTile * kBatchTile / r.mma_clocks;
  switch (operand) {
    case Operand::kHalf: return 16 * tensor;
    case Operand::kTf32: return 8 * tensor;
    case Operand::kFloat32: return r.instructions;
    default: return r.instructions / 2;
  }
}

// A rate of the whole chip, on as many multiprocessors as the device has.
double chip(double rate, const CudaDevice& device, const CudaRates& r) {
  return rate * device.multiprocessors / r.multiprocessors;
}

// Of a step and a row: gx or its gradient, y or its gradient, planes that are kept.
double row_bytes(const CudaPass& pass) {
  const CellInfo& cell = cell_info(pass.shape.cell);
  const double planes = cell.saved + cell.states - 1;
  const double kept = pass.saving || pass.backward ? planes * kSum : 0;
  return static_cast<double>(pass.shape.hidden_size) *
         (cell.gates * kSum + pass.shape.itemsize + kept);
}

// Microseconds of the products over all steps.
double around(const CudaPass& pass, const CudaDevice& device, const CudaRates& r) {
  const Shape& s = pass.shape;
  const double gate_rows = static_cast<double>(cell_info(s.cell).gates) * s.hidden_size;
  const double of_input = static_cast<double>(s.rows) * gate_rows * s.input_size;
  const double of_hidden = static_cast<double>(s.rows) * gate_rows * s.output_size;
  const double products = pass.backward ? 2 * of_input + of_hidden : of_input;
  return products / (peak(pass.operand, r) * r.library_share * device.multiprocessors * r.clock);
}

void finish(CudaEstimate& e, const CudaPass& pass) {
  e.step = e.parts.sum();
  e.total = static_cast<double>(pass.shape.seq_len) * e.step + e.start + e.around;
}

}  // namespace

CudaRates with_special_functions(CudaRates rates) {
  rates.activation = 6;
  rates.activation_special = 2;
  rates.activation_latency = 60;
  return rates;
}

double CudaFloors::greatest() const {
  return std::max({operations, weights, gathered, exchanges, gates});
}

const char* CudaFloors::binding() const {
  const double most = greatest();
  return most == operations  ? "operations"
         : most == weights   ? "weights"
         : most == gathered  ? "gathered"
         : most == exchanges ? "exchanges"
                             : "gates";
}

CudaEstimate estimate_step_engine(const CudaPass& pass, const CudaDevice& device,
                                  const CudaRates& r) {
  const Shape& s = pass.shape;
  const CellInfo& cell = cell_info(s.cell);
  const double H = static_cast<double>(s.hidden_size), B = static_cast<double>(s.batch);
  const double P = static_cast<double>(s.output_size);
  const int itemsize = itemsize_of(pass.operand);
  const double numbers = cell.dense ? cell.gates * H * P : 0;
  const double bytes = numbers * s.itemsize, cached = chip(r.second_cache, device, r);
  const double all_clocks = device.multiprocessors * r.clock;

  CudaEstimate e;
  e.floors.operations = numbers * B / (peak(pass.operand, r) * all_clocks);
  e.floors.weights = bytes / (bytes > r.second_cache_bytes ? r.memory : cached);
  const GateClocks gates = gate_clocks(cell.gates, pass.backward, B * H, r);
  e.floors.gates = gates.busy / all_clocks;
  e.floors.exchanges = cell.dense ? 2 * r.launch : 0;
  // A product's rows of the batch come in eights.
  e.parts.product = numbers * divide_up(B, kBatchTile) * kBatchTile /
                    (peak(pass.operand, r) * r.library_share * all_clocks);
  e.parts.weights = e.floors.weights;
  // h or the gates' gradients are read, sums are written and read.
  e.parts.operands = B * (P + cell.gates * H) * (itemsize + 2 * kSum) / cached;
  overlap(e.parts.product, e.parts.weights, e.parts.operands);
  e.parts.gates = GateClocks{gates.busy / device.multiprocessors, gates.latency}.all() / r.clock;
  e.parts.exchange = e.floors.exchanges;
  const double input = B * row_bytes(pass) / r.memory;
  e.parts.input = beside(input, e.parts.sum());
  e.start = 2 * r.launch;
  e.around = around(pass, device, r);
  finish(e, pass);
  return e;
}

CudaEstimate estimate_tile(const OnchipTile& t, const CudaPass& pass, const CudaDevice& device,
                           const CudaRates& r) {
  const Shape& s = pass.shape;
  const double G = t.gates;
  CudaEstimate e;
  e.engine = exchange_name(t.exchange);
  e.tile = &t;
  // Clusters lie within a part of the chip, whose sizes leave some multiprocessors over: 15 of 8
  // fit on 132, and so not more than 7 of 16.
  const int clusters = t.blocks > 8 ? 112 : 120;
  e.at_once = t.exchange == Exchange::kCluster ? device.multiprocessors * clusters / 132 / t.blocks
                                               : device.multiprocessors / t.blocks;
  e.at_once = std::max(1, e.at_once);
  const double tiles = std::max(1.0, divide_up(static_cast<double>(s.batch), kBatchTile));
  e.rounds = static_cast<int>(divide_up(tiles, e.at_once));
  const double groups = std::min<double>(tiles, e.at_once), blocks = groups * t.blocks;

  // Instructions of the fullest tensor core; one that waits for the one before could be no sooner.
  const double mmas = static_cast<double>(t.row_tiles()) * t.slices();
  const double warps = divide_up(t.warps(), kTensorCores);
  const double busy = mmas * warps * r.mma_clocks / r.mma_share;
  e.floors.operations = mmas * t.warps() / kTensorCores * r.mma_clocks / r.mma_share / r.clock;
  e.parts.product = std::max(busy, mmas / t.chains() * r.mma_latency) / r.clock;
  e.floors.weights = t.shared_weights() / r.shared / r.clock;
  e.parts.weights = e.floors.weights;
  const double operand_slices =
      static_cast<double>(t.warps()) * t.slices() * (pass.backward ? G : 1);
  const double split_bytes = 2.0 * (t.splits - 1) * t.sum_bytes();
  e.parts.operands = (operand_slices * kFragmentBytes / 2 + split_bytes) / r.shared / r.clock;
  overlap(e.parts.product, e.parts.weights, e.parts.operands);

  const double elements = static_cast<double>(t.hidden) / t.blocks * kBatchTile;
  const GateClocks gates = gate_clocks(t.gates, pass.backward, elements, r);
  e.floors.gates = gates.busy / r.clock;
  e.parts.gates = gates.all() / r.clock;

  // Backward: the gates' gradients from blocks / parts others, sums from the other parts.
  const double gatherers = t.backward ? t.blocks / t.parts : t.blocks;
  const double meetings = (gatherers > 1) + (t.backward && t.parts > 1);
  const double once = t.exchange == Exchange::kCluster ? r.cluster_push
                      : t.exchange == Exchange::kGrid  ? r.through_cache
                                                       : 0;
  e.floors.exchanges = t.exchange == Exchange::kNone ? r.block_barrier : meetings * once;
  e.parts.exchange =
      t.exchange == Exchange::kNone ? r.block_barrier : meetings * (once + r.block_barrier);
  if (t.splits > 1) e.parts.exchange += r.block_barrier;
  if (t.exchange != Exchange::kNone) {
    const bool cluster = t.exchange == Exchange::kCluster;
    // Through the second cache a block reads its own share too, and sums are written there.
    const double gathered =
        gatherers > 1 ? t.operand_bytes() * (cluster ? 1 - 1 / gatherers : 1) : 0;
    const double sums = t.backward && t.parts > 1 ? t.sum_bytes() * (1 - 1. / t.parts) : 0;
    const double bytes = gathered + sums * (cluster ? 1 : 2);
    e.floors.gathered = cluster ? bytes / r.cluster / r.clock
                                : std::max(bytes / r.second_cache_each / r.clock,
                                           blocks * bytes / chip(r.second_cache, device, r));
    e.parts.gathered = e.floors.gathered;
  }
  // All rows from memory, and those of the fullest group through its blocks.
  const double rows = std::min(groups * kBatchTile, static_cast<double>(s.batch));
  const double fullest = std::min<double>(kBatchTile, static_cast<double>(s.batch)) / t.blocks;
  const double input =
      row_bytes(pass) * std::max(rows / r.memory, fullest / r.second_cache_each / r.clock);
  e.parts.input = beside(input, e.parts.sum());

  for (double* part : {&e.parts.product, &e.parts.weights, &e.parts.operands, &e.parts.gates,
                       &e.parts.exchange, &e.parts.gathered, &e.parts.input, &e.floors.operations,
                       &e.floors.weights, &e.floors.gathered, &e.floors.exchanges, &e.floors.gates})
    *part *= e.rounds;
  // w_hh comes from memory once, and to every group through the second cache.
  const double weights = G * static_cast<double>(s.hidden_size) * s.hidden_size * s.itemsize;
  e.start = r.launch + weights / r.memory +
            std::max(weights / t.blocks / r.second_cache_each / r.clock,
                     weights * groups / chip(r.second_cache, device, r));
  e.around = around(pass, device, r);
  finish(e, pass);
  return e;
}

std::vector<CudaEstimate> rank_engines(const CudaPass& pass, const CudaDevice& device,
                                       const CudaRates& rates) {
  std::vector<CudaEstimate> all = {estimate_step_engine(pass, device, rates)};
  all[0].why_not = why_not_cuda(device);
  for (int exchange = 0; exchange < kNumExchanges; ++exchange) {
    CudaEstimate best;
    best.engine = exchange_name(static_cast<Exchange>(exchange));
    const int found = find_tile(pass.shape, pass.operand, pass.backward,
                                static_cast<Exchange>(exchange), device, &best.why_not);
    // Where there is no kernel, or the device is too small, a tile that would take the pass.
    for (int i = 0; i < kNumOnchipTiles; ++i) {
      const OnchipTile& tile = kOnchipTiles[i];
      if (static_cast<int>(tile.exchange) != exchange || tile.operand != pass.operand ||
          tile.backward != pass.backward || !why_not_layer(tile, pass.shape).empty())
        continue;
      const std::string why = why_not_tile(tile, pass.shape, device);
      if (found >= 0 && !why.empty()) continue;
      CudaEstimate e = estimate_tile(tile, pass, device, rates);
      e.why_not = why;
      if (best.total == 0 || e.total < best.total) best = e;
    }
    all.push_back(best);
  }
  std::stable_sort(all.begin(), all.end(), [](const CudaEstimate& a, const CudaEstimate& b) {
    const auto key = [](const CudaEstimate& e) {
      return std::tuple(!e.why_not.empty(), e.total == 0, e.total);
    };
    return key(a) < key(b);
  });
  return all;
}

CudaEstimate best_engine(const CudaPass& pass, const CudaDevice& device, const CudaRates& rates) {
  return rank_engines(pass, device, rates).front();
}

}  // namespace rnnfast
