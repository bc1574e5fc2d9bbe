// A vector of floats as wide as the instruction set this file is compiled for, with loads and
// stores that convert. GCC and clang vector extensions give the arithmetic: + - * / < and ?:.
//
// Everything is always_inline, and lives in a namespace of its instruction set: no copy compiled
// for AVX-512 can be called from the baseline.
#pragma once

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../types.h"

#define RESNET_FAST_INLINE [[gnu::always_inline]] static inline

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));
typedef uint8_t VecByte __attribute__((vector_size(LANES)));

/// Which lanes a load or a store touches: all of them, or the first n (a row's tail).
struct All {};
struct First {
  int n;
};

/// a * b + c. Forward and backward must agree bit for bit on which side of zero y * scale + shift
/// lies, so both come here, and -ffp-contract=off keeps the compiler from fusing anything else.
/// The x86-64 baseline has no such instruction: it rounds twice, in both directions alike.
RESNET_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  Vec result;
  for (int i = 0; i < LANES; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#else
  return a * b + c;
#endif
}

/// max(value, 0), NaN kept.
RESNET_FAST_INLINE Vec relu(Vec value) { return value < Vec{} ? Vec{} : value; }

/// value where gate > 0 or gate is NaN, else 0: torch's threshold_backward.
RESNET_FAST_INLINE Vec where_active(Vec gate, Vec value) { return gate <= Vec{} ? Vec{} : value; }

RESNET_FAST_INLINE Vec absolute(Vec value) { return (Vec)((VecBits)value & 0x7fffffff); }

template <class V, class T>
RESNET_FAST_INLINE V load_bits(const T* p) {
  V value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <class V, class T>
RESNET_FAST_INLINE void store_bits(T* p, V value) {
  __builtin_memcpy(p, &value, sizeof value);
}

#if defined(__AVX512F__)
// All lanes, said aloud: GCC 12 warns, inside its own header, about the forms without a mask.
constexpr __mmask16 ALL_LANES = 0xffff;
#endif

// GCC 12 makes four instructions of these conversions where the intrinsic is one.

RESNET_FAST_INLINE VecBits widen_bits(VecHalf half) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_maskz_cvtepu16_epi32(ALL_LANES, (__m256i)half);
#elif defined(__AVX2__)
  return (VecBits)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, VecBits);
#endif
}

RESNET_FAST_INLINE VecHalf narrow_bits(VecBits bits) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtepi32_epi16(ALL_LANES, (__m512i)bits);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // per 128-bit half
  return (VecHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  return __builtin_convertvector(bits, VecHalf);
#endif
}

RESNET_FAST_INLINE Vec widen(VecHalf half, bfloat16) { return (Vec)(widen_bits(half) << 16); }

RESNET_FAST_INLINE VecHalf narrow(Vec value, bfloat16) {
  const VecBits bits = (VecBits)value;
  const VecBits rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return narrow_bits((value != value ? bits | 0x400000 : rounded) >> 16);
}

RESNET_FAST_INLINE Vec widen(VecHalf half, float16) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(ALL_LANES, (__m256i)half);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)half);
#else
  Vec value;
  for (int i = 0; i < LANES; ++i) value[i] = to_float(float16{half[i]});
  return value;
#endif
}

RESNET_FAST_INLINE VecHalf narrow(Vec value, float16) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtps_ph(ALL_LANES, value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (VecHalf)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#else
  VecHalf half;
  for (int i = 0; i < LANES; ++i) half[i] = from_float<float16>(value[i]).bits;
  return half;
#endif
}

RESNET_FAST_INLINE Vec load(const float* p, All) { return load_bits<Vec>(p); }

template <class Half>
RESNET_FAST_INLINE Vec load(const Half* p, All) {
  return widen(load_bits<VecHalf>(p), Half{});
}

RESNET_FAST_INLINE void store(float* p, Vec value, All) { store_bits(p, value); }

template <class Half>
RESNET_FAST_INLINE void store(Half* p, Vec value, All) {
  store_bits(p, narrow(value, Half{}));
}

#if defined(__AVX512F__)

RESNET_FAST_INLINE __mmask16 mask(First lanes) {
  return static_cast<__mmask16>((1u << lanes.n) - 1);
}

RESNET_FAST_INLINE Vec load(const float* p, First lanes) {
  return _mm512_maskz_loadu_ps(mask(lanes), p);
}

template <class Half>
RESNET_FAST_INLINE Vec load(const Half* p, First lanes) {
  return widen((VecHalf)_mm256_maskz_loadu_epi16(mask(lanes), p), Half{});
}

RESNET_FAST_INLINE void store(float* p, Vec value, First lanes) {
  _mm512_mask_storeu_ps(p, mask(lanes), value);
}

template <class Half>
RESNET_FAST_INLINE void store(Half* p, Vec value, First lanes) {
  _mm256_mask_storeu_epi16(p, mask(lanes), (__m256i)narrow(value, Half{}));
}

