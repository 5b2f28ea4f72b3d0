#include "device.h"

#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>

#include "core/half.h"

namespace on_host {

struct EventState {
  int64_t recorded = 0, reached = 0;
};

struct Work {
  std::function<void()> run;
  std::shared_ptr<EventState> waits;  // for reached >= until
  int64_t until = 0;
};

struct Queue {
  std::deque<Work> work;
  bool in_call = false;
};

struct Handle {
  Queue* stream = nullptr;
  void* workspace = nullptr;
  int math_mode = 3;              // as torch leaves it where TF32 is allowed
  std::map<void*, Queue*> owner;  // of a workspace
};

Settings settings;
int launches_until_failure = -1;
int64_t launches = 0, dependent_launches = 0;

Queue* new_queue() { return new Queue; }
void delete_queue(Queue* queue) { delete queue; }

void enqueue(Queue* queue, std::function<void()> work) {
  queue->work.push_back({std::move(work), nullptr, 0});
}

void begin_call(Queue* caller) {
  enqueue(caller, [caller] { caller->in_call = true; });
}

void run_all(const std::vector<Queue*>& queues, unsigned seed) {
  std::mt19937 random(seed);
  seed_blocks(seed);
  Queue* caller = queues[0];
  // What the caller launches next, and may read results.
  enqueue(caller, [&queues, caller] {
    for (Queue* queue : queues)
      if (queue != caller && !queue->work.empty())
        throw std::runtime_error("on_host: a stream goes on after the call");
  });
  for (;;) {
    std::vector<Queue*> ready;
    bool left = false;
    for (Queue* queue : queues) {
      if (queue->work.empty()) continue;
      left = true;
      const Work& next = queue->work.front();
      if (!next.waits || next.waits->reached >= next.until) ready.push_back(queue);
    }
    if (!left) return;
    if (ready.empty()) throw std::runtime_error("on_host: streams wait for each other for ever");
    Queue* chosen = ready[random() % ready.size()];
    // A few at a time, so that one may run far ahead of the others.
    for (unsigned count = 1 + random() % 8; count > 0 && !chosen->work.empty(); --count) {
      Work& next = chosen->work.front();
      if (next.waits && next.waits->reached < next.until) break;
      if (chosen != caller && !caller->in_call)
        throw std::runtime_error("on_host: a stream began before the call");
      if (next.run) next.run();
      chosen->work.pop_front();
    }
  }
}

// --- cuBLAS ---

namespace {

using rnnfast::BFloat16;
using rnnfast::Float16;
namespace maths = rnnfast::RNNFAST_TARGET;

double number(const void* from, int type, int64_t at) {
  switch (type) {
    case 0: return static_cast<const float*>(from)[at];
    case 1: return static_cast<const double*>(from)[at];
    case 2:
      return maths::widen_float16<float>(
          static_cast<uint32_t>(static_cast<const Float16*>(from)[at].bits));
    case 14:
      return maths::bit_cast<float>(
          static_cast<uint32_t>(static_cast<const BFloat16*>(from)[at].bits) << 16);
  }
  throw std::runtime_error("on_host: no such type: " + std::to_string(type));
}

void put(void* to, int type, int64_t at, double value) {
  const float rounded = static_cast<float>(value);
  switch (type) {
    case 0: static_cast<float*>(to)[at] = rounded; return;
    case 1: static_cast<double*>(to)[at] = value; return;
    case 2:
      static_cast<Float16*>(to)[at].bits =
          static_cast<uint16_t>(maths::narrow_float16<float, uint32_t>(rounded));
      return;
    case 14:
      static_cast<BFloat16*>(to)[at].bits =
          static_cast<uint16_t>(maths::narrow_bfloat16<float, uint32_t>(rounded));
      return;
  }
  throw std::runtime_error("on_host: no such type: " + std::to_string(type));
}

// The operand of a product that rounds to TF32: 10 bits of mantissa.
double rounded(double value, bool tf32) {
  if (!tf32) return value;
  const uint32_t bits = maths::bit_cast<uint32_t>(static_cast<float>(value));
  return maths::bit_cast<float>((bits + 0x1000u) & ~0x1fffu);
}

int gemm_ex(void* handle_of, int op_a, int op_b, int64_t m, int64_t n, int64_t k,
            const void* alpha_of, const void* a, int type_a, int64_t lda, const void* b, int type_b,
            int64_t ldb, const void* beta_of, void* c, int type_c, int64_t ldc, int compute,
            int algorithm) {
  constexpr int kInvalid = 7;
  auto* handle = static_cast<Handle*>(handle_of);
  if (m < 1 || n < 1 || k < 1 || lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m ||
      type_a != type_b || algorithm != -1)
    return kInvalid;
  // The combinations that cuBLAS lists, with sums in float or double.
  const bool wide = compute == 70;
  if (wide ? type_a != 1 || type_c != 1
           : (compute != 68 && compute != 77) || type_a == 1 || (type_c != 0 && type_c != type_a) ||
                 (compute == 77 && type_a != 0))
    return kInvalid;
  if (handle->math_mode & 3) return kInvalid;  // the mode alone must not choose TF32
  if (handle->workspace) {
    Queue*& owner = handle->owner[handle->workspace];
    if (owner && owner != handle->stream) return kInvalid;  // two streams would share it
    owner = handle->stream;
  }
  const double alpha = wide ? *static_cast<const double*>(alpha_of)
                            : static_cast<double>(*static_cast<const float*>(alpha_of));
  const double beta = wide ? *static_cast<const double*>(beta_of)
                           : static_cast<double>(*static_cast<const float*>(beta_of));
  const bool tf32 = compute == 77;
  enqueue(handle->stream, [=] {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l)
          sum += rounded(number(a, type_a, op_a ? l + i * lda : i + l * lda), tf32) *
                 rounded(number(b, type_b, op_b ? j + l * ldb : l + j * ldb), tf32);
        const int64_t at = i + j * ldc;
        put(c, type_c, at, alpha * sum + (beta != 0 ? beta * number(c, type_c, at) : 0));
      }
  });
  return 0;
}

