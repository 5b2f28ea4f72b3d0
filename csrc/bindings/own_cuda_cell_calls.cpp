// How rnnfast/load_cell.py hands over a cell that it compiled for CUDA, as own_cell_calls.cpp does
// it for the CPU.
#include "../cuda/own_cell.h"

// Null, or what is wrong, until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* rnnfast_register_cuda_cell(
    const rnnfast::OwnCudaCell* cell, int64_t code) {
  thread_local std::string wrong;
  wrong = rnnfast::register_own_cuda_cell(code, *cell);
  return wrong.empty() ? nullptr : wrong.c_str();
}
