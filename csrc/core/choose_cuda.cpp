#include "choose_cuda.h"

#include <algorithm>

#include "cell_info.h"

namespace rnnfast {
namespace {

constexpr int kLeastCapability = 80, kDependentLaunches = 90;
// Of an input projection, whose results are kept in full precision until their steps.
constexpr int64_t kProjectionBytes = int64_t{512} << 20;
// A pipeline of layers: many chunks fill it soon, but a product of few rows leaves a device idle.
constexpr int64_t kPipelineChunks = 16, kPipelineRows = 512;
constexpr int kMostStreams = 8;

}  // namespace

std::string why_not_cuda(const CudaDevice& device) {
  if (device.capability >= kLeastCapability) return "";
  return "the CUDA engine needs compute capability 8.0 or higher, got " +
         std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10);
}

CudaChoice choose_cuda(const Group& group, const CudaDevice& device, const CudaWish& wish) {
  const Shape& pass = group.passes[group.count - 1];
  // Plain unless wished: no GPU has shown yet which is faster where.
  CudaChoice choice{Launch::kPlain, 1, pass.seq_len};
  if (wish.launch >= 0) choice.launch = static_cast<Launch>(wish.launch);
  if (device.capability < kDependentLaunches) choice.launch = Launch::kPlain;

  // Sums are in float, or in double.
  const int64_t row_bytes = int64_t{cell_info(pass.cell).gates} * pass.hidden_size *
                            std::max(pass.itemsize, static_cast<int>(sizeof(float)));
  const int64_t batch = std::max<int64_t>(1, pass.batch);
  choice.chunk_steps = std::clamp<int64_t>(kProjectionBytes / row_bytes / batch, 1, pass.seq_len);
  if (group.count == 1) return choice;

  if (!group.chained) {
    choice.streams = group.count;
    return choice;
  }
  if (pass.seq_len == 1) return choice;  // the others would only wait
  choice.streams = std::min(group.count, kMostStreams);
  const int64_t for_rows = (kPipelineRows + batch - 1) / batch;
  const int64_t for_pipeline = (pass.seq_len + kPipelineChunks - 1) / kPipelineChunks;
  choice.chunk_steps = std::min({choice.chunk_steps, std::max(for_rows, for_pipeline)});
  return choice;
}

}  // namespace rnnfast
