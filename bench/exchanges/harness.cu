#include "harness.h"

#include <chrono>
#include <thread>

namespace exchanges {
namespace {

constexpr int kWarmUps = 2;
constexpr double kHangSeconds = 20;  // ten times what a kernel's own waits last

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  throw Failed("failed: " + std::string(call) + ": " + cudaGetErrorName(code) + " (" +
               cudaGetErrorString(code) + ")");
}

void Event::wait(const Gpu& gpu) const {
  const double start = now();
  for (cudaError_t code; (code = cudaEventQuery(event_)) != cudaSuccess;) {
    if (code != cudaErrorNotReady) check(code, "cudaEventQuery");
    if (now() - start > kHangSeconds) gpu.hang();
    std::this_thread::yield();
  }
}

double Event::microseconds_since(const Event& start) const {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, start.event_, event_), "cudaEventElapsedTime");
  return 1e3 * milliseconds;
}

Configuration::Configuration(const Launch& how) {
  config_.gridDim = dim3(how.blocks);
  config_.blockDim = dim3(how.threads);
  config_.dynamicSmemBytes = how.shared_bytes;
  config_.stream = how.stream;
  config_.attrs = attributes_;
  if (how.cluster > 1) {
    auto& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  if (how.cooperative) {
    auto& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (how.programmatic) {
    auto& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
}

void allow_shared(const Gpu& gpu, const void* kernel, int bytes) {
  if (bytes > gpu.max_shared_bytes)
    throw CantRun("a block needs " + std::to_string(bytes) + " bytes of shared memory, at most " +
                  std::to_string(gpu.max_shared_bytes) + " here");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

void need_blocks(const Gpu& gpu, int blocks) {
  if (blocks > gpu.sms)
    throw CantRun(std::to_string(blocks) + " blocks at one an SM, " + std::to_string(gpu.sms) +
                  " SMs here");
}

void check_verdict(const Gpu& gpu) {
  Verdict verdict;
  check(cudaMemcpy(&verdict, gpu.verdict, sizeof(verdict), cudaMemcpyDeviceToHost), "cudaMemcpy");
  check(cudaMemset(gpu.verdict, 0, sizeof(verdict)), "cudaMemset");
  if (verdict.timed_out) throw Failed("timed out: a wait on the GPU took over two seconds");
  if (verdict.wrong)
    throw Failed("wrong payload, seen " + std::to_string(verdict.wrong) + " times");
}

Measured repeat(const Gpu& gpu, long long steps, const std::function<void()>& prepare,
                const std::function<void()>& work) {
  Measured measured;
  const Event start, end;
  for (int index = -kWarmUps; index < gpu.options.repeats; ++index) {
    prepare();
    start.record(nullptr);
    work();
    end.record(nullptr);
    end.wait(gpu);
    check(cudaGetLastError(), "a kernel");
    check_verdict(gpu);
    if (index >= 0)
      measured.microseconds.push_back(end.microseconds_since(start) / static_cast<double>(steps));
  }
  return measured;
}

std::vector<int> grid_sizes(int sms) {
  std::vector<int> sizes = {32, 66, 132};
  // every thread looks after one block
  if (sms > 0 && sms <= kThreads && sms != 32 && sms != 66 && sms != 132) sizes.push_back(sms);
  return sizes;
}

}  // namespace exchanges
