// Small kernels for the tests of the machine itself. Most are broken, each in one way.
#include <map>

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "probes.h"

namespace resnet_fast::cuda {
namespace {

constexpr unsigned FULL = 0xffffffffu;

template <class... Parameters, class... Args>
void launch_block(void (*kernel)(Parameters...), unsigned threads, size_t smem, Args... args) {
  launch(kernel, dim3(1), dim3(threads), smem, nullptr, args...);
}

// ---- Global memory

__global__ void copy(const int* x, int* y, int64_t n, int64_t shift) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + shift];
}

__global__ void copy_shifted(const int* x, int* y, int64_t n, int64_t shift) {
  const int64_t i = threadIdx.x;
  if (i < n) y[i + shift] = x[i];
}

__global__ void copy_wide(const int* x, int* y, int64_t n, int64_t shift) {
  const int64_t i = int64_t{threadIdx.x} * 4;
  if (i + 4 <= n) store_pack(y + i, load_pack<4>(x + i + shift));
}

__global__ void write_input(const int* x, int64_t n) {
  if (threadIdx.x < n) const_cast<int*>(x)[threadIdx.x] = 0;
}

__global__ void last_block_wins(int* y) { y[0] = static_cast<int>(blockIdx.x); }

__global__ void last_atomic_wins(int* y) { atomicExch(y, static_cast<int>(blockIdx.x)); }

/// Neighbours swap their numbers through y, in two blocks. Modes 1 and 2: one barrier is missing; 3
/// and 4: the neighbour is in the other block, and its number or its place is accessed.
__global__ void swap_through_output(int* y, int64_t mode) {
  const int threads = static_cast<int>(blockDim.x);
  const int mine = static_cast<int>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  const int other = mode >= 3 ? (mine + threads) % (2 * threads) : mine ^ 1;
  y[mine] = mine;
  if (mode != 1) __syncthreads();
  const int value = mode == 4 ? mine : y[other];
  if (mode != 2) __syncthreads();
  y[mode == 4 ? other : mine] = value;
}

__global__ void read_nothing(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x]; }

// ---- Barriers and warps

