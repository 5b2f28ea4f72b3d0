// The engine's calls for one cell and one dtype.
#pragma once

#include "backward_pass.h"
#include "forward_pass.h"
#include "run_passes.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Pass>
int64_t room_of(const CudaChoice& choice, const typename Pass::Args* passes, int count) {
  Arena arena(nullptr);
  passes_of<Pass>(passes, count, choice, arena);
  return arena.used();
}

template <class Cell, class scalar_t>
constexpr CellCalls<scalar_t> calls_of() {
  using Forward = ForwardPass<Cell, scalar_t>;
  using Backward = BackwardPass<Cell, scalar_t>;
  return {room_of<Forward>, room_of<Backward>, run_passes<Forward>, run_passes<Backward>};
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
