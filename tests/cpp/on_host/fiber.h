// Fibers: functions with stacks of their own, which one processor's thread enters and which leave
// to it where they say so.
#pragma once

namespace on_host {

struct Fiber;

Fiber* new_fiber();
void delete_fiber(Fiber* fiber);
// What the next enter() begins; the fiber must be new or at its end. The work may not throw.
void start(Fiber* fiber, void (*work)(void*), void* of);
// Runs the fiber until it leaves or ends. Always from the thread that made it.
void enter(Fiber* fiber);
// From inside the fiber, which goes on here at the next enter().
void leave(Fiber* fiber);
bool has_ended(const Fiber* fiber);

}  // namespace on_host
