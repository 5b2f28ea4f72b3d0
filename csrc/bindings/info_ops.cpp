// Operators without tensors: what runs, what would run, and what is forced. `explain` and
// `use_engine` stand on them.
#include "../core/choose_cuda.h"
#include "../cpu/dispatch.h"
#include "checks.h"

namespace rnnfast {
namespace {

int64_t field_of(int64_t field, Isa isa, int threads, const Choice& choice) {
  switch (field) {
    case 0: return static_cast<int64_t>(isa);
    case 1: return threads;
    case 2: return static_cast<int64_t>(choice.kernel_ih);
    case 3: return static_cast<int64_t>(choice.kernel_hh);
    case 4: return static_cast<int64_t>(threads > 1 ? choice.split : Split::kSerial);
  }
  fail(
      "field must be 0 (isa), 1 (threads), 2 (kernel_ih), 3 (kernel_hh), 4 (split) or, of the last "
      "run, 5 (runs) or 6 (time), got " +
      std::to_string(field));
}

bool isa_available_op(int64_t isa) {
  return isa >= 0 && isa < kNumIsas && isa_available(static_cast<Isa>(isa));
}

int64_t set_isa(int64_t isa) {
  if (isa != -1 && !isa_available_op(isa))
    fail("isa " +
         (isa >= 0 && isa < kNumIsas ? std::string(isa_name(static_cast<Isa>(isa)))
                                     : std::to_string(isa)) +
         " is not available in this build or on this processor");
  return force_isa(static_cast<int>(isa));
}

int64_t set_kernel(int64_t kernel) {
  if (kernel < -1 || kernel > 1)
    fail("kernel must be -1 (automatic), 0 (packed) or 1 (direct), got " + std::to_string(kernel));
  return force_kernel(static_cast<int>(kernel));
}

int64_t set_split(int64_t split) {
  if (split < -1 || split > 4)
    fail(
        "split must be -1 (automatic), 0 (serial), 1 (batch), 2 (units), 3 (directions) or 4 "
        "(layers), got " +
        std::to_string(split));
  return force_split(static_cast<int>(split));
}

int64_t last_run_op(int64_t field) {
  const LastRun& run = last_run();
  if (field == 5) return run.runs;
  if (field == 6) return run.time;
  return field_of(field, run.isa, run.threads, run.choice);
}

Shape checked_shape(int64_t cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
                    int64_t itemsize, int64_t threads, bool packed) {
  checked_cell(cell);
  constexpr int64_t kMost = int64_t{1} << 24;  // keeps every product of sizes in range
  for (int64_t size : {T, I, H, P, threads})
    if (size < 1 || size > kMost)
      fail("sizes T, I, H, P and threads must be in [1, 2^24], got " + std::to_string(size));
  if (B < 0 || B > kMost) fail("size B must be in [0, 2^24], got " + std::to_string(B));
  if (itemsize != 2 && itemsize != 4 && itemsize != 8)
    fail("itemsize must be 2, 4 or 8, got " + std::to_string(itemsize));
  return {id_of_code(cell), T, B, I, H, P, T * B, static_cast<int>(itemsize), packed};
}

int64_t choose(int64_t field, int64_t cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
               int64_t itemsize, int64_t threads, bool packed) {
  const Choice choice = choose_for(checked_shape(cell, T, B, I, H, P, itemsize, threads, packed),
                                   static_cast<int>(threads));
  return field_of(field, active_isa(), choice.threads, choice);
}

// Microseconds that the model gives a split with as many threads as it can use (0: it has none).
double estimate_op(int64_t split, int64_t cell, int64_t T, int64_t B, int64_t I, int64_t H,
                   int64_t P, int64_t itemsize, int64_t threads, bool packed) {
  if (split < 0 || split > 2)
    fail("split must be 0 (serial), 1 (batch) or 2 (units), got " + std::to_string(split));
  const Shape shape = checked_shape(cell, T, B, I, H, P, itemsize, threads, packed);
  const Machine machine = machine_with(static_cast<int>(threads));
  const Choice choice = choose_engine(shape, machine, {forced_kernel(), static_cast<int>(split)});
  if (static_cast<int64_t>(choice.split) != split) return 0;
  return estimate(shape, machine, choice).total();
}

// Shapes of `count` passes; the first of chained ones has input size I, the others that of their
// inputs, P.
std::vector<Shape> shapes_of(int64_t count, bool chained, const Shape& first) {
  if (count < 1 || count > 4096) fail("count must be in [1, 4096], got " + std::to_string(count));
  std::vector<Shape> shapes(count, first);
  if (chained)
    for (int64_t i = 1; i < count; ++i) shapes[i].input_size = first.output_size;
  return shapes;
}

// How several passes with these sizes run: how many at the same time (field 0), each on how many
// threads (1), and the model's microseconds one by one (2) and side by side (3; 0: can't be).
double choose_group_op(int64_t field, int64_t count, bool chained, bool backward, int64_t cell,
                       int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t itemsize,
                       int64_t threads, bool packed) {
  if (field < 0 || field > 3)
    fail("field must be 0 (teams), 1 (threads of each), 2 (one by one) or 3 (side by side), got " +
         std::to_string(field));
  const auto shapes =
      shapes_of(count, chained, checked_shape(cell, T, B, I, H, P, itemsize, threads, packed));
  const GroupChoice choice = choose_group_for(
      {shapes.data(), static_cast<int>(count), chained, backward}, static_cast<int>(threads));
  const double fields[] = {static_cast<double>(choice.teams),
                           static_cast<double>(choice.each.threads), choice.one_by_one,
                           choice.side_by_side};
  return fields[field];
}

// The passes of a question about the CUDA engine, and what it is to run them on.
struct CudaQuestion {
  std::vector<Shape> shapes;
  Group group;
  CudaDevice device;

