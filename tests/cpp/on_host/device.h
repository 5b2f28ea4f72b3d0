// The device behind cuda_runtime.h: queues, their runs, and a cuBLAS in loops.
#pragma once

#include <random>
#include <vector>

#include "cuda/blas.h"

namespace on_host {

struct Settings {
  int capability = 90;
  unsigned seed = 0;
  int launches_until_failure = -1;
};
extern Settings settings;

Queue* new_queue();
void delete_queue(Queue* queue);
// Runs all work of the queues in an order drawn from the seed; an error if some can never run.
void run_all(const std::vector<Queue*>& queues, unsigned seed);

// A cuBLAS handle: its stream and workspace.
struct Handle;
Handle* new_handle();
void delete_handle(Handle* handle);
rnnfast::Blas blas_of(Handle* handle);

}  // namespace on_host
