// Products of a warp from shared memory: where units of 16 bytes lie there, operands by ldmatrix,
// sums of 16 pixels by 32 channels by mma.sync, and results as they are stored. T is __nv_bfloat16
// or __half. Not yet run on a GPU.
//
// A row (a pixel, or an output channel of a weight) is split into units of 16 bytes; unit u lies at
// u ^ key(row), so that the eight rows which ldmatrix reads at a time lie in different banks: they
// are neighbouring pixels (key row % 8), or the channels above (key row / 8 % 4 * 2 + row % 2).
//
// Of four neighbouring mma tiles (n8), tile t takes channels 8 * i + 2 * t and the next, i < 4: a
// thread then holds eight neighbouring channels of its pixels, one access of 16 bytes.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace resnet_fast::cuda {

// ---- Where a unit of 16 bytes lies in shared memory, in elements

template <int UNITS>
__device__ inline int pixel_at(int pixel, int unit) {
  return (pixel * UNITS + (unit ^ (pixel & 7))) * 8;
}

template <int UNITS>
__device__ inline int weight_at(int row, int unit) {
  // Rows of four units, 64 bytes: two of them fill the banks, and their parity tells them apart.
  const int key = UNITS == 4 ? row >> 3 & 3 : (row >> 3 & 3) * 2 + (row & 1);
  return (row * UNITS + (unit ^ key)) * 8;
}

// ---- Products of a warp

using Sums = float[4][4];  // 16 pixels by 32 channels: of four n8 tiles, a thread's four elements

/// The operands of 32 channels, rows `row` and on of a slab, and 16 steps of depth.
template <int UNITS, class T>
__device__ inline void load_weights(uint32_t (&b)[4][2], const T* slab, int row, int k16) {
  const int lane = threadIdx.x % 32, i = lane % 8;
#pragma unroll
  for (int two = 0; two < 2; ++two) {
    // The matrices: tile 2 * two, its first and second eight of depth; then tile 2 * two + 1.
    const int channel = row + i / 2 * 8 + (2 * two + lane / 16) * 2 + i % 2;
    uint32_t r[4];
    ldmatrix_x4(r, slab + weight_at<UNITS>(channel, 2 * k16 + lane / 8 % 2));
    b[2 * two][0] = r[0], b[2 * two][1] = r[1];
    b[2 * two + 1][0] = r[2], b[2 * two + 1][1] = r[3];
  }
}

template <class T>
__device__ inline void multiply(Sums& sums, const uint32_t (&a)[4], const uint32_t (&b)[4][2]) {
#pragma unroll
  for (int t = 0; t < 4; ++t) mma_m16n8k16<T>(sums[t], a, b[t]);
}

/// Two values as stored, the first in the low half.
template <class T>
__device__ inline uint32_t rounded(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

/// Eight neighbouring channels of a pixel, as stored. f(i) is the value of channel i.
template <class T, class F>
__device__ inline uint4 rounded_unit(F f) {
  return {rounded<T>(f(0), f(1)), rounded<T>(f(2), f(3)), rounded<T>(f(4), f(5)),
          rounded<T>(f(6), f(7))};
}

/// Channel i of the eight of a thread's, in its first (row 0) or second (1) row of eight pixels.
__device__ inline float element(const Sums& sums, int i, int row) {
  return sums[i / 2][2 * row + i % 2];
}

}  // namespace resnet_fast::cuda