  CudaQuestion(int64_t capability, int64_t shared_bytes, int64_t count, bool chained, bool backward,
               const Shape& first)
      : shapes(shapes_of(count, chained, first)),
        group{shapes.data(), static_cast<int>(count), chained, backward},
        device{static_cast<int>(capability), 0, static_cast<int>(shared_bytes)} {
    device.multiprocessors = 1;  // no tile that has a kernel needs more
    const std::string why = why_not_cuda(device);
    if (!why.empty()) fail(why);
  }
};

// What the CUDA engine does with such passes on a device of a compute capability (10 * major +
// minor) and so much shared memory a block, with a wished Launch and CudaKernel or -1: its Launch
// (field 0), streams (1), steps of an input projection (2), CudaKernel (3). No device is needed to
// ask.
int64_t choose_cuda_op(int64_t field, int64_t capability, int64_t shared_bytes, int64_t launch,
                       int64_t kernel, bool tf32, int64_t count, bool chained, bool backward,
                       int64_t cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
                       int64_t itemsize) {
  if (field < 0 || field > 3)
    fail("field must be 0 (launch), 1 (streams), 2 (steps) or 3 (kernel), got " +
         std::to_string(field));
  for (const auto& [name, wish, text] : {std::tuple{"launch", launch, "0 (plain) or 1 (pdl)"},
                                         std::tuple{"kernel", kernel, "0 (step) or 1 (onchip)"}})
    if (wish < -1 || wish > 1)
      fail(std::string(name) + " must be -1 (automatic), " + text + ", got " +
           std::to_string(wish));
  const CudaQuestion question(capability, shared_bytes, count, chained, backward,
                              checked_shape(cell, T, B, I, H, P, itemsize, 1, false));
  const CudaChoice choice = choose_cuda(question.group, question.device,
                                        {static_cast<int>(launch), static_cast<int>(kernel), tf32});
  const int64_t fields[] = {static_cast<int64_t>(choice.launch), choice.streams, choice.chunk_steps,
                            choice.tile ? 1 : 0};
  return fields[field];
}

// Why such passes can't be kept on chip, or an empty string.
std::string why_not_onchip_op(int64_t capability, int64_t shared_bytes, bool tf32, int64_t count,
                              bool chained, bool backward, int64_t cell, int64_t T, int64_t B,
                              int64_t I, int64_t H, int64_t P, int64_t itemsize) {
  const CudaQuestion question(capability, shared_bytes, count, chained, backward,
                              checked_shape(cell, T, B, I, H, P, itemsize, 1, false));
  return why_not_onchip(question.group, question.device, tf32);
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("isa_available(int isa) -> bool");
  m.def("set_isa(int isa) -> int");
  m.def("set_kernel(int kernel) -> int");
  m.def("set_split(int split) -> int");
  m.def("last_run(int field) -> int");
  m.def(
      "choose(int field, int cell, int T, int B, int I, int H, int P, int itemsize, int threads, "
      "bool packed=False) "
      "-> int");
  m.def(
      "choose_group(int field, int count, bool chained, bool backward, int cell, int T, int B, int "
      "I, int H, int P, int itemsize, int threads, bool packed=False) -> float");
  m.def(
      "choose_cuda(int field, int capability, int shared_bytes, int launch, int kernel, bool tf32, "
      "int count, bool chained, bool backward, int cell, int T, int B, int I, int H, int P, int "
      "itemsize) -> int");
  m.def(
      "why_not_onchip(int capability, int shared_bytes, bool tf32, int count, bool chained, bool "
      "backward, int cell, int T, int B, int I, int H, int P, int itemsize) -> str");
  m.def(
      "estimate(int split, int cell, int T, int B, int I, int H, int P, int itemsize, int threads, "
      "bool packed=False) "
      "-> float");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("isa_available", TORCH_BOX(&rnnfast::isa_available_op));
  m.impl("set_isa", TORCH_BOX(&rnnfast::set_isa));
  m.impl("set_kernel", TORCH_BOX(&rnnfast::set_kernel));
  m.impl("last_run", TORCH_BOX(&rnnfast::last_run_op));
  m.impl("choose", TORCH_BOX(&rnnfast::choose));
  m.impl("estimate", TORCH_BOX(&rnnfast::estimate_op));
  m.impl("choose_cuda", TORCH_BOX(&rnnfast::choose_cuda_op));
  m.impl("why_not_onchip", TORCH_BOX(&rnnfast::why_not_onchip_op));
  m.impl("choose_group", TORCH_BOX(&rnnfast::choose_group_op));
  m.impl("set_split", TORCH_BOX(&rnnfast::set_split));
}
