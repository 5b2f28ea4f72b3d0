// What every measurement of this program shares: launches, buffers, a clock, and rows of results.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace exchanges {

constexpr int kThreads = 256;
constexpr int kHidden = 1024;             // units of h that the blocks of a grid hold together
constexpr int kOneBlockAnSm = 120 << 10;  // bytes of shared memory that keep a second block away

// Written by kernels: values that were not what the sender wrote, and waits that were given up.
struct Verdict {
  unsigned wrong;
  unsigned timed_out;
};

// What every kernel is given: where to complain, cycles to wait at most, and steps to run.
struct Run {
  Verdict* verdict;
  long long patience;
  int steps;
};

// Ways for a row to end without a number; the text is the row's status.
struct CantRun : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Parameters = std::vector<std::pair<std::string, long long>>;

struct Measured {
  std::vector<double> microseconds;  // of one step, a repetition each
  double bytes = 0;                  // moved in a step, where the row is about bandwidth
  Parameters found;                  // sizes that the GPU decided
};

struct Options {
  int repeats = 15;
  int steps = 2000;
  double seconds = 120;  // rows that would begin later are left out
  std::string only;      // part of a row's name
};

// The GPU as found, and the state that measurements share.
struct Gpu {
  int sms = 0;
  int max_shared_bytes = 0;  // of one block
  long long patience = 0;    // cycles of two seconds
  Options options;
  Verdict* verdict = nullptr;
  std::function<void()> hang;  // reports what is known and ends the process
  Run run(int steps) const { return {verdict, patience, steps}; }
};

struct Case {
  std::string name;
  Parameters parameters;
  std::function<Measured(const Gpu&)> measure;
};

// Throws Failed with the call's name where `code` is an error.
void check(cudaError_t code, const char* call);

// Memory of the GPU that is freed at the end of its scope.
template <class value_t>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(value_t)), "cudaMalloc");
    fill(0);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  value_t* get() const { return data_; }
  size_t bytes() const { return count_ * sizeof(value_t); }
  void fill(int byte) const { check(cudaMemsetAsync(data_, byte, bytes()), "cudaMemsetAsync"); }
  std::vector<value_t> read() const {
    std::vector<value_t> values(count_);
    check(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  size_t count_;
  value_t* data_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) const {
    check(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  // Bounded: a GPU that hangs is reported and ends the process.
  void wait(const Gpu& gpu) const;
  double microseconds_since(const Event& start) const;

 private:
  cudaEvent_t event_ = nullptr;
};

// How a kernel is launched; the attributes of cudaLaunchKernelEx under their plain names.
struct Launch {
  int blocks = 1;
  int threads = kThreads;
  int shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;
  bool programmatic = false;
  cudaStream_t stream = nullptr;
};

// A Launch in the form that CUDA wants; the attributes live inside, so it is not copied.
class Configuration {
 public:
  explicit Configuration(const Launch& how);
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[3];
  cudaLaunchConfig_t config_ = {};
};

template <class... Formal, class... Actual>
void launch(const Launch& how, void (*kernel)(Formal...), Actual... arguments) {
  const Configuration configuration(how);
  check(cudaLaunchKernelEx(configuration.get(), kernel, static_cast<Formal>(arguments)...),
        "cudaLaunchKernelEx");
}

// Lets a kernel use that much dynamic shared memory, or says why it can't.
void allow_shared(const Gpu& gpu, const void* kernel, int bytes);

// One block an SM is all that the grid-wide rows ask for.
void need_blocks(const Gpu& gpu, int blocks);

// Times `work`, `steps` steps long, on the default stream; `prepare` comes before each, untimed.
// A wrong payload or a wait that was given up ends the row.
Measured repeat(const Gpu& gpu, long long steps, const std::function<void()>& prepare,
                const std::function<void()>& work);

// Throws Failed where the kernels since the last call complained.
void check_verdict(const Gpu& gpu);

// The rows, a file each. Grid sizes hold the GPU's own number of SMs, if it is known.
std::vector<Case> grid_cases(int sms);
std::vector<Case> flag_cases(int sms);
std::vector<Case> in_band_cases(int sms);
std::vector<Case> cluster_cases();
std::vector<Case> launch_cases();
std::vector<Case> ceiling_cases();

// 32, 66 and 132 blocks, and all SMs where their number is another.
std::vector<int> grid_sizes(int sms);

}  // namespace exchanges
