// Vectors of floats as wide as the instruction set this file is compiled for, and packs: two
// vectors of channels as they lie in memory, which convert. GCC and clang vector extensions give
// the arithmetic: + - * / < and ?:.
//
// Everything is always_inline, and lives in a namespace of its instruction set: no copy compiled
// for AVX-512 can be called from the baseline.
#pragma once

#if defined(__x86_64__)
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
/// Channels to a pack: a cache line of 16-bit values with AVX-512.
constexpr int PACK = 2 * LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef int32_t VecSigned __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));
typedef uint8_t VecByte __attribute__((vector_size(LANES)));
typedef uint8_t PackByte __attribute__((vector_size(PACK)));
typedef int16_t VecHalfSigned __attribute__((vector_size(LANES * 2)));
typedef uint16_t VecWide __attribute__((vector_size(LANES * 4)));  // as many bits as Vec
typedef int16_t VecWideSigned __attribute__((vector_size(LANES * 4)));

/// Which channels of a pack a load or a store touches: all of them, or the first n (a row's tail).
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

#if defined(__AVX512F__)
// All lanes, said aloud: GCC 12 warns, inside its own header, about the forms without a mask.
constexpr __mmask16 ALL_LANES = 0xffff;
#endif

/// max(value, 0), NaN kept: x86's maximum is its second operand where one of them is NaN.
RESNET_FAST_INLINE Vec relu(Vec value) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(ALL_LANES, Vec{}, value);
#elif defined(__AVX2__)
  return _mm256_max_ps(Vec{}, value);
#elif defined(__SSE2__)
  return _mm_max_ps(Vec{}, value);
#else
  return value < Vec{} ? Vec{} : value;
#endif
}

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

RESNET_FAST_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }

/// The float at p in every lane.
RESNET_FAST_INLINE Vec broadcast(const float* p) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return _mm256_broadcast_ss(p);
#elif defined(__SSE2__)
  return _mm_set1_ps(*p);
#else
  Vec value;
  for (int i = 0; i < LANES; ++i) value[i] = *p;
  return value;
#endif
}

RESNET_FAST_INLINE void store(float* p, Vec value) { store_bits(p, value); }

/// The two vectors of a pack's values. Which channel is where, Storage::channel says.
struct Pair {
  Vec v[2];
};

/// How a pack of T is kept in registers, as it lies in memory: PARTS vectors of bits. SIGNED are
/// the same as integers with a sign; INF the bits of infinity, SIGN the sign.
template <class T>
struct Storage;

template <>
struct Storage<float> {
  static constexpr int PARTS = 2;
  using Bits = uint32_t;
  static constexpr Bits SIGN = 0x80000000, INF = 0x7f800000;
  using Part = VecBits;
  using Signed = VecSigned;
  static constexpr int channel(int half, int lane) { return half * LANES + lane; }
};

/// bfloat16 is the upper half of a float. A float's worth of two, shifted or masked, is one of
/// them: a pack becomes a vector of its even channels and one of its odd ones, and none is moved.
template <>
struct Storage<bfloat16> {
  static constexpr int PARTS = 1;
  using Bits = uint16_t;
  static constexpr Bits SIGN = 0x8000, INF = 0x7f80;
  using Part = VecWide;
  using Signed = VecWideSigned;
  static constexpr int channel(int half, int lane) { return 2 * lane + half; }
};

template <>
struct Storage<float16> {
  static constexpr int PARTS = 2;
  using Bits = uint16_t;
  static constexpr Bits SIGN = 0x8000, INF = 0x7c00;
  using Part = VecHalf;
  using Signed = VecHalfSigned;
  static constexpr int channel(int half, int lane) { return half * LANES + lane; }
};

template <class T>
struct Pack {
  typename Storage<T>::Part v[Storage<T>::PARTS];
};

template <class T>
RESNET_FAST_INLINE Pack<T> load_pack(const T* p, All) {
  return load_bits<Pack<T>>(p);
}

template <class T>
RESNET_FAST_INLINE Pack<T> load_pack(const T* p, First lanes) {
  Pack<T> pack{};
  __builtin_memcpy(&pack, p, lanes.n * sizeof(T));
  return pack;
}

