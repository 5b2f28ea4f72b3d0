// The only source of a library that rnnfast.load_cell compiles for CUDA: the user's header comes
// before it (-include), RNNFAST_OWN_CELL names the struct in it. That it is a cell, the CPU's
// library has shown (cpu/own_cell.cpp).
#include "own_cell.h"

#include "../cells/info.h"
#include "cell_calls.h"

namespace rnnfast {
namespace RNNFAST_TARGET {
namespace {

using Own = RNNFAST_OWN_CELL;
constexpr OwnCudaCell kOwnCell = {RNNFAST_ENGINE_STAMP,
                                  info_of<Own>(RNNFAST_OWN_NAME, false, false),
                                  {calls_of<Own, float>(), calls_of<Own, double>(),
                                   calls_of<Own, Float16>(), calls_of<Own, BFloat16>()}};

}  // namespace
}  // namespace RNNFAST_TARGET

// The only cell that is asked for here, for the name in an error: the engine's own are hidden in
// its library.
const CellInfo& cell_info(int) { return RNNFAST_TARGET::kOwnCell.info; }

}  // namespace rnnfast

extern "C" __attribute__((visibility("default"))) const rnnfast::OwnCudaCell*
rnnfast_own_cuda_cell() {
  return &rnnfast::RNNFAST_TARGET::kOwnCell;
}
