// What a step costs where it is a kernel of its own: launches in a stream, with programmatic
// dependence, in a graph, and the host's share.
#include <chrono>

#include "ops.cuh"

namespace exchanges {
namespace {

constexpr int kKernels = 400;  // behind the gate; a stream takes about 1000 before launches block

// One link of a chain: every block adds one to what its neighbour left in the kernel before.
template <bool kProgrammatic>
__global__ void __launch_bounds__(kThreads) link(const unsigned* from, unsigned* to) {
  if constexpr (kProgrammatic) {
    launch_dependents();
    wait_for_previous_kernel();
  }
  if (threadIdx.x == 0) to[blockIdx.x] = __ldcg(from + (blockIdx.x + 1) % gridDim.x) + 1;
}

// Holds the stream until the host has queued all, so that its speed is not what is measured.
__global__ void gate(Run run, const volatile unsigned* open) {
  Patience patience(run);
  patience.wait([&] { return *open != 0; });
}

class Gate {
 public:
  Gate() { check(cudaHostAlloc(&open_, sizeof(*open_), cudaHostAllocMapped), "cudaHostAlloc"); }
  ~Gate() { cudaFreeHost(const_cast<unsigned*>(open_)); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  void close(const Gpu& gpu, cudaStream_t stream) {
    *open_ = 0;
    unsigned* seen = nullptr;
    check(cudaHostGetDevicePointer(&seen, const_cast<unsigned*>(open_), 0),
          "cudaHostGetDevicePointer");
    launch({.threads = 1, .stream = stream}, &gate, gpu.run(0), seen);
  }
  void open() { *open_ = 1; }

 private:
  volatile unsigned* open_ = nullptr;
};

class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// The chain of kernels, and the proof that each saw what the one before wrote.
class Chain {
 public:
  Chain(int blocks, bool programmatic)
      : blocks_(blocks), programmatic_(programmatic), values_(2 * static_cast<size_t>(blocks)) {}

  void queue(int kernels, cudaStream_t stream) const {
    const Launch how = {.blocks = blocks_, .programmatic = programmatic_, .stream = stream};
    auto* const kernel = programmatic_ ? &link<true> : &link<false>;
    for (int index = 0; index < kernels; ++index)
      launch(how, kernel, static_cast<const unsigned*>(half(index)), half(index + 1));
  }