/// The same; and what lies `ahead` elements further is asked for, which will be read soon.
template <class T, class Lanes>
RESNET_FAST_INLINE Pack<T> load_ahead(const T* p, int64_t ahead, Lanes lanes) {
  constexpr int64_t LINE = 64;
  for (int64_t i = 0; i == 0 || i < static_cast<int64_t>(sizeof(Pack<T>)); i += LINE) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + ahead) + i);
  }
  return load_pack(p, lanes);
}

template <class T>
RESNET_FAST_INLINE void store_pack(T* p, const Pack<T>& pack, All) {
  store_bits(p, pack);
}

template <class T>
RESNET_FAST_INLINE void store_pack(T* p, const Pack<T>& pack, First lanes) {
  __builtin_memcpy(p, &pack, lanes.n * sizeof(T));
}

RESNET_FAST_INLINE Pair widen(const Pack<float>& pack) {
  return {{(Vec)pack.v[0], (Vec)pack.v[1]}};
}

RESNET_FAST_INLINE Pack<float> narrow(const Pair& pair, float) {
  return {{(VecBits)pair.v[0], (VecBits)pair.v[1]}};
}

RESNET_FAST_INLINE Pair widen(const Pack<bfloat16>& pack) {
  const VecBits bits = (VecBits)pack.v[0];
  return {{(Vec)(bits << 16), (Vec)(bits & 0xffff0000)}};
}

/// (a + b + 1) / 2, without overflow.
RESNET_FAST_INLINE VecWide average(VecWide a, VecWide b) {
#if defined(__AVX512F__)
  return (VecWide)_mm512_avg_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecWide)_mm256_avg_epu16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecWide)_mm_avg_epu16((__m128i)a, (__m128i)b);
#else
  return (a | b) - ((a ^ b) >> 1);
#endif
}

/// To nearest, ties to even. The carry from the lower half is the uppermost bit of an average. A
/// NaN keeps its upper half: the lower one is 0, since it comes from a bfloat16, from an operation,
/// or from a vector of channels whose NaN is the usual one (see Channels).
RESNET_FAST_INLINE Pack<bfloat16> narrow(const Pair& pair, bfloat16) {
  const VecBits even = (VecBits)pair.v[0], odd = (VecBits)pair.v[1];
  const VecWide upper = (VecWide)(even >> 16 | (odd & 0xffff0000));
  const VecWide lower = (VecWide)((even & 0xffff) | odd << 16);
#if defined(__AVX512BW__)
  const __m512i up = (__m512i)upper, sticky = (__m512i)(lower | (upper & 1));
  const __mmask32 carry = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(INT16_MIN));
  return {{(VecWide)_mm512_mask_sub_epi16(up, carry, up, _mm512_set1_epi16(-1))}};
#endif
  return {{upper + (average(lower, (upper & 1) | 0x7ffe) >> 15)}};
}

RESNET_FAST_INLINE Vec widen_half(VecHalf half) {
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

RESNET_FAST_INLINE VecHalf narrow_half(Vec value) {
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

RESNET_FAST_INLINE Pair widen(const Pack<float16>& pack) {
  return {{widen_half(pack.v[0]), widen_half(pack.v[1])}};
}

RESNET_FAST_INLINE Pack<float16> narrow(const Pair& pair, float16) {
  return {{narrow_half(pair.v[0]), narrow_half(pair.v[1])}};
}

/// What is left of value once it has been stored as T, vector by vector: as widen(narrow(value)).
template <class T>
RESNET_FAST_INLINE Vec rounded(Vec value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (Storage<T>::PARTS == 2) {
    return widen_half(narrow_half(value));
  } else {
    const VecBits bits = (VecBits)value;
    return (Vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
  }
}

/// As where_active, in the storage type: nothing is rounded.
template <class T>
RESNET_FAST_INLINE Pack<T> where_active(const Pack<T>& gate, const Pack<T>& value) {
  using S = Storage<T>;
  Pack<T> result;
  for (int i = 0; i < S::PARTS; ++i) {
    if constexpr (sizeof(T) == 4) {
      result.v[i] = (VecBits)where_active((Vec)gate.v[i], (Vec)value.v[i]);
    } else {
      const auto positive = (typename S::Signed)gate.v[i] > 0;
      const auto negative_nan = gate.v[i] > static_cast<uint16_t>(S::SIGN | S::INF);
      result.v[i] = (positive | negative_nan) ? value.v[i] : typename S::Part{};
    }
  }
  return result;
}

// Masks: a row of ceil(k / 8) bytes, bit i of byte j for channel 8 * j + i. A pack has whole bytes.

RESNET_FAST_INLINE uint32_t load_mask(const uint8_t* row, int64_t channel, All) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, row + channel / 8, PACK / 8);
  return bits;
}

RESNET_FAST_INLINE uint32_t load_mask(const uint8_t* row, int64_t channel, First lanes) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, row + channel / 8, (lanes.n + 7) / 8);
  return bits;
}