#else

RESNET_FAST_INLINE Vec load(const float* p, First lanes) {
  Vec value{};
  for (int i = 0; i < lanes.n; ++i) value[i] = p[i];
  return value;
}

template <class Half>
RESNET_FAST_INLINE Vec load(const Half* p, First lanes) {
  VecHalf half{};
  for (int i = 0; i < lanes.n; ++i) half[i] = p[i].bits;
  return widen(half, Half{});
}

RESNET_FAST_INLINE void store(float* p, Vec value, First lanes) {
  for (int i = 0; i < lanes.n; ++i) p[i] = value[i];
}

template <class Half>
RESNET_FAST_INLINE void store(Half* p, Vec value, First lanes) {
  const VecHalf half = narrow(value, Half{});
  for (int i = 0; i < lanes.n; ++i) p[i].bits = half[i];
}

#endif

/// The value as its storage type keeps it.
RESNET_FAST_INLINE Vec as_stored(Vec value, float) { return value; }

template <class Half>
RESNET_FAST_INLINE Vec as_stored(Vec value, Half) {
  return widen(narrow(value, Half{}), Half{});
}

// Masks: a row of ceil(k / 8) bytes, bit i of byte j for channel 8 * j + i.

/// Bit i is set where a gradient passes lane i: where the gate is > 0 or NaN.
RESNET_FAST_INLINE uint32_t active_bits(Vec gate) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(gate, Vec{}, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(gate, Vec{}, _CMP_NLE_UQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= (gate[i] <= 0 ? 0u : 1u) << i;
  return bits;
#endif
}

/// value where the lane's bit is set, else 0.
RESNET_FAST_INLINE Vec where_bits(uint32_t bits, Vec value) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), value);
#else
  VecBits lane;
  for (int i = 0; i < LANES; ++i) lane[i] = 1u << i;
  return ((VecBits{} + bits) & lane) != 0 ? value : Vec{};
#endif
}

/// The bits of a whole vector from `channel` on, or of a row's tail.
RESNET_FAST_INLINE uint32_t load_mask(const uint8_t* row, int64_t channel, All) {
  const uint8_t* p = row + channel / 8;
  if constexpr (LANES == 16) return load_bits<uint16_t>(p);
  return LANES == 8 ? *p : *p >> channel % 8;
}

RESNET_FAST_INLINE uint32_t load_mask(const uint8_t* row, int64_t channel, First lanes) {
  uint32_t bits = 0;
  for (int i = 0; i < lanes.n; i += 8) bits |= uint32_t{row[(channel + i) / 8]} << i;
  return LANES == 4 ? bits >> channel % 8 : bits;
}

/// Sets them; vectors must come in order of channels: where one is half a byte, the first of the
/// two clears the other's half.
RESNET_FAST_INLINE void store_mask(uint8_t* row, int64_t channel, uint32_t bits, All) {
  uint8_t* p = row + channel / 8;
  if constexpr (LANES == 16) {
    store_bits(p, static_cast<uint16_t>(bits));
  } else {
    *p = static_cast<uint8_t>(channel % 8 == 0 ? bits : *p | bits << channel % 8);
  }
}

RESNET_FAST_INLINE void store_mask(uint8_t* row, int64_t channel, uint32_t bits, First lanes) {
  bits &= (1u << lanes.n) - 1;
  if (LANES == 4) return store_mask(row, channel, bits, All{});
  for (int i = 0; i < lanes.n; i += 8) {
    row[(channel + i) / 8] = static_cast<uint8_t>(bits >> i);
  }
}

// Bytes, one to a lane.

RESNET_FAST_INLINE VecBits load_bytes(const uint8_t* p, All) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_maskz_cvtepu8_epi32(ALL_LANES, load_bits<__m128i>(p));
#elif defined(__AVX2__)
  return (VecBits)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_bits<int64_t>(p)));
#else
  return __builtin_convertvector(load_bits<VecByte>(p), VecBits);
#endif
}

RESNET_FAST_INLINE VecBits load_bytes(const uint8_t* p, First lanes) {
  VecBits value{};
  for (int i = 0; i < lanes.n; ++i) value[i] = p[i];
  return value;
}

RESNET_FAST_INLINE void store_bytes(uint8_t* p, VecBits value, All) {
#if defined(__AVX512F__)
  store_bits(p, _mm512_maskz_cvtepi32_epi8(ALL_LANES, (__m512i)value));
#else
  store_bits(p, __builtin_convertvector(value, VecByte));
#endif
}

RESNET_FAST_INLINE void store_bytes(uint8_t* p, VecBits value, First lanes) {
  for (int i = 0; i < lanes.n; ++i) p[i] = static_cast<uint8_t>(value[i]);
}

/// The larger of two unsigned integers.
RESNET_FAST_INLINE VecBits larger(VecBits a, VecBits b) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_maskz_max_epu32(ALL_LANES, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecBits)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
