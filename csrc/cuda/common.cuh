// What every kernel here shares: launching, storage types, vectors of channels, the activation, and
// the way a block covers a channels-last matrix.
//
// Nothing below uses <<<>>> or PTX: a kernel is a function, launched through launch(), and its
// threads meet only at __syncthreads() and shuffles. So it can also run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../resnet_fast.h"

namespace resnet_fast::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

/// Launches `kernel` on `stream` and reports a launch that failed.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, Stream stream,
            Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...);
  check(cudaGetLastError(), "kernel launch");  // and forget it: the next launch starts clean
}

__host__ __device__ constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Storage types on the device

template <class T>
struct Device {
  using type = T;
};

template <>
struct Device<bfloat16> {
  using type = __nv_bfloat16;
};

template <>
struct Device<float16> {
  using type = __half;
};

/// visit(), with the device's type: f(__nv_bfloat16{}) and so on.
template <class F>
void visit_device(DType dtype, F&& f) {
  visit(dtype, [&](auto host) { f(typename Device<decltype(host)>::type{}); });
}

__device__ inline float load_float(float value) { return value; }
__device__ inline float load_float(__nv_bfloat16 value) {
  uint16_t bits;
  memcpy(&bits, &value, sizeof bits);
  return __uint_as_float(uint32_t{bits} << 16);
}
__device__ inline float load_float(__half value) { return __half2float(value); }

__device__ inline void store_float(float& to, float value) { to = value; }
__device__ inline void store_float(__nv_bfloat16& to, float value) {
  to = __float2bfloat16_rn(value);
}
__device__ inline void store_float(__half& to, float value) { to = __float2half_rn(value); }

/// N neighbouring channels of one row, moved as one access of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

/// What moves so many bytes in one instruction.
template <size_t BYTES>
using Vector = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2,
                       std::conditional_t<BYTES == 4, uint32_t,
                                          std::conditional_t<BYTES == 2, uint16_t, uint8_t>>>>;

template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p) {
  using V = Vector<sizeof(Pack<T, N>)>;
  const V vector = *reinterpret_cast<const V*>(p);
  Pack<T, N> pack;
  memcpy(&pack, &vector, sizeof pack);
  return pack;
}

template <class T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) {
  using V = Vector<sizeof pack>;
  V vector;
  memcpy(&vector, &pack, sizeof pack);
  // As every store goes to L2. An assignment here becomes several stores of 4 bytes each.
  __stcg(reinterpret_cast<V*>(p), vector);
}

/// Channels a thread moves at once when all is aligned: 16 bytes of them.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

/// Whether 16-byte accesses are allowed: every row, and so every address, starts on 16 bytes.
template <class... Pointers>
bool aligned(int64_t k, Pointers... pointers) {
  return k % 8 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

/// Calls f(width) with the channels a thread moves at once: WIDE<T> as a constant if allowed, or 1.
template <class T, class F>
void visit_width(bool wide, F f) {
  if (wide) {
    f(std::integral_constant<int, WIDE<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// ---- The activation

/// y * scale + shift, rounded once. Forward and backward must agree bit for bit on which side of
/// zero it lies, so all come here.
__device__ inline float affine(float y, float scale, float shift) {
  return __fmaf_rn(y, scale, shift);
}

/// max(value, 0), NaN kept.
__device__ inline float relu(float value) { return value < 0.0f ? 0.0f : value; }

/// Whether a gradient passes where the activation is `z`: z > 0 or NaN, torch's
/// threshold_backward.
__device__ inline bool passes(float z) { return !(z <= 0.0f); }

// ---- How a block covers a channels-last matrix

constexpr int THREADS = 256;
// Elementwise: enough blocks to fill any GPU several times, few enough that loading what is per
// channel costs little.
constexpr int64_t ELEMENTWISE_BLOCKS = 4096;

/// A block of threads as `lanes` wide along channels, a power of two, and THREADS / lanes rows
/// deep. Each thread keeps to its channels and walks down the rows: what is per channel is loaded
/// once, and rows shorter than a warp's reach are read side by side.
struct Layout {
  int lanes;
  unsigned channel_blocks;

  Layout(int64_t k, int width, int min_lanes = 1) : lanes(min_lanes) {
    while (lanes < 32 && lanes * width < k) lanes *= 2;
    channel_blocks = static_cast<unsigned>(cdiv(k, int64_t{lanes} * width));
  }

  int rows() const { return THREADS / lanes; }
  dim3 block() const { return dim3(lanes, THREADS / lanes); }
  dim3 grid(int64_t row_blocks) const {
    return dim3(static_cast<unsigned>(row_blocks * channel_blocks));
  }
};

/// The rows and channels of the calling thread.
struct Place {
  int64_t row_block, first_row, last_row, channel;
};

/// Row block b covers rows [b * block_npq, (b + 1) * block_npq); threadIdx.y is the first of its
/// rows that a thread takes, and blockDim.y the step. Channel blocks vary fastest.
template <int WIDTH>
__device__ inline Place place(int64_t npq, int64_t block_npq, unsigned channel_blocks) {
  const int64_t row_block = blockIdx.x / channel_blocks;
  const int64_t channel_block = blockIdx.x % channel_blocks;
  const int64_t row = row_block * block_npq;
  return {row_block, row + threadIdx.y, smaller(row + block_npq, npq),
          (channel_block * blockDim.x + threadIdx.x) * WIDTH};
}

/// Rows of an elementwise block: whole batches of `unroll` a thread, in few enough blocks.
inline int64_t elementwise_rows(int64_t npq, const Layout& layout, int unroll) {
  const int64_t batch = int64_t{layout.rows()} * unroll;
  const int64_t blocks = cdiv(ELEMENTWISE_BLOCKS, layout.channel_blocks);
  return cdiv(cdiv(npq, blocks), batch) * batch;
}

/// Calls body on UNROLL rows at a time, as body.load(row, offset) and body(row, offset, loaded),
/// offset = row * k + channel: the loads of a batch are all under way before the first result is
/// used or stored.
template <int UNROLL, class Body>
__device__ inline void for_each_row(const Place& at, int64_t k, Body& body) {
  const int64_t step = blockDim.y;
  for (int64_t row = at.first_row; row < at.last_row; row += UNROLL * step) {
    decltype(body.load(int64_t{}, int64_t{})) loaded[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const int64_t r = row + i * step;
      if (r < at.last_row) loaded[i] = body.load(r, r * k + at.channel);
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const int64_t r = row + i * step;
      if (r < at.last_row) body(r, r * k + at.channel, loaded[i]);
    }
  }
}

/// Per-channel values of a thread, from fp32 arrays of any alignment.
template <int WIDTH>
struct Channels {
  float value[WIDTH];

  __device__ Channels(const float* p, int64_t channel) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) value[i] = p[channel + i];
  }

  __device__ float operator[](int i) const { return value[i]; }
};

}  // namespace resnet_fast::cuda
