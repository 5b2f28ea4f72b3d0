// The cells that the process was given for CUDA at run time, and their calls.
#include <atomic>
#include <stdexcept>

#include "engine_stamp.h"  // made by the build
#include "own_cell.h"

namespace rnnfast {
namespace {

std::atomic<const OwnCudaCalls*> calls_of[kMostOwnCells];

}  // namespace

std::string register_own_cuda_cell(int64_t code, const OwnCudaCell& cell) {
  if (std::string(cell.engine) != RNNFAST_ENGINE_STAMP)
    return std::string("it was compiled with the headers ") + cell.engine +
           ", and this build of rnnfast has the headers " + RNNFAST_ENGINE_STAMP;
  const int id = add_own_cell(code, cell.info);
  if (id < 0)
    return "a process has room for " + std::to_string(kMostOwnCells) +
           " different ones, which are there already";
  calls_of[id - kFirstOwnCell].store(&cell.calls, std::memory_order_release);
  return "";
}

const OwnCudaCalls& own_cuda_calls(int cell) {
  const OwnCudaCalls* found = calls_of[cell - kFirstOwnCell].load(std::memory_order_acquire);
  if (found) return *found;
  throw std::runtime_error(std::string("rnnfast: cell ") + cell_info(cell).name +
                           " was not compiled for CUDA");
}

}  // namespace rnnfast
