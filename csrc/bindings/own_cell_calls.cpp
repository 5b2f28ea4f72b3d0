// How rnnfast/load_cell.py hands over a cell that it compiled, through ctypes: it has the address
// of a library's OwnCell, which is no type of an operator.
#include "../cpu/own_cell.h"

#define RNNFAST_EXPORT extern "C" __attribute__((visibility("default")))

RNNFAST_EXPORT const char* rnnfast_engine_stamp() { return rnnfast::kEngineStamp; }

// Null, and the cell's numbers in `numbers`; or what is wrong, until the thread's next call.
RNNFAST_EXPORT const char* rnnfast_register_cell(const rnnfast::OwnCell* cell, int64_t code,
                                                 int64_t* numbers) {
  thread_local std::string wrong;
  wrong = rnnfast::register_own_cell(code, *cell);
  if (!wrong.empty()) return wrong.c_str();
  const rnnfast::CellInfo& info = cell->info;
  for (const int64_t number :
       {int64_t{info.gates}, int64_t{info.states}, int64_t{info.saved}, int64_t{info.parameters},
        int64_t{info.dense}, int64_t{info.diagonal}, int64_t{info.split_gates}})
    *numbers++ = number;
  return nullptr;
}