RESNET_FAST_INLINE void store_mask(uint8_t* row, int64_t channel, uint32_t bits, All) {
  __builtin_memcpy(row + channel / 8, &bits, PACK / 8);
}

RESNET_FAST_INLINE void store_mask(uint8_t* row, int64_t channel, uint32_t bits, First lanes) {
  bits &= (1u << lanes.n) - 1;
  __builtin_memcpy(row + channel / 8, &bits, (lanes.n + 7) / 8);
}

/// value in the lanes whose bit is set, else 0.
template <class T>
RESNET_FAST_INLINE Pack<T> where_bits(uint32_t bits, const Pack<T>& value) {
  using Part = typename Storage<T>::Part;
  constexpr int COUNT = PACK / Storage<T>::PARTS;
  Pack<T> result;
  for (int i = 0; i < Storage<T>::PARTS; ++i) {
    const uint32_t part = bits >> (i * COUNT);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      result.v[i] = (Part)_mm512_maskz_mov_epi32(static_cast<__mmask16>(part), (__m512i)value.v[i]);
    } else if constexpr (COUNT == PACK) {
      result.v[i] = (Part)_mm512_maskz_mov_epi16(part, (__m512i)value.v[i]);
    } else {
      result.v[i] = (Part)_mm256_maskz_mov_epi16(static_cast<__mmask16>(part), (__m256i)value.v[i]);
    }
#else
    Part lane{}, all{};
    for (int j = 0; j < COUNT; ++j) lane[j] = 1u << j;
    for (int j = 0; j < COUNT; ++j) all[j] = part;
    result.v[i] = (all & lane) != 0 ? value.v[i] : Part{};
#endif
  }
  return result;
}

/// A bit for each channel where the gate, as stored, lets a gradient pass: where it is > 0 or NaN.
template <class T>
RESNET_FAST_INLINE uint32_t active_bits(const Pack<T>& gate) {
  using S = Storage<T>;
  constexpr int COUNT = PACK / S::PARTS;
  uint32_t bits = 0;
  for (int i = 0; i < S::PARTS; ++i) {
    uint32_t part = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      part = _mm512_cmp_ps_mask((Vec)gate.v[i], Vec{}, _CMP_NLE_UQ);
    } else {
      const auto infinity = typename S::Part{} + static_cast<uint16_t>(S::SIGN | S::INF);
      if constexpr (COUNT == PACK) {
        const __m512i v = (__m512i)gate.v[i];
        part =
            _mm512_cmpgt_epi16_mask(v, __m512i{}) | _mm512_cmpgt_epu16_mask(v, (__m512i)infinity);
      } else {
        const __m256i v = (__m256i)gate.v[i];
        part =
            _mm256_cmpgt_epi16_mask(v, __m256i{}) | _mm256_cmpgt_epu16_mask(v, (__m256i)infinity);
      }
    }
#else
    const auto one = typename S::Part{} + 1;
    const Pack<T> ones = where_active(Pack<T>{{gate.v[i]}}, Pack<T>{{one}});
    for (int j = 0; j < COUNT; ++j) part |= static_cast<uint32_t>(ones.v[0][j]) << j;
#endif
    bits |= part << (i * COUNT);
  }
  return bits;
}

// Bytes, one to a channel.

