// Instructions that CUDA C++ has no name for, one thin function each. Compilers other than nvcc get
// them from ptx_on_cpu.h (tests/cuda_on_cpu), which executes them lane by lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include <ptx_on_cpu.h>
#else

namespace resnet_fast::cuda {

/// The dynamic shared memory of the block, on 128 bytes.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char resnet_fast_shared[];
  return reinterpret_cast<T*>(resnet_fast_shared);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// Starts to copy 16 bytes from global to shared memory, past the registers and L1. Both addresses
/// lie on 16 bytes. If not `valid` it writes zeros and reads nothing.
__device__ inline void cp_async_16(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 16 : 0)
               : "memory");
}

/// The copies that this thread started since the last commit are a group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until all but the latest GROUPS_LEFT groups of this thread have arrived. Other threads see
/// them after the next __syncthreads().
template <int GROUPS_LEFT>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

/// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row
/// l % 8 of matrix l / 8, on 16 bytes; r[i] is, of matrix i, elements 2 * (l % 4) and the next of
/// row l / 4.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same, each matrix transposed: r[i] is rows 2 * (l % 4) and the next of column l / 4.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// d (16x8, fp32) += a (16x16, row-major) * b (16x8, column-major), T being __nv_bfloat16 or
/// __half. With row = lane / 4 and column = 2 * (lane % 4), each pair being two neighbouring
/// columns of a or d, or rows of b: a holds (row, column), (row + 8, column), (row, column + 8),
/// (row + 8, column + 8); b holds (column, row), (column + 8, row); d holds (row, column), (row +
/// 8, column).
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace resnet_fast::cuda

#endif
