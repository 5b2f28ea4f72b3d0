// One pass of a layer, or several of them side by side: the choice, the scratch memory, the
// threads.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernel_of.h"
#include "run_widened.h"

namespace rnnfast {
namespace {

thread_local LastRun last_run_value{};

// Scratch of the calling thread, kept between calls: fresh memory costs a page fault every 4 KiB,
// which is more than many a kernel. What a large layer needed is given back.
class Scratch {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset(static_cast<char*>(std::aligned_alloc(4096, rounded)));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }
  void trim() {
    if (size_ > kKept) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr int64_t kKept = 128 << 20;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};
thread_local Scratch scratch;

// What last_run tells: AVX512_BF16 and AMX ran only where their products did; all else of them is
// AVX-512.
Isa ran_on(Isa isa, WeightFormat format) {
  const bool extended = isa == Isa::kAvx512Bf16 || isa == Isa::kAmx;
  return extended && format == WeightFormat::kPlain ? Isa::kAvx512 : isa;
}

// A pass that is ready to run: where its scratch is measured, and what runs it.
template <class Args>
struct Planned {
  const Args* args;
  Choice choice;
  int64_t (*bytes)(const Args&, const Choice&);
  void (*run)(const Args&, const Choice&, char*, const Worker&);
  Isa ran;  // for last_run
  char* memory = nullptr;

  int64_t scratch_bytes() const { return (bytes(*args, choice) + 4095) / 4096 * 4096; }
  static void work(void* context, const Worker& worker) {
    const auto& planned = *static_cast<Planned*>(context);
    planned.run(*planned.args, planned.choice, planned.memory, worker);
  }
};

void note_run(Isa isa, int threads, const Choice& choice) {
  const int64_t runs = last_run_value.runs + 1;
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  last_run_value = {isa, threads, choice, runs,
                    std::chrono::duration_cast<std::chrono::nanoseconds>(now).count()};
}

template <class Args>
void run_planned(Planned<Args> planned, const Threads& threads) {
  planned.memory = scratch.reserve(planned.scratch_bytes());
  const int ran =
      run_team(planned.choice.threads, threads.parallel_for, Planned<Args>::work, &planned);
  scratch.trim();
  note_run(planned.ran, ran, planned.choice);
}

// Passes at the same time, all with the same choice. Of chained ones each but the first follows the
// one before.
template <class Args>
void run_side_by_side(std::vector<Planned<Args>>& planned, Args* args, bool chained,
                      const Threads& threads) {
  const int count = static_cast<int>(planned.size()), each = planned[0].choice.threads;
  std::vector<StepsDone> done(chained ? (count - 1) * each : 0);
  for (int i = 1; i < count && chained; ++i)
    args[i].leader = args[i - 1].done = &done[(i - 1) * each];
  int64_t bytes = 0;
  for (const auto& pass : planned) bytes += pass.scratch_bytes();
  char* memory = scratch.reserve(bytes);
  std::vector<void*> contexts;
  for (auto& pass : planned) {
    pass.memory = memory;
    memory += pass.scratch_bytes();
    contexts.push_back(&pass);
  }
  const int ran =
      run_teams(count, each, threads.parallel_for, Planned<Args>::work, contexts.data());
  scratch.trim();
  Choice choice = planned[0].choice;
  if (ran > 1) choice.split = chained ? Split::kLayers : Split::kDirections;
  note_run(planned[0].ran, ran, choice);
}

// As many passes at a time as the choice says; one that is left has all threads for itself.
// plan(i, choice) plans the i-th pass, alone(i) runs it.
template <class Args, class Plan, class Alone>
void run_group(Args* args, int count, bool chained, const GroupChoice& choice,
               const Threads& threads, const Plan& plan, const Alone& alone) {
  for (int begin = 0; begin < count; begin += choice.teams) {
    const int end = std::min(count, begin + choice.teams);
    if (end - begin == 1) {
      alone(begin);
      continue;
    }
    std::vector<Planned<Args>> planned;
    for (int i = begin; i < end; ++i) planned.push_back(plan(i, choice.each));
    run_side_by_side(planned, args + begin, chained, threads);
  }
}

template <class scalar_t>
Shape shape_of(int cell, const LayerArgs<scalar_t>& args) {
  return {cell,
          args.seq_len,
          args.batch,
          args.input_size,
          args.hidden_size,
          args.output_size,
          args.rows,
          static_cast<int>(sizeof(scalar_t)),
          false};
}

template <class scalar_t>
Shape shape_of(int cell, const ForwardArgs<scalar_t>& args) {
  Shape shape = shape_of(cell, static_cast<const LayerArgs<scalar_t>&>(args));
  shape.packed = args.packed != nullptr;
  return shape;
}

template <class scalar_t>
Planned<ForwardArgs<scalar_t>> plan_forward(Isa isa, int cell, ForwardArgs<scalar_t>& args,
                                            WeightFormat format, Choice choice) {
  if (args.packed) {
    choice.kernel_ih = Kernel::kPacked;
    if (choice.kernel_hh != Kernel::kNone) choice.kernel_hh = Kernel::kPacked;
  } else {
    // No direct kernel reads groups.
    const bool all = choice.kernel_ih == Kernel::kPacked && choice.kernel_hh != Kernel::kDirect;
    format = all ? packed_format<scalar_t>(isa, cell) : WeightFormat::kPlain;
  }
  const auto dot_for = [&](int64_t rows) {
    const DotKernels dot = dot_kernels(isa, rows);
    if (format != WeightFormat::kInt8) return dot.bfloat16;
    return dot.int8 ? dot.int8 : kernels(isa).int8_product;
  };
  args.dot_ih = dot_for(args.rows);
  args.dot_hh = dot_for(args.batch);
  const auto& k = forward_kernels(isa, cell, format, scalar_t{});
  return {&args, choice, k.scratch, k.run, ran_on(isa, format)};
}

template <class scalar_t>
Planned<BackwardArgs<scalar_t>> plan_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args,
                                              const Choice& choice) {
  const auto& k = backward_kernels(isa, cell, scalar_t{});
  return {&args, choice, k.scratch, k.run, ran_on(isa, WeightFormat::kPlain)};
}

template <class Args>
GroupChoice choose_for_all(int cell, const Args* args, int count, bool chained, bool backward,
                           const Threads& threads) {
  std::vector<Shape> shapes;
  for (int i = 0; i < count; ++i) shapes.push_back(shape_of(cell, args[i]));
  return choose_group_for({shapes.data(), count, chained, backward}, threads.count);
}

}  // namespace

