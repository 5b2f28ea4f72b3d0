// A step of a frozen layer, called from rnnfast/_step_plan.py through ctypes: an operator's way
// from Python and back takes longer than a small layer's step. The caller has checked everything;
// here are pointers only, no tensors, and no exception leaves.
#include <memory>
#include <vector>

#include "cpu_calls.h"

namespace rnnfast {
namespace {

// One layer, as ctypes lays it out; all of it lives as long as the plan.
struct StepLayer {
  int64_t input_size, hidden_size, output_size;
  const void *w_hh, *b_ih, *b_hh, *w_hr;  // biases and w_hr may be null
  const char* packed;
  int64_t packed_bytes;
};

struct StepPlan {
  Isa isa;
  int cell;
  CellOptions options;
  ScalarType dtype;
  std::vector<StepLayer> layers;
};

template <class scalar_t>
LayerArgs<scalar_t> sizes_of(const StepLayer& layer) {
  LayerArgs<scalar_t> args{};
  const auto numbers = [](const void* from) { return static_cast<const scalar_t*>(from); };
  args.seq_len = 1;
  args.input_size = layer.input_size;
  args.hidden_size = layer.hidden_size;
  args.output_size = layer.output_size;
  args.w_hh = numbers(layer.w_hh);
  args.b_ih = numbers(layer.b_ih);
  args.b_hh = numbers(layer.b_hh);
  args.w_hr = numbers(layer.w_hr);
  return args;
}

template <class scalar_t>
bool arguments(const StepPlan& plan, const StepLayer& layer, ForwardArgs<scalar_t>& args,
               WeightFormat& format) {
  static_cast<LayerArgs<scalar_t>&>(args) = sizes_of<scalar_t>(layer);
  args.options = plan.options;
  return take_packed(plan.isa, plan.cell, layer.packed, layer.packed_bytes, args, format);
}

// x (B, I), h and c (L, B, features) or null, reset (B) or null, y (B, P), h_out and c_out as h and
// c. c is the one inner state of a cell.
struct StepTensors {
  int64_t batch;
  const char *x, *h, *c;
  const uint8_t* reset;
  char *y, *h_out, *c_out;
};

template <class scalar_t>
void run_step(const StepPlan& plan, const StepTensors& t) {
  const scalar_t* x = reinterpret_cast<const scalar_t*>(t.x);
  const bool inner = cell_info(plan.cell).states > 1;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const StepLayer& layer = plan.layers[l];
    ForwardArgs<scalar_t> args{};
    WeightFormat format;
    arguments(plan, layer, args, format);
    args.batch = args.rows = t.batch;
    args.x = {x, t.batch * layer.input_size, layer.input_size};
    args.reset = t.reset;
    const int64_t h = static_cast<int64_t>(l) * t.batch * layer.output_size,
                  c = static_cast<int64_t>(l) * t.batch * layer.hidden_size;
    if (t.h) args.h0 = reinterpret_cast<const scalar_t*>(t.h) + h;
    if (inner && t.c) args.c0 = reinterpret_cast<const scalar_t*>(t.c) + c;
    args.h_n = reinterpret_cast<scalar_t*>(t.h_out) + h;
    if (inner) args.c_n = reinterpret_cast<scalar_t*>(t.c_out) + c;
    // Of one step, y and h_n are the same numbers.
    args.y = l + 1 == plan.layers.size() ? reinterpret_cast<scalar_t*>(t.y) : args.h_n;
    run_forward(plan.isa, plan.cell, args, format, torch_threads());
    x = args.h_n;
  }
}

}  // namespace
}  // namespace rnnfast

#define RNNFAST_EXPORT extern "C" __attribute__((visibility("default")))

// Null: the packed weights are not those of this ISA, cell, type and sizes, or no memory is left.
// dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16.
RNNFAST_EXPORT void* rnnfast_make_step_plan(int isa, int64_t cell, int dtype, int64_t count,
                                            const rnnfast::StepLayer* layers) {
  using namespace rnnfast;
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                   ScalarType::Half};
  try {
    auto plan = std::make_unique<StepPlan>();
    *plan = {static_cast<Isa>(isa),
             id_of_code(cell),
             options_of_code(cell),
             kTypes[dtype],
             {layers, layers + count}};
    bool fits = true;
    with_type(plan->dtype, [&](auto scalar) {
      for (const StepLayer& layer : plan->layers) {
        ForwardArgs<decltype(scalar)> args{};
        WeightFormat format;
        fits = fits && arguments(*plan, layer, args, format);
      }
    });
    return fits ? plan.release() : nullptr;
  } catch (...) {
    return nullptr;
  }
}

RNNFAST_EXPORT void rnnfast_free_step_plan(void* plan) {
  delete static_cast<rnnfast::StepPlan*>(plan);
}

// Not 0: it failed, and what it was to write is undefined.
RNNFAST_EXPORT int rnnfast_step(const void* plan_pointer, int64_t batch, const void* x,
                                const void* h, const void* c, const void* reset, void* y,
                                void* h_out, void* c_out) {
  using namespace rnnfast;
  try {
    const auto& plan = *static_cast<const StepPlan*>(plan_pointer);
    const StepTensors tensors{batch,
                              static_cast<const char*>(x),
                              static_cast<const char*>(h),
                              static_cast<const char*>(c),
                              static_cast<const uint8_t*>(reset),
                              static_cast<char*>(y),
                              static_cast<char*>(h_out),
                              static_cast<char*>(c_out)};
    with_type(plan.dtype, [&](auto scalar) { run_step<decltype(scalar)>(plan, tensors); });
    return 0;
  } catch (...) {
    return 1;
  }
}
