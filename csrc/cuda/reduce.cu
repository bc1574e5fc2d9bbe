// The second stage of sums, which the backward kernels of every row share.
// Not yet run on a GPU.
#include "reduce.cuh"

namespace resnet_fast::cuda {
namespace {

// sum[s] = the sum of each row block's sum
// Shapes    workspace (SUMS, row blocks, K) fp32; sum[s] (K,) fp32
// Tiles     a block per FINISH_CHANNELS channels and sum: grid (cdiv(K, FINISH_CHANNELS), SUMS)
// Traffic   reads the workspace, mostly from L2
// Numerics  double, in a fixed order; one rounding, at the store
// Source    ops.affine_act_backward, ops.bn_backward_sums, ops.maxpool_backward_sums
__global__ void __launch_bounds__(FINISH_ROWS* FINISH_CHANNELS)
    finish_sums_kernel(const float* workspace, Outputs out, int64_t k, int64_t row_blocks) {
  const int64_t channel = int64_t{blockIdx.x} * FINISH_CHANNELS + threadIdx.x;
  const float* partial = workspace + blockIdx.y * row_blocks * k + channel;
  const double sum = sum_blocks(row_blocks, channel < k,
                                [=](int64_t b) { return static_cast<double>(partial[b * k]); });
  // Chosen by constants: an index would put the addresses on a stack.
  float* to = blockIdx.y == 0 ? out.sum[0] : blockIdx.y == 1 ? out.sum[1] : out.sum[2];
  if (channel < k && threadIdx.y == 0) to[channel] = static_cast<float>(sum);
}

}  // namespace

int64_t bn_workspace(int64_t npq, int64_t k) { return 3 * RowBlocks(npq, k).count * k; }

void finish_sums(int sums, const float* workspace, Outputs out, int64_t k, int64_t row_blocks,
                 Stream stream) {
  dim3 grid = finish_grid(k);
  grid.y = sums;
  launch(finish_sums_kernel, grid, finish_threads(), 0, stream, workspace, out, k, row_blocks);
}

}  // namespace resnet_fast::cuda
