// The only source of a library that rnnfast.load_cell compiles: the user's header comes before it
// (-include), RNNFAST_OWN_CELL names the struct in it, RNNFAST_OWN_ISA the instruction set.
#include "own_cell.h"

#include "../cells/contract.h"
#include "../cells/info.h"
#include "instances.h"

namespace rnnfast {

namespace {
TeamCalls team{};
}  // namespace

// The engine's own are hidden in its library.
void barrier(const Worker& worker) { team.barrier(worker); }
void note_done(StepsDone* own, const Worker& worker, int64_t steps) {
  team.note_done(own, worker, steps);
}
void wait_for(const StepsDone* leader, const Worker& worker, int64_t steps) {
  team.wait_for(leader, worker, steps);
}

namespace RNNFAST_TARGET {
namespace {

using Own = RNNFAST_OWN_CELL;

template <class Cell>
constexpr OwnCell own_cell() {
  if constexpr (fulfils_contract<Cell>()) {
    static_assert(!kKeepsOf<Cell>, "a cell of load_cell has no zoneout (kKeeps)");
    return {RNNFAST_ENGINE_STAMP,
            Isa::RNNFAST_OWN_ISA,
            info_of<Cell>(RNNFAST_OWN_NAME, false, false),
            {Forward<Cell, Plain<float>>::table(), Forward<Cell, Plain<double>>::table(),
             Backward<Cell, float>::table(), Backward<Cell, double>::table()},
            [](const TeamCalls& calls) { team = calls; }};
  } else {
    return {};  // the assertions have said why
  }
}

}  // namespace
}  // namespace RNNFAST_TARGET
}  // namespace rnnfast

extern "C" __attribute__((visibility("default"))) const rnnfast::OwnCell* rnnfast_own_cell() {
  static constexpr rnnfast::OwnCell cell =
      rnnfast::RNNFAST_TARGET::own_cell<rnnfast::RNNFAST_TARGET::Own>();
  return &cell;
}
