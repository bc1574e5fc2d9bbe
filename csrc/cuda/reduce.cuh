// Reductions over the rows of a matrix, in two stages: blocks of rows into the workspace, and then
// those blocks in order. How the rows are cut follows from the matrix's shape alone, and there are
// no atomics: results are bitwise equal from run to run.
#pragma once

#include "common.cuh"

namespace resnet_fast::cuda {

// Row blocks times channels: bounds the workspace and the time of the second stage. With
// MAX_ROW_BLOCKS it makes some 1000 blocks of THREADS, 8 for each multiprocessor of an H100.
constexpr int64_t PARTIALS = 262144;
constexpr int64_t MAX_ROW_BLOCKS = 1024;
// Rows a thread loads at once in the first stage, at most: a row block is a multiple of them.
constexpr int REDUCE_BATCH = 8;
// The second stage: 8 channels are one 32-byte sector, and 64 threads share their row blocks.
constexpr int FINISH_CHANNELS = 8;
constexpr int FINISH_ROWS = 64;

/// How a reduction cuts the rows, whatever the storage type.
struct RowBlocks {
  int64_t block_npq, count;

  RowBlocks(int64_t npq, int64_t k) {
    int64_t limit = smaller(PARTIALS / k, MAX_ROW_BLOCKS);
    if (limit < 1) limit = 1;
    const int64_t batch = REDUCE_BATCH * Layout(k, 8).rows();
    block_npq = npq > 0 ? cdiv(cdiv(npq, limit), batch) * batch : batch;
    count = cdiv(npq, block_npq);
  }
};

/// Sums `value` over the rows of the block, in a fixed order; every thread gets its channels' sum.
/// All threads of the block must call it.
template <int WIDTH>
__device__ inline void sum_rows(float (&value)[WIDTH]) {
  __shared__ float shared[WIDTH][THREADS];
  const int lanes = blockDim.x;
  const int thread = threadIdx.y * lanes + threadIdx.x;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) shared[i][thread] = value[i];
  __syncthreads();
  for (int rows = blockDim.y / 2; rows > 0; rows /= 2) {
    if (threadIdx.y < rows) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) shared[i][thread] += shared[i][thread + rows * lanes];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) value[i] = shared[i][threadIdx.x];
  __syncthreads();  // the next call writes here again
}

/// The end of stage 1 of sums: the threads of a block together, then to the workspace.
template <int SUMS, int WIDTH>
__device__ inline void finish_block(float (&sums)[SUMS][WIDTH], const Place& at, int64_t k,
                                    int64_t row_blocks, float* workspace) {
#pragma unroll
  for (int s = 0; s < SUMS; ++s) {
    sum_rows(sums[s]);
    if (at.channel < k && threadIdx.y == 0) {
      float* out = workspace + (s * row_blocks + at.row_block) * k + at.channel;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out[i] = sums[s][i];
    }
  }
}

/// Sums term(row block) over the row blocks, FINISH_ROWS threads to a channel, in double and in a
/// fixed order. All threads of the block must call it; each gets its channel's sum.
template <class Term>
__device__ inline double sum_blocks(int64_t row_blocks, bool inside, Term term) {
  __shared__ double shared[FINISH_ROWS][FINISH_CHANNELS];
  double sum = 0;
  // Unrolled for the loads, which all start before the first addition: this stage is latency.
#pragma unroll 8
  for (int64_t b = threadIdx.y; b < (inside ? row_blocks : 0); b += FINISH_ROWS) sum += term(b);
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int rows = FINISH_ROWS / 2; rows > 0; rows /= 2) {
    if (threadIdx.y < rows) {
      shared[threadIdx.y][threadIdx.x] += shared[threadIdx.y + rows][threadIdx.x];
    }
    __syncthreads();
  }
  sum = shared[0][threadIdx.x];
  __syncthreads();  // the next call writes here again
  return sum;
}

/// The grid and block of a second stage.
inline dim3 finish_grid(int64_t k) { return dim3(static_cast<unsigned>(cdiv(k, FINISH_CHANNELS))); }
inline dim3 finish_threads() { return dim3(FINISH_CHANNELS, FINISH_ROWS); }

/// Up to three outputs, of which the first `sums` are used.
struct Outputs {
  float* sum[3];
};

/// Stage 2 of sums: workspace (sums, row blocks, k) -> out.sum[s] (k,).
void finish_sums(int sums, const float* workspace, Outputs out, int64_t k, int64_t row_blocks,
                 Stream stream);

}  // namespace resnet_fast::cuda
