// The engine's calls for the LSTM with recurrent batch normalisation, compiled once a dtype
// (RNNFAST_SCALAR): float and double.
#include "batch_norm_pass.h"
#include "engine.h"
#include "run_passes.h"

namespace rnnfast {
namespace {

using scalar_t = RNNFAST_SCALAR;
using Forward = RNNFAST_TARGET::BatchNormForwardPass<scalar_t>;
using Backward = RNNFAST_TARGET::BatchNormBackwardPass<scalar_t>;

template <class Pass>
int64_t room_of(const CudaChoice& choice, const typename Pass::Args& args) {
  RNNFAST_TARGET::Arena arena(nullptr);
  RNNFAST_TARGET::passes_of<Pass>(&args, 1, choice, arena);
  return arena.used();
}

}  // namespace

template <>
int64_t batch_norm_room(const CudaChoice& choice, const BatchNormArgs<scalar_t>& args) {
  return room_of<Forward>(choice, args);
}
template <>
int64_t batch_norm_room(const CudaChoice& choice, const BatchNormBackwardArgs<scalar_t>& args) {
  return room_of<Backward>(choice, args);
}
template <>
void cuda_batch_norm(const CudaCall& call, const BatchNormArgs<scalar_t>& args) {
  RNNFAST_TARGET::run_passes<Forward>(call, &args, 1, false);
}
template <>
void cuda_batch_norm(const CudaCall& call, const BatchNormBackwardArgs<scalar_t>& args) {
  RNNFAST_TARGET::run_passes<Backward>(call, &args, 1, false);
}

}  // namespace rnnfast
