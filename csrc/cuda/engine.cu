// The engine's calls, compiled once a dtype (RNNFAST_SCALAR), so that the compiler's work divides.
#include "engine.h"

#include "../cells/list.h"
#include "backward_pass.h"
#include "forward_pass.h"
#include "run_passes.h"
#include "scan.cuh"

namespace rnnfast {
namespace {

using scalar_t = RNNFAST_SCALAR;
template <class Cell>
using ForwardOf = RNNFAST_TARGET::ForwardPass<Cell, scalar_t>;
template <class Cell>
using BackwardOf = RNNFAST_TARGET::BackwardPass<Cell, scalar_t>;

// Calls use(cell) with the cell of an id.
template <class Use>
void with_cell(int cell, const Use& use) {
  using namespace RNNFAST_TARGET;
  switch (cell) {
#define RNNFAST_USE(id, name, Type) \
  case id: return use(make_cell<Type>({}));
    RNNFAST_CELLS(RNNFAST_USE)
#undef RNNFAST_USE
  }
  throw std::runtime_error("rnnfast: no cell has the id " + std::to_string(cell));
}

template <template <class> class Pass, class Args>
int64_t room_of(int cell, const CudaChoice& choice, const Args* passes, int count) {
  RNNFAST_TARGET::Arena arena(nullptr);
  with_cell(cell, [&](auto of) {
    RNNFAST_TARGET::passes_of<Pass<decltype(of)>>(passes, count, choice, arena);
  });
  return arena.used();
}

template <template <class> class Pass, class Args>
void run(const CudaCall& call, const Args* passes, int count, bool chained) {
  with_cell(call.cell, [&](auto of) {
    RNNFAST_TARGET::run_passes<Pass<decltype(of)>>(call, passes, count, chained);
  });
}

}  // namespace

template <>
int64_t forward_room(int cell, const CudaChoice& choice, const ForwardArgs<scalar_t>* passes,
                     int count) {
  return room_of<ForwardOf>(cell, choice, passes, count);
}
template <>
int64_t backward_room(int cell, const CudaChoice& choice, const BackwardArgs<scalar_t>* passes,
                      int count) {
  return room_of<BackwardOf>(cell, choice, passes, count);
}
template <>
void cuda_forward(const CudaCall& call, const ForwardArgs<scalar_t>* passes, int count,
                  bool chained) {
  run<ForwardOf>(call, passes, count, chained);
}
template <>
void cuda_backward(const CudaCall& call, const BackwardArgs<scalar_t>* passes, int count,
                   bool chained) {
  run<BackwardOf>(call, passes, count, chained);
}

template <>
int64_t scan_room(const ScanArgs<scalar_t>& args) {
  return RNNFAST_TARGET::scan_room_of(args);
}
template <>
int64_t scan_room(const ScanBackwardArgs<scalar_t>& args) {
  return RNNFAST_TARGET::scan_room_of(args);
}
template <>
void cuda_scan(const ScanArgs<scalar_t>& args, cudaStream_t stream, char* room) {
  RNNFAST_TARGET::run_scan<RNNFAST_TARGET::ForwardScan>(args, stream, room);
}
template <>
void cuda_scan(const ScanBackwardArgs<scalar_t>& args, cudaStream_t stream, char* room) {
  RNNFAST_TARGET::run_scan<RNNFAST_TARGET::BackwardScan>(args, stream, room);
}

}  // namespace rnnfast
