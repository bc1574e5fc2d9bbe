// CUDA's built-in device functions: barriers, warp collectives, atomics on integers, arithmetic.
// Atomics on floats are left out on purpose: their sums would depend on the order of the threads.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_on_cpu.h"

#define SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

// ---- Barriers

inline void __syncthreads(SITE) { cuda_on_cpu::syncthreads(true, site); }
inline int __syncthreads_count(int predicate, SITE) {
  return cuda_on_cpu::syncthreads(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, SITE) {
  return cuda_on_cpu::syncthreads(predicate != 0, site) > 0;
}
inline int __syncthreads_and(int predicate, SITE) {
  return cuda_on_cpu::syncthreads(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SITE) { cuda_on_cpu::syncwarp(mask, site); }
// Threads run one at a time and see each other's writes in order.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ---- Warp collectives

namespace cuda_on_cpu {

inline int lane() {
  const dim3& size = indices.block_size;
  const uint3& at = indices.thread;
  return static_cast<int>((at.x + size.x * (at.y + size.y * at.z)) % 32);
}

template <class T>
T shuffled(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  T result;
  shuffle(mask, &value, &result, sizeof value, source, site);
  return result;
}

}  // namespace cuda_on_cpu

// A source outside of its segment of `width` lanes is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SITE) {
  const int first = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::shuffled(mask, value, first + (source & (width - 1)), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SITE) {
  const int lane = cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  const int first = lane & ~(width - 1);
  return cuda_on_cpu::shuffled(mask, value, source < first ? lane : source, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SITE) {
  const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  const int last = lane | (width - 1);
  return cuda_on_cpu::shuffled(mask, value, source > last ? lane : source, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SITE) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ lane_mask;
  const int last = lane | (width - 1);
  return cuda_on_cpu::shuffled(mask, value, source > last ? lane : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SITE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, SITE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SITE) {
  return cuda_on_cpu::ballot(mask, predicate == 0, site) == 0;
}

// ---- Atomics

namespace cuda_on_cpu {

/// Not instrumented: the machine was told what this is.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* p, F update, Site site) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4);
  atomic_access(p, sizeof(T), site);
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace cuda_on_cpu

#define ATOMIC(name, expression)                                                 \
  template <class T>                                                             \
  T name(T* p, std::common_type_t<T> value, SITE) {                              \
    return cuda_on_cpu::atomic(p, [=](T old) -> T { return expression; }, site); \
  }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicSub, old - value)
ATOMIC(atomicExch, (void(old), value))
ATOMIC(atomicMin, old < value ? old : value)
ATOMIC(atomicMax, old < value ? value : old)
ATOMIC(atomicInc, old >= value ? 0 : old + 1)
ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
ATOMIC(atomicAnd, old& value)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicXor, old ^ value)
#undef ATOMIC

template <class T>
T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> value, SITE) {
  return cuda_on_cpu::atomic(p, [=](T old) -> T { return old == compare ? value : old; }, site);
}

#undef SITE

// ---- Loads and stores with a hint

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// ---- Arithmetic: g++ rounds as the names say, and fuses nothing (-ffp-contract=off)

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(double{a})); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

namespace cuda_on_cpu {

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_cpu

inline float __int_as_float(int value) { return cuda_on_cpu::same_bits<float>(value); }
inline float __uint_as_float(unsigned value) { return cuda_on_cpu::same_bits<float>(value); }
inline int __float_as_int(float value) { return cuda_on_cpu::same_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::same_bits<unsigned>(value); }