/// Bytes as integers of the storage type's size.
template <class T>
RESNET_FAST_INLINE Pack<T> widen_bytes(const uint8_t (&bytes)[PACK]) {
  using Part = typename Storage<T>::Part;
  constexpr int COUNT = PACK / Storage<T>::PARTS;
  Pack<T> pack;
  for (int i = 0; i < Storage<T>::PARTS; ++i) {
    const uint8_t* p = bytes + i * COUNT;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      pack.v[i] = (Part)_mm512_maskz_cvtepu8_epi32(ALL_LANES, load_bits<__m128i>(p));
    } else if constexpr (COUNT == PACK) {
      pack.v[i] = (Part)_mm512_cvtepu8_epi16(load_bits<__m256i>(p));
    } else {
      pack.v[i] = (Part)_mm256_cvtepu8_epi16(load_bits<__m128i>(p));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      pack.v[i] = (Part)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_bits<int64_t>(p)));
    } else if constexpr (COUNT == PACK) {
      pack.v[i] = (Part)_mm256_cvtepu8_epi16(load_bits<__m128i>(p));
    } else {
      pack.v[i] = (Part)_mm_cvtepu8_epi16(_mm_cvtsi64_si128(load_bits<int64_t>(p)));
    }
#else
    if constexpr (COUNT == PACK) {
      pack.v[i] = __builtin_convertvector(load_bits<PackByte>(p), Part);
    } else {
      pack.v[i] = __builtin_convertvector(load_bits<VecByte>(p), Part);
    }
#endif
  }
  return pack;
}

template <class T>
RESNET_FAST_INLINE Pack<T> load_bytes(const uint8_t* p, All) {
  return widen_bytes<T>(*reinterpret_cast<const uint8_t (*)[PACK]>(p));
}

template <class T>
RESNET_FAST_INLINE Pack<T> load_bytes(const uint8_t* p, First lanes) {
  uint8_t bytes[PACK] = {};
  __builtin_memcpy(bytes, p, lanes.n);
  return widen_bytes<T>(bytes);
}

/// A pack's integers as 32-bit ones, in the order of widen().
template <class T>
RESNET_FAST_INLINE void widen_integers(const Pack<T>& pack, VecBits (&out)[2]) {
  if constexpr (sizeof(T) == 4) {
    for (int h = 0; h < 2; ++h) out[h] = pack.v[h];
  } else if constexpr (Storage<T>::PARTS == 1) {
    out[0] = (VecBits)pack.v[0] & 0xffff;
    out[1] = (VecBits)pack.v[0] >> 16;
  } else {
    for (int h = 0; h < 2; ++h) {
#if defined(__AVX512F__)
      out[h] = (VecBits)_mm512_maskz_cvtepu16_epi32(ALL_LANES, (__m256i)pack.v[h]);
#elif defined(__AVX2__)
      out[h] = (VecBits)_mm256_cvtepu16_epi32((__m128i)pack.v[h]);
#else
      out[h] = __builtin_convertvector(pack.v[h], VecBits);
#endif
    }
  }
}

/// The lowest byte of each lane of a pack's parts.
template <class T>
RESNET_FAST_INLINE void store_bytes(uint8_t* p, const Pack<T>& pack, All) {
  constexpr int COUNT = PACK / Storage<T>::PARTS;
  for (int i = 0; i < Storage<T>::PARTS; ++i) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      store_bits(p + i * COUNT, _mm512_maskz_cvtepi32_epi8(ALL_LANES, (__m512i)pack.v[i]));
    } else if constexpr (COUNT == PACK) {
      store_bits(p + i * COUNT, _mm512_maskz_cvtepi16_epi8(~0u, (__m512i)pack.v[i]));
    } else {
      store_bits(p + i * COUNT, _mm256_maskz_cvtepi16_epi8(ALL_LANES, (__m256i)pack.v[i]));
    }
#else
    if constexpr (COUNT == PACK) {
      store_bits(p, __builtin_convertvector(pack.v[i], PackByte));
    } else {
      store_bits(p + i * COUNT, __builtin_convertvector(pack.v[i], VecByte));
    }
#endif
  }
}

template <class T>
RESNET_FAST_INLINE void store_bytes(uint8_t* p, const Pack<T>& pack, First lanes) {
  uint8_t bytes[PACK];
  store_bytes(bytes, pack, All{});
  __builtin_memcpy(p, bytes, lanes.n);
}

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
