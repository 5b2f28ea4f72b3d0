// The device behind cuda_runtime.h: queues, their runs, and a cuBLAS in loops.
#pragma once

#include <random>
#include <vector>

#include "cuda/blas.h"

namespace on_host {

struct Settings {
  int capability = 90;
  int shared_bytes = 227 << 10;  // that a block may ask for
  unsigned seed = 0;
  int launches_until_failure = -1;
  bool tf32 = false;  // what torch would say
};
extern Settings settings;

Queue* new_queue();
void delete_queue(Queue* queue);
// Before the work of a call: what the first of its streams, the caller's, still had to do.
void begin_call(Queue* caller);
// Runs all work of the queues in an order drawn from the seed. An error if some can never run, if
// another stream began before the caller's had come to the call, or goes on after it.
void run_all(const std::vector<Queue*>& queues, unsigned seed);

// A cuBLAS handle: its stream and workspace.
struct Handle;
Handle* new_handle();
void delete_handle(Handle* handle);
rnnfast::Blas blas_of(Handle* handle);

}  // namespace on_host
