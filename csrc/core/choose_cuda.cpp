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

namespace {

// All passes of a group have the same hidden size.
int tile_of(const Group& group, const CudaDevice& device, bool tf32, std::string* why) {
  const Shape& pass = group.passes[group.count - 1];
  const Operand operand = pass.itemsize == 2   ? Operand::kHalf
                          : pass.itemsize == 8 ? Operand::kFloat64
                          : tf32               ? Operand::kTf32
                                               : Operand::kFloat32;
  return find_tile(pass, operand, group.backward, Exchange::kNone, device, why);
}

}  // namespace

std::string why_not_onchip(const Group& group, const CudaDevice& device, bool tf32) {
  std::string why;
  tile_of(group, device, tf32, &why);
  return why;
}

CudaChoice choose_cuda(const Group& group, const CudaDevice& device, const CudaWish& wish) {
  const Shape& pass = group.passes[group.count - 1];
  // Plain launches of the step engine unless wished: no GPU has shown yet what is faster where.
  CudaChoice choice{Launch::kPlain, 1, pass.seq_len};
  if (wish.launch >= 0) choice.launch = static_cast<Launch>(wish.launch);
  if (device.capability < kDependentLaunches) choice.launch = Launch::kPlain;
  if (wish.kernel == static_cast<int>(CudaKernel::kOnchip)) {
    const int tile = tile_of(group, device, wish.tf32, nullptr);
    if (tile >= 0) {
      choice.tile = &kOnchipTiles[tile];
      choice.launch = Launch::kPlain;  // there is no product for its kernel to follow
    }
  }

  // Sums are in float, or in double.
  const int64_t row_bytes = int64_t{cell_info(pass.cell).gates} * pass.hidden_size *
                            std::max(pass.itemsize, static_cast<int>(sizeof(float)));
  const int64_t batch = std::max<int64_t>(1, pass.batch);
  choice.chunk_steps = std::clamp<int64_t>(kProjectionBytes / row_bytes / batch, 1, pass.seq_len);
  if (group.count == 1) return choice;

  if (!group.chained) {
    choice.streams = std::min(group.count, kMostStreams);
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