  // Leaves zeros, after everything queued so far.
  void reset() const {
    values_.fill(0);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  void verify(unsigned links) const {
    const std::vector<unsigned> values = values_.read();
    for (int block = 0; block < blocks_; ++block)
      if (values[block] != links)
        throw Failed("wrong payload, block " + std::to_string(block) + " holds " +
                     std::to_string(values[block]) + " after " + std::to_string(links) +
                     " kernels");
  }

 private:
  unsigned* half(int index) const { return values_.get() + index % 2 * blocks_; }
  int blocks_;
  bool programmatic_;
  Buffer<unsigned> values_;
};
static_assert(kKernels % 2 == 0, "the chain must end in the half that it began in");

// Times on the GPU what `queue` puts into the stream behind a closed gate. It goes once without: a
// kernel is loaded when it is first launched, and loading may wait for whatever runs.
Measured behind_gate(const Gpu& gpu, const Chain& chain, cudaStream_t stream, unsigned links,
                     const std::function<void()>& queue) {
  Measured measured;
  Gate gate;
  const Event start, end;
  queue();
  for (int index = -2; index < gpu.options.repeats; ++index) {
    chain.reset();
    gate.close(gpu, stream);
    start.record(stream);
    queue();
    end.record(stream);
    gate.open();
    end.wait(gpu);
    check_verdict(gpu);
    chain.verify(links);
    if (index >= 0) measured.microseconds.push_back(end.microseconds_since(start) / links);
  }
  return measured;
}

Measured measure_stream(const Gpu& gpu, int blocks, bool programmatic) {
  const Stream stream;
  const Chain chain(blocks, programmatic);
  return behind_gate(gpu, chain, stream.get(), kKernels,
                     [&] { chain.queue(kKernels, stream.get()); });
}

// A graph of `kernels` in a row, as captured from a stream.
class Graph {
 public:
  Graph(const Chain& chain, int kernels, cudaStream_t stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
    chain.queue(kernels, stream);
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    const cudaError_t code = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(code, "cudaGraphInstantiate");
    check(cudaGraphUpload(graph_, stream), "cudaGraphUpload");
  }
  ~Graph() { cudaGraphExecDestroy(graph_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const {
    check(cudaGraphLaunch(graph_, stream), "cudaGraphLaunch");
  }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

Measured measure_graph(const Gpu& gpu, int blocks, int kernels, int relaunches, bool programmatic) {
  const Stream stream;
  const Chain chain(blocks, programmatic);
  const Graph graph(chain, kernels, stream.get());
  return behind_gate(gpu, chain, stream.get(), kernels * relaunches, [&] {
    for (int index = 0; index < relaunches; ++index) graph.launch(stream.get());
  });
}

// The host's time for a call that queues, with nothing to wait for.
Measured measure_host(const Gpu& gpu, bool graphs, bool programmatic) {
  const Stream stream;
  const Chain chain(1, programmatic);
  constexpr int kInGraph = 100, kGraphs = 20;
  const int calls = graphs ? kGraphs : kKernels;
  Measured measured;
  const Event end;
  const auto time = [&](const Graph* graph) {
    for (int index = -2; index < gpu.options.repeats; ++index) {
      chain.reset();
      const auto start = std::chrono::steady_clock::now();
      if (graph)
        for (int call = 0; call < calls; ++call) graph->launch(stream.get());
      else
        chain.queue(calls, stream.get());
      const std::chrono::duration<double, std::micro> spent =
          std::chrono::steady_clock::now() - start;
      end.record(stream.get());
      end.wait(gpu);
      chain.verify(graph ? calls * kInGraph : calls);
      if (index >= 0) measured.microseconds.push_back(spent.count() / calls);
    }
  };
  if (graphs) {
    const Graph graph(chain, kInGraph, stream.get());
    time(&graph);
  } else {
    time(nullptr);
  }
  return measured;
}

}  // namespace

std::vector<Case> launch_cases() {
  std::vector<Case> cases;
  for (const bool programmatic : {false, true}) {
    const std::string kind = programmatic ? ", programmatic" : ", plain";
    for (const int blocks : {1, 66, 132}) {
      const Parameters parameters = {{"blocks", blocks}, {"threads", kThreads}};
      cases.push_back(
          {"kernel a step, stream" + kind, parameters, [blocks, programmatic](const Gpu& gpu) {
             return measure_stream(gpu, blocks, programmatic);
           }});
      Parameters graph = parameters;
      graph.push_back({"kernels_in_graph", kKernels});
      cases.push_back(
          {"kernel a step, graph" + kind, graph, [blocks, programmatic](const Gpu& gpu) {
             return measure_graph(gpu, blocks, kKernels, 1, programmatic);
           }});
    }
    cases.push_back(
        {"graph of two kernels relaunched, a kernel" + kind,
         {{"blocks", 132}, {"threads", kThreads}, {"kernels_in_graph", 2}},
         [programmatic](const Gpu& gpu) { return measure_graph(gpu, 132, 2, 50, programmatic); }});
    cases.push_back(
        {"host, a kernel launch" + kind, {{"blocks", 1}}, [programmatic](const Gpu& gpu) {
           return measure_host(gpu, false, programmatic);
         }});
    cases.push_back(
        {"host, a launch of a graph" + kind,
         {{"blocks", 1}, {"kernels_in_graph", 100}},
         [programmatic](const Gpu& gpu) { return measure_host(gpu, true, programmatic); }});
  }
  return cases;
}

}  // namespace exchanges