int set_stream(void* handle, cudaStream_t stream) {
  static_cast<Handle*>(handle)->stream = stream;
  static_cast<Handle*>(handle)->workspace = nullptr;  // as cuBLAS does
  return 0;
}
int set_workspace(void* handle, void* workspace, size_t) {
  static_cast<Handle*>(handle)->workspace = workspace;
  return 0;
}
int get_math_mode(void* handle, int* mode) {
  *mode = static_cast<Handle*>(handle)->math_mode;
  return 0;
}
int set_math_mode(void* handle, int mode) {
  static_cast<Handle*>(handle)->math_mode = mode;
  return 0;
}

}  // namespace

Handle* new_handle() { return new Handle; }
void delete_handle(Handle* handle) { delete handle; }
rnnfast::Blas blas_of(Handle* handle) {
  rnnfast::Blas blas;
  blas.handle = handle;
  blas.gemm_ex = gemm_ex;
  blas.set_stream = set_stream;
  blas.set_workspace = set_workspace;
  blas.get_math_mode = get_math_mode;
  blas.set_math_mode = set_math_mode;
  return blas;
}

}  // namespace on_host

// --- the runtime ---

const char* cudaGetErrorName(cudaError_t status) {
  if (status == cudaErrorInvalidValue) return "cudaErrorInvalidValue";
  return status == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
                                                 : "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the device on the host"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new std::shared_ptr<on_host::EventState>(new on_host::EventState);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;  // work that waits for it goes on knowing it, as in CUDA
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const int64_t ticket = ++(*event)->recorded;
  on_host::enqueue(stream, [state = *event, ticket] { state->reached = ticket; });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream->work.push_back({nullptr, *event, (*event)->recorded});
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  on_host::enqueue(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  on_host::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
