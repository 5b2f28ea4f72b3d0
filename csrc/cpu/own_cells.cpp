// The cells that the process was given at run time, and their kernels.
#include <atomic>
#include <stdexcept>

#include "engine_stamp.h"  // made by the build
#include "own_cell.h"

namespace rnnfast {
namespace {

// By cell and instruction set; filled once each.
std::atomic<const OwnKernels*> kernels_of[kMostOwnCells][kNumIsas];

// AVX512_BF16 and AMX have other products of small numbers only.
Isa compiled_isa(Isa isa) {
  return isa == Isa::kAvx512Bf16 || isa == Isa::kAmx ? Isa::kAvx512 : isa;
}

}  // namespace

const char* const kEngineStamp = RNNFAST_ENGINE_STAMP;

std::string register_own_cell(int64_t code, const OwnCell& cell) {
  if (std::string(cell.engine) != kEngineStamp)
    return std::string("it was compiled with the headers ") + cell.engine +
           ", and this build of rnnfast has the headers " + kEngineStamp;
  const int id = add_own_cell(code, cell.info);
  if (id < 0)
    return "a process has room for " + std::to_string(kMostOwnCells) +
           " different ones, which are there already";
  cell.connect({barrier, note_done, wait_for});
  kernels_of[id - kFirstOwnCell][static_cast<int>(cell.isa)].store(&cell.kernels,
                                                                   std::memory_order_release);
  return "";
}

const OwnKernels& own_kernels(Isa isa, int cell) {
  const OwnKernels* found =
      kernels_of[cell - kFirstOwnCell][static_cast<int>(compiled_isa(isa))].load(
          std::memory_order_acquire);
  if (found) return *found;
  throw std::runtime_error(std::string("rnnfast: cell ") + cell_info(cell).name +
                           " was not compiled for " + isa_name(compiled_isa(isa)) +
                           ", which is in force: call rnnfast.load_cell for it again");
}

}  // namespace rnnfast
