#include "cuda_run.h"

#include <atomic>
#include <chrono>

#include "cuda_ops.h"
#include "results.h"

namespace rnnfast {
namespace {

std::atomic<int> wished_launch{-1}, wished_kernel{-1};

struct LastCudaRun {
  int64_t runs = 0, time = 0;
  CudaChoice choice{};
  int capability = 0;
  bool tf32 = false;
};
thread_local LastCudaRun last_run;

}  // namespace

Shape cuda_shape(const CheckedLayer& layer, int64_t cell, size_t itemsize) {
  Shape shape{id_of_code(cell),  layer.seq_len,     layer.batch, layer.input_size,
              layer.hidden_size, layer.output_size, layer.rows,  static_cast<int>(itemsize)};
  shape.drops_h = layer.drops_h;
  return shape;
}

void run_on_cuda(const CudaPasses& passes, const std::function<int64_t(const CudaChoice&)>& room_of,
                 const std::function<void(const CudaCall&)>& engine) {
  const bool tf32 = passes.dtype == ScalarType::Float && ask_torch_for_tf32();
  CudaContext context(passes.place);
  const CudaDevice device = context.device();
  const std::string why = why_not_cuda(device);
  if (!why.empty()) fail(why);
  const Shape* shapes = passes.shapes.data();
  const int count = static_cast<int>(passes.shapes.size());
  const Group group{shapes, count, passes.chained, passes.backward};
  const CudaWish wish{wished_launch, wished_kernel, tf32};
  if (wish.kernel == static_cast<int>(CudaKernel::kOnchip)) {
    std::string forced =
        passes.why_only_step ? passes.why_only_step : why_not_onchip(group, device, tf32);
    // What forward keeps is for a backward that must be able to run.
    if (forced.empty() && passes.saves)
      forced = why_not_onchip({shapes, count, passes.chained, true}, device, tf32);
    if (!forced.empty()) fail(forced + " (use_engine forces the on-chip kernel)");
  }
  const CudaChoice choice = choose_cuda(group, device, wish);
  const Tensor room = empty({room_of(choice)}, ScalarType::Byte, passes.place);
  const CudaStream* streams = context.streams(choice.streams);
  engine({shapes[0].cell, choice, context.blas(tf32), streams, out<char>(room)});
  context.finish();
  const int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(
                          std::chrono::steady_clock::now().time_since_epoch())
                          .count();
  last_run = {last_run.runs + 1, now, choice, device.capability, tf32};
}

int64_t cuda_set_launch(int64_t launch) {
  if (launch < -1 || launch > 1)
    fail("launch must be -1 (automatic), 0 (plain) or 1 (pdl), got " + std::to_string(launch));
  return wished_launch.exchange(static_cast<int>(launch));
}

int64_t cuda_set_kernel(int64_t kernel) {
  if (kernel < -1 || kernel > 1)
    fail("kernel must be -1 (automatic), 0 (step) or 1 (onchip), got " + std::to_string(kernel));
  return wished_kernel.exchange(static_cast<int>(kernel));
}

int64_t cuda_last_run(int64_t field) {
  switch (field) {
    case 0: return last_run.runs;
    case 1: return last_run.time;
    case 2: return static_cast<int64_t>(last_run.choice.launch);
    case 3: return last_run.choice.streams;
    case 4: return last_run.capability;
    case 5: return last_run.tf32;
    case 6:
      return static_cast<int64_t>(last_run.choice.tile ? CudaKernel::kOnchip : CudaKernel::kStep);
  }
  fail(
      "field must be 0 (runs), 1 (time), 2 (launch), 3 (streams), 4 (compute capability), 5 (TF32) "
      "or 6 (kernel), got " +
      std::to_string(field));
}

}  // namespace rnnfast
