// A call of the engine on a device of its own: scratch memory of exactly the size asked for,
// filled.
#pragma once

#include "cuda/engine.h"
#include "device.h"

namespace rnnfast {

// Calls run(CudaCall), then what it launched, in an order drawn from `seed`.
template <class Run>
void call_on_device(int cell, const CudaChoice& choice, int64_t room_bytes, unsigned seed,
                    const Run& run) {
  std::vector<char> room(room_bytes, char(0xfe));
  std::vector<CudaStream> streams(choice.streams);
  std::vector<on_host::Queue*> queues;
  std::vector<char> workspaces(choice.streams);
  on_host::Handle* handle = on_host::new_handle();
  for (int i = 0; i < choice.streams; ++i) {
    queues.push_back(on_host::new_queue());
    streams[i] = {queues[i], choice.streams > 1 ? &workspaces[i] : nullptr, 1};
  }
  const Blas blas = on_host::blas_of(handle);
  blas.set_stream(handle, queues[0]);
  on_host::begin_call(queues[0]);
  run(CudaCall{cell, choice, blas, streams.data(), room.data()});
  on_host::run_all(queues, seed);
  for (on_host::Queue* queue : queues) on_host::delete_queue(queue);
  on_host::delete_handle(handle);
}

}  // namespace rnnfast
