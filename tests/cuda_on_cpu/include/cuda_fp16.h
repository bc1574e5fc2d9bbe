// __half with the conversions of csrc/types.h. Arithmetic is float's: csrc has no other.
#pragma once

#include <cuda_runtime.h>

#include "types.h"

struct __half {
  uint16_t bits;

  constexpr __half() : bits() {}  // without it g++ would guard static arrays of these
  // Any NaN becomes the one that a GPU's conversion makes.
  __half(float value)
      : bits(value != value ? 0x7fff : resnet_fast::from_float<resnet_fast::float16>(value).bits) {}
  operator float() const { return resnet_fast::to_float(resnet_fast::float16{bits}); }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __float2half_rn(float value) { return value; }
inline __half __float2half(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 value) { return {value.x, value.y}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
