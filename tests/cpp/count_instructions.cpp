// One call of a kernel, for a tool that counts its instructions (tests/instructions.py runs this
// under callgrind): AVX2, since valgrind knows no AVX-512, one thread, and everything but the
// call in functions that do not count.
//
//   count_instructions KERNEL [CALLS]    prints kernel, shape, fused multiply-adds of vectors that
//                                        the call cannot do without, compiler
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "core/cell_info.h"
#include "cpu/dispatch.h"

using namespace rnnfast;

namespace {

constexpr int64_t kLanes = 8;  // floats in a vector of AVX2
using Values = std::vector<float>;

struct Counted {
  const char* name;
  int cell;
  int64_t T, B, I, H;
  bool backward;
};

// Ids of csrc/cells/list.h. The step is the one that a stream pays for each input.
const Counted kCounted[] = {
    {"lstm_forward", 0, 20, 16, 64, 128, false},
    {"gru_backward", 1, 20, 16, 64, 128, true},
    {"lstm_step", 0, 1, 1, 256, 256, false},
};

Values uniform(int64_t size) {
  static std::mt19937 random(1);
  std::uniform_real_distribution<float> values(-0.1F, 0.1F);
  Values made(size);
  for (float& v : made) v = values(random);
  return made;
}

struct Problem {
  const Counted& kernel;
  Values x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, h_n, c_n, saved;
  Values dy, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh;
  ForwardArgs<float> forward{};
  BackwardArgs<float> backward{};

  explicit Problem(const Counted& k) : kernel(k) {
    const CellInfo& info = cell_info(k.cell);
    const int64_t gates = info.gates * k.H, rows = k.T * k.B, inner = info.states - 1;
    x = uniform(rows * k.I), h0 = uniform(k.B * k.H), c0 = uniform(inner * k.B * k.H);
    w_ih = uniform(gates * k.I), w_hh = uniform(gates * k.H);
    b_ih = uniform(gates), b_hh = uniform(gates), dy = uniform(rows * k.H);
    y.resize(rows * k.H), h_n.resize(k.B * k.H), c_n.resize(c0.size());
    saved.resize(rows * (info.saved + inner) * k.H);
    dx.resize(x.size()), dh0.resize(h0.size()), dc0.resize(c0.size());
    dw_ih.resize(w_ih.size()), dw_hh.resize(w_hh.size()), db_ih.resize(gates), db_hh.resize(gates);

    fill(forward);
    forward.y = y.data(), forward.h_n = h_n.data(), forward.c_n = c_n.data();
    forward.saved = k.backward ? saved.data() : nullptr;
    fill(backward);
    backward.dy = {dy.data(), k.B * k.H, k.H};
    backward.y = y.data(), backward.saved = saved.data();
    backward.dx = dx.data(), backward.dh0 = dh0.data(), backward.dc0 = dc0.data();
    backward.dw_ih = dw_ih.data(), backward.dw_hh = dw_hh.data();
    backward.db_ih = db_ih.data(), backward.db_hh = db_hh.data();
  }
  Problem(const Problem&) = delete;

  void fill(LayerArgs<float>& args) const {
    args.seq_len = kernel.T, args.batch = kernel.B, args.input_size = kernel.I;
    args.hidden_size = args.output_size = kernel.H, args.rows = kernel.T * kernel.B;
    args.x = {x.data(), kernel.B * kernel.I, kernel.I};
    args.h0 = h0.data(), args.c0 = c0.data(), args.w_ih = w_ih.data(), args.w_hh = w_hh.data();
    args.b_ih = b_ih.data(), args.b_hh = b_hh.data();
  }

  // The products alone: backward has twice those of forward, for the inputs and for the weights.
  int64_t floor() const {
    const int64_t products = kernel.T * kernel.B * cell_info(kernel.cell).gates * kernel.H;
    return (kernel.backward ? 2 : 1) * products * (kernel.I + kernel.H) / kLanes;
  }

  void run(bool backwards) const {
    if (backwards) {
      run_backward(Isa::kAvx2, kernel.cell, backward, {1, nullptr});
    } else {
      ForwardArgs<float> args = forward;
      run_forward(Isa::kAvx2, kernel.cell, args, WeightFormat::kPlain, {1, nullptr});
    }
  }
};

}  // namespace

// Counting is switched on at its entry and off at its end, by its name.
extern "C" __attribute__((noinline, visibility("default"))) void rnnfast_counted_calls(
    const void* problem, int calls) {
  for (int i = 0; i < calls; ++i) {
    const Problem& p = *static_cast<const Problem*>(problem);
    p.run(p.kernel.backward);
  }
}

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const int calls = argc > 2 ? std::atoi(argv[2]) : 1;
  for (const Counted& kernel : kCounted) {
    if (name != kernel.name) continue;
    if (!isa_available(Isa::kAvx2)) {
      std::fprintf(stderr, "count_instructions: must have avx2 in the build and the processor\n");
      return 3;
    }
    const Problem problem(kernel);
    problem.run(false);  // scratch memory, and for backward what forward keeps
    if (kernel.backward) problem.run(true);
    rnnfast_counted_calls(&problem, calls);
    std::printf("%s\nT%ld B%ld I%ld H%ld\n%ld\n%s %s\n", kernel.name, long(kernel.T),
                long(kernel.B), long(kernel.I), long(kernel.H), long(problem.floor()),
#ifdef __clang__
                "clang",
#else
                "gcc",
#endif
                __VERSION__);
    return 0;
  }
  std::fprintf(stderr, "count_instructions: KERNEL must be one of");
  for (const Counted& kernel : kCounted) std::fprintf(stderr, " %s", kernel.name);
  std::fprintf(stderr, ", got '%s'\n", name.c_str());
  return 2;
}