const LastRun& last_run() { return last_run_value; }
void note_plain_run(int threads, const Choice& choice) {
  note_run(ran_on(active_isa(), WeightFormat::kPlain), threads, choice);
}

template <class scalar_t>
void run_forward(Isa isa, int cell, ForwardArgs<scalar_t>& args, WeightFormat format,
                 const Threads& threads) {
  if constexpr (kIsHalf<scalar_t>)
    if (is_widened<scalar_t>(cell)) return run_forward_widened(isa, cell, args, threads);
  run_planned(
      plan_forward(isa, cell, args, format, choose_for(shape_of(cell, args), threads.count)),
      threads);
}

template <class scalar_t>
void run_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args, const Threads& threads) {
  run_planned(plan_backward(isa, cell, args, choose_for(shape_of(cell, args), threads.count)),
              threads);
}

template <class scalar_t>
void run_forward_group(Isa isa, int cell, ForwardArgs<scalar_t>* args, const WeightFormat* formats,
                       int count, bool chained, const Threads& threads) {
  if (is_widened<scalar_t>(cell)) {
    for (int i = 0; i < count; ++i) run_forward(isa, cell, args[i], formats[i], threads);
    return;
  }
  run_group(
      args, count, chained, choose_for_all(cell, args, count, chained, false, threads), threads,
      [&](int i, const Choice& each) { return plan_forward(isa, cell, args[i], formats[i], each); },
      [&](int i) { run_forward(isa, cell, args[i], formats[i], threads); });
}

template <class scalar_t>
void run_backward_group(Isa isa, int cell, BackwardArgs<scalar_t>* args, int count, bool chained,
                        const Threads& threads) {
  run_group(
      args, count, chained, choose_for_all(cell, args, count, chained, true, threads), threads,
      [&](int i, const Choice& each) { return plan_backward(isa, cell, args[i], each); },
      [&](int i) { run_backward(isa, cell, args[i], threads); });
}

template <class scalar_t>
void run_sample_product(const SampleProduct<scalar_t>& product, const Threads& threads) {
  const SampleKernel<scalar_t>& kernel = sample_kernel(active_isa(), scalar_t{});
  const int64_t bytes = (kernel.scratch(product) + 4095) / 4096 * 4096;
  const int64_t workers = std::min<int64_t>(threads.count, product.samples);
  char* memory = scratch.reserve(workers * bytes);
  auto work = [&](long begin, long end) {
    for (long w = begin; w < end; ++w)
      kernel.run(product, product.samples * w / workers, product.samples * (w + 1) / workers,
                 memory + w * bytes);
  };
  const auto run = [](long begin, long end, void* context) {
    (*static_cast<decltype(work)*>(context))(begin, end);
  };
  if (workers > 1)
    threads.parallel_for(static_cast<int>(workers), run, &work);
  else
    work(0, 1);
  scratch.trim();
}

#define RNNFAST_INSTANTIATE(scalar_t)                                                         \
  template void run_forward(Isa, int, ForwardArgs<scalar_t>&, WeightFormat, const Threads&);  \
  template void run_forward_group(Isa, int, ForwardArgs<scalar_t>*, const WeightFormat*, int, \
                                  bool, const Threads&);
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)
RNNFAST_INSTANTIATE(BFloat16)
RNNFAST_INSTANTIATE(Float16)
template void run_backward(Isa, int, const BackwardArgs<float>&, const Threads&);
template void run_backward(Isa, int, const BackwardArgs<double>&, const Threads&);
template void run_backward_group(Isa, int, BackwardArgs<float>*, int, bool, const Threads&);
template void run_backward_group(Isa, int, BackwardArgs<double>*, int, bool, const Threads&);

template void run_sample_product(const SampleProduct<float>&, const Threads&);
template void run_sample_product(const SampleProduct<double>&, const Threads&);

}  // namespace rnnfast
