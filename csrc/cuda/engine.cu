// The engine's calls, compiled once a dtype (RNNFAST_SCALAR), so that the compiler's work divides.
#include "engine.h"

#include "../cells/list.h"
#include "cell_calls.h"
#include "own_cell.h"
#include "scan.cuh"

namespace rnnfast {
namespace {

using scalar_t = RNNFAST_SCALAR;

#define RNNFAST_CALLS(id, name, Type) RNNFAST_TARGET::calls_of<RNNFAST_TARGET::Type, scalar_t>(),
constexpr CellCalls<scalar_t> kCells[] = {RNNFAST_CELLS(RNNFAST_CALLS)};
#undef RNNFAST_CALLS

const CellCalls<scalar_t>& calls(int cell) {
  return cell < kFirstOwnCell ? kCells[cell] : own_calls(cell, scalar_t{});
}

}  // namespace

template <>
int64_t forward_room(int cell, const CudaChoice& choice, const ForwardArgs<scalar_t>* passes,
                     int count) {
  return calls(cell).forward_room(choice, passes, count);
}
template <>
int64_t backward_room(int cell, const CudaChoice& choice, const BackwardArgs<scalar_t>* passes,
                      int count) {
  return calls(cell).backward_room(choice, passes, count);
}
template <>
void cuda_forward(const CudaCall& call, const ForwardArgs<scalar_t>* passes, int count,
                  bool chained) {
  calls(call.cell).forward(call, passes, count, chained);
}
template <>
void cuda_backward(const CudaCall& call, const BackwardArgs<scalar_t>* passes, int count,
                   bool chained) {
  calls(call.cell).backward(call, passes, count, chained);
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
