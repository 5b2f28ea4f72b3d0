// Compiles every cell of the list as device code, forward and backward, so that a cell that only a
// CPU understands is noticed where it is written. The CUDA engines will call the same functions;
// nothing here is installed or launched.
#include "../cells/list.h"

namespace rnnfast::RNNFAST_TARGET {

template <class Cell, class scalar_t>
__global__ void cell_on_device(const scalar_t* in, scalar_t* out, int count) {
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= count) return;
  scalar_t gx[Cell::kGates], gh[Cell::kGates], state[Cell::kStates], prev[Cell::kStates];
  scalar_t saved[at_least_one<Cell::kSaved>] = {}, dstate[Cell::kStates], dgx[Cell::kGates],
           dgh[Cell::kGates];
  for (int g = 0; g < Cell::kGates; ++g) gx[g] = gh[g] = in[g * count + unit];
  for (int k = 0; k < Cell::kStates; ++k) state[k] = prev[k] = dstate[k] = in[k * count + unit];
  Cell::forward(gx, gh, state, saved);
  Cell::backward(saved, prev, state, dstate, dgx, dgh);
  out[unit] = state[0] + dstate[0] + dgx[0] + dgh[0];
}

#define RNNFAST_ON_DEVICE(id, name, Type)                                          \
  template __global__ void cell_on_device<Type, float>(const float*, float*, int); \
  template __global__ void cell_on_device<Type, double>(const double*, double*, int);
RNNFAST_CELLS(RNNFAST_ON_DEVICE)

}  // namespace rnnfast::RNNFAST_TARGET
