// __nv_bfloat16 with the conversions of csrc/types.h. Arithmetic is float's: csrc has no other.
#pragma once

#include <cuda_runtime.h>

#include "types.h"

struct __nv_bfloat16 {
  uint16_t bits;

  constexpr __nv_bfloat16() : bits() {}  // without it g++ would guard static arrays of these
  // Any NaN becomes the one that a GPU's conversion makes.
  __nv_bfloat16(float value)
      : bits(value != value ? 0x7fff : resnet_fast::from_float<resnet_fast::bfloat16>(value).bits) {}
  operator float() const { return resnet_fast::to_float(resnet_fast::bfloat16{bits}); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {value.x, value.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