__global__ void divergent_barrier(int* y) {
  if (threadIdx.x < 40) {
    y[threadIdx.x] = 1;
    __syncthreads();
  } else {
    y[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void barrier_after_return(int* y) {
  if (threadIdx.x >= 40) {
    y[threadIdx.x] = 2;
    return;
  }
  __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void shuffle_against_barrier(int* y) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(FULL, value, 1);
  __syncthreads();
  y[threadIdx.x] = value;
}

__global__ void shuffle_outside_of_mask(int* y) {
  y[threadIdx.x] = __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 0);
}

__global__ void shuffle_from_outside(int* y) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_sync(0xffffu, value, 20);
  y[threadIdx.x] = value;
}

/// Every collective of every lane, for a test that knows what they are: 12 results a thread.
__global__ void warp_collectives(const int* x, int* y) {
  const int thread = threadIdx.x;
  const int value = x[thread];
  int* out = y + thread * 12;
  out[0] = __shfl_sync(FULL, value, 5);
  out[1] = __shfl_sync(FULL, value, thread + 3, 8);
  out[2] = __shfl_up_sync(FULL, value, 3);
  out[3] = __shfl_down_sync(FULL, value, 3, 16);
  out[4] = __shfl_xor_sync(FULL, value, 7);
  out[5] = static_cast<int>(__ballot_sync(FULL, value & 1));
  out[6] = __any_sync(FULL, value == x[blockDim.x - 1]);
  out[7] = __all_sync(FULL, value >= 0);
  const double wide = __shfl_xor_sync(FULL, value + 0.5, 16);
  out[8] = static_cast<int>(wide * 2);
  const unsigned half = thread % 32 < 16 ? 0xffffu : 0xffff0000u;
  if (half == 0xffffu) {
    out[9] = static_cast<int>(__ballot_sync(half, value & 1));
  } else {
    out[9] = static_cast<int>(__ballot_sync(half, value & 2));
  }
  out[10] = __syncthreads_count(value & 1);
  out[11] = __syncthreads_or(value < 0) * 2 + __syncthreads_and(value >= 0);
}

// ---- Shared memory

__global__ void shared_index(int* y, int64_t index) {
  __shared__ int shared[8][4];
  for (int i = 0; i < 4; ++i) shared[threadIdx.x][i] = i;
  y[threadIdx.x] = shared[threadIdx.x][index];
}

__global__ void dynamic_shared_index(int* y, int64_t index) {
  int* shared = dynamic_shared<int>();
  shared[index] = 1;
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void shared_unwritten(int* y) {
  __shared__ int shared[32];
  if (threadIdx.x < 31) shared[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

/// Neighbours swap. Mode 0: right; 1: no barrier before the read; 2: none before the next write;
/// 3: a __syncwarp before the read, which is enough for neighbours in a warp.
__global__ void swap_neighbours(const int* x, int* y, int64_t mode) {
  __shared__ int shared[64];
  const int thread = threadIdx.x;
  shared[thread] = x[thread];
  if (mode == 0 || mode == 2) __syncthreads();
  if (mode == 3) __syncwarp();
  y[thread] = shared[thread ^ 1];
  if (mode == 0) __syncthreads();
  if (mode < 3) shared[thread] = 0;
}

// ---- Atomics

/// y[v]: how often v stands in x; y[bins]: the tickets taken; y[bins + 1]: their sum by the last
/// block, which knows by its ticket that all others are done.
__global__ void histogram(const int* x, int* y, int64_t n, int64_t bins) {
  __shared__ int local[16];
  __shared__ bool last;
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&local[x[i]], 1);
  __syncthreads();
  if (threadIdx.x < bins) atomicAdd(y + threadIdx.x, local[threadIdx.x]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(y + bins, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int sum = 0;
    for (int64_t b = 0; b < bins; ++b) sum += y[b];
    y[bins + 1] = sum;
  }
}

__global__ void atomics(int* y) {
  atomicMax(y, static_cast<int>(threadIdx.x));
  atomicMin(y + 1, -static_cast<int>(threadIdx.x));
  atomicOr(y + 2, 1 << threadIdx.x % 31);
  atomicInc(reinterpret_cast<unsigned*>(y + 3), 9u);
  atomicCAS(y + 4, 0, 7);
  if (threadIdx.x == 5) atomicExch(y + 5, 11);
}

// ---- Copies and matrices

/// y = x through shared memory. Mode 0: right; 1: read before the wait; 2: the wait leaves one
/// group too many; 3: no barrier behind the wait, and another thread's copy is read; 4: zeros.
__global__ void copy_async(const int* x, int* y, int64_t mode) {
  auto* shared = dynamic_shared<int4>();
  const int thread = threadIdx.x, other = thread ^ 1;
  cp_async_16(shared + thread, x + thread * 4, mode != 4);
  cp_async_commit();
  if (mode != 1) {
    if (mode == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
  }
  if (mode != 3) __syncthreads();
  const int4 value = shared[other];
  *reinterpret_cast<int4*>(y + other * 4) = value;
}

/// y (M, N) fp32 = x (M, K) * w, w being (N, K) or, TRANS, (K, N); by one warp, 16 x 8 of y at a
/// time, K by 16. M and K are multiples of 16, N of 8; a row of zeros pads each to 16 x 16.
template <class T, bool TRANS>
__global__ void matmul(const T* x, const T* w, float* y, int64_t m, int64_t n, int64_t k) {
  constexpr int PITCH = 24;  // elements from row to row
  __shared__ __align__(16) T a_tile[16 * PITCH];
  __shared__ __align__(16) T b_tile[16 * PITCH];
  const int lane = threadIdx.x;
  const int tile_row = lane / 2, tile_column = lane % 2 * 8;
  for (int64_t row = 0; row < m; row += 16) {
    for (int64_t column = 0; column < n; column += 8) {
      float d[4] = {};
      for (int64_t i = 0; i < k; i += 16) {
        cp_async_16(a_tile + tile_row * PITCH + tile_column,
                    x + (row + tile_row) * k + i + tile_column);
        if (TRANS) {  // rows are K
          cp_async_16(b_tile + tile_row * PITCH + tile_column, w + (i + tile_row) * n + column,
                      tile_column == 0);
        } else {  // rows are N
          cp_async_16(b_tile + tile_row * PITCH + tile_column,
                      w + (column + tile_row) * k + i + tile_column, tile_row < 8);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        uint32_t a[4], b[4];
        // The matrices: upper left, lower left, upper right, lower right.
        const int at = (lane % 16) * PITCH + lane / 16 * 8;
        ldmatrix_x4(a, a_tile + at);
        uint32_t two[2];
        if (TRANS) {
          ldmatrix_x4_trans(b, b_tile + at);
          two[0] = b[0], two[1] = b[1];
        } else {
          ldmatrix_x4(b, b_tile + at);
          two[0] = b[0], two[1] = b[2];
        }
        mma_m16n8k16<T>(d, a, two);
        __syncthreads();
      }
      for (int i = 0; i < 4; ++i) {
        y[(row + lane / 4 + i / 2 * 8) * n + column + lane % 4 * 2 + i % 2] = d[i];
      }
    }
  }
}

__global__ void mma_in_half_a_warp(float* y) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) mma_m16n8k16<__half>(d, a, b);
  y[threadIdx.x] = d[0];
}

template <class T, bool TRANS>
void launch_matmul(const Probe& p) {
  launch_block(matmul<T, TRANS>, 32, 0, static_cast<const T*>(p.x), static_cast<const T*>(p.w),
               static_cast<float*>(p.y), p.size[0], p.size[1], p.size[2]);
}

const int* x_of(const Probe& p) { return static_cast<const int*>(p.x); }
int* y_of(const Probe& p) { return static_cast<int*>(p.y); }

const std::map<std::string, void (*)(const Probe&)> PROBES = {
    {"copy",
     [](const Probe& p) {
       launch(copy, dim3(2), dim3(64), 0, nullptr, x_of(p), y_of(p), p.size[0], p.size[1]);
     }},
    {"copy_shifted",
     [](const Probe& p) {
       launch_block(copy_shifted, 64, 0, x_of(p), y_of(p), p.size[0], p.size[1]);
     }},
    {"copy_wide",
     [](const Probe& p) {
       launch_block(copy_wide, 32, 0, x_of(p), y_of(p), p.size[0], p.size[1]);
     }},
    {"write_input", [](const Probe& p) { launch_block(write_input, 32, 0, x_of(p), p.size[0]); }},
    {"last_block_wins",
     [](const Probe& p) { launch(last_block_wins, dim3(3), dim3(1), 0, nullptr, y_of(p)); }},
    {"last_atomic_wins",
     [](const Probe& p) { launch(last_atomic_wins, dim3(3), dim3(1), 0, nullptr, y_of(p)); }},
    {"swap_through_output",
     [](const Probe& p) {
       for (int64_t i = 0; i < p.size[1]; ++i) {
         launch(swap_through_output, dim3(2), dim3(64), 0, nullptr, y_of(p), p.size[0]);
       }
     }},
    {"read_nothing",
     [](const Probe& p) {
       launch_block(read_nothing, 1, 0, static_cast<const int*>(nullptr), y_of(p));
     }},
    {"divergent_barrier", [](const Probe& p) { launch_block(divergent_barrier, 64, 0, y_of(p)); }},
    {"barrier_after_return",
     [](const Probe& p) { launch_block(barrier_after_return, 64, 0, y_of(p)); }},
    {"shuffle_against_barrier",
     [](const Probe& p) { launch_block(shuffle_against_barrier, 64, 0, y_of(p)); }},
    {"shuffle_outside_of_mask",
     [](const Probe& p) { launch_block(shuffle_outside_of_mask, 32, 0, y_of(p)); }},
    {"shuffle_from_outside",
     [](const Probe& p) { launch_block(shuffle_from_outside, 32, 0, y_of(p)); }},
    {"warp_collectives",
     [](const Probe& p) { launch_block(warp_collectives, 64, 0, x_of(p), y_of(p)); }},
    {"shared_index", [](const Probe& p) { launch_block(shared_index, 8, 0, y_of(p), p.size[0]); }},
    {"dynamic_shared_index",
     [](const Probe& p) { launch_block(dynamic_shared_index, 1, p.size[1], y_of(p), p.size[0]); }},
    {"shared_unwritten", [](const Probe& p) { launch_block(shared_unwritten, 32, 0, y_of(p)); }},
    {"swap_neighbours",
     [](const Probe& p) { launch_block(swap_neighbours, 64, 0, x_of(p), y_of(p), p.size[0]); }},
    {"histogram",
     [](const Probe& p) {
       check(cudaMemsetAsync(p.y, 0, 12 * sizeof(int)), "memset");
       const dim3 grid(static_cast<unsigned>(cdiv(p.size[0], 64)));
       launch(histogram, grid, dim3(64), 0, nullptr, x_of(p), y_of(p), p.size[0], int64_t{10});
     }},
    {"atomics",
     [](const Probe& p) {
       check(cudaMemsetAsync(p.y, 0, 6 * sizeof(int)), "memset");
       launch_block(atomics, 64, 0, y_of(p));
     }},
    {"copy_async",
     [](const Probe& p) {
       launch_block(copy_async, 64, 64 * sizeof(int4), x_of(p), y_of(p), p.size[0]);
     }},
    {"memset", [](const Probe& p) { check(cudaMemsetAsync(p.y, 0, p.size[0]), "memset"); }},
    {"matmul_bfloat16", launch_matmul<__nv_bfloat16, false>},
    {"matmul_float16", launch_matmul<__half, false>},
    {"matmul_trans_bfloat16", launch_matmul<__nv_bfloat16, true>},
    {"matmul_trans_float16", launch_matmul<__half, true>},
    {"mma_in_half_a_warp",
     [](const Probe& p) { launch_block(mma_in_half_a_warp, 32, 0, static_cast<float*>(p.y)); }},
    {"allow_shared",
     [](const Probe& p) {
       const cudaError_t error =
           cudaFuncSetAttribute(dynamic_shared_index, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(p.size[0]));
       cudaGetLastError();  // as CUDA does, the next launch would report it again
       check(error, "shared memory");
     }},
};

}  // namespace
}  // namespace resnet_fast::cuda

void run_probe(const std::string& name, const Probe& probe) {
  resnet_fast::cuda::PROBES.at(name)(probe);
}
