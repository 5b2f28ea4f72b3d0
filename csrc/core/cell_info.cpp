#include "cell_info.h"

#include <atomic>
#include <mutex>

#include "../cells/info.h"
#include "../cells/list.h"
#include "cell_code.h"

namespace rnnfast {
namespace {

#define RNNFAST_COUNT(id, name, Type) +1
constexpr int kWithDotKernels = RNNFAST_CELLS_OF_ALL_FORMATS(RNNFAST_COUNT);
constexpr int kWithHalfKernels = RNNFAST_CELLS_OF_ALL_TYPES(RNNFAST_COUNT);

#define RNNFAST_INFO(id, name, Type)                                           \
  RNNFAST_TARGET::info_of<RNNFAST_TARGET::Type>(#name, (id) < kWithDotKernels, \
                                                (id) < kWithHalfKernels),
const CellInfo kCells[] = {RNNFAST_CELLS(RNNFAST_INFO)};
static_assert(sizeof(kCells) / sizeof(kCells[0]) <= kFirstOwnCell);

struct Own {
  int64_t code;
  CellInfo info;
};
Own own_cells[kMostOwnCells];
std::atomic<int> own_count{0};  // what is below it never changes
std::mutex adding;

}  // namespace

const int kNumCells = static_cast<int>(sizeof(kCells) / sizeof(kCells[0]));

const CellInfo& cell_info(int cell) {
  return cell < kFirstOwnCell ? kCells[cell] : own_cells[cell - kFirstOwnCell].info;
}

int own_cell_id(int64_t code) {
  const int count = own_count.load(std::memory_order_acquire);
  for (int i = 0; i < count; ++i)
    if (own_cells[i].code == code) return kFirstOwnCell + i;
  return -1;
}

int add_own_cell(int64_t code, const CellInfo& info) {
  const std::lock_guard lock(adding);
  const int known = own_cell_id(code), count = own_count.load(std::memory_order_relaxed);
  if (known >= 0) return known;
  if (count == kMostOwnCells) return -1;
  own_cells[count] = {code, info};
  own_count.store(count + 1, std::memory_order_release);
  return kFirstOwnCell + count;
}

}  // namespace rnnfast
