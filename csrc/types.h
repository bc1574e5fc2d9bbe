// Storage types, and the one switch over them.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace resnet_fast {

enum class DType : int { float32, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The conversions are `static`: csrc/cpu compiles this header for several instruction sets, and the
// linker would otherwise keep one copy for all of them, perhaps the one this machine cannot run.

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(bfloat16 value) { return bits_float(uint32_t{value.bits} << 16); }

static inline float to_float(float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return bits_float(sign | 0x7f800000u | magnitude);  // Inf, NaN
  // Read as a float the exponent is 112 too small, subnormals included: scale by 2^112, exactly.
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

static inline float round_to(float value, float) { return value; }

static inline bfloat16 round_to(float value, bfloat16) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // rounding could give Inf
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

static inline float16 round_to(float value, float16) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN: quiet, the payload kept
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and above round to Inf
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded by the adder.
    half = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

/// The nearest T, ties to even.
template <class T>
static inline T from_float(float value) {
  return round_to(value, T{});
}

/// Calls `f` with a value of the storage type that `dtype` names: visit(dtype, [&](auto zero) {
/// using T = decltype(zero); ... }).
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
  }
  throw std::invalid_argument("resnet_fast: unknown dtype");
}

}  // namespace resnet_fast
