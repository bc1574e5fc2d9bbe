// Products of small matrices in the caches, which what is more than elementwise is made of.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include <utility>

#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Rows of accumulators, two vectors wide, that the registers hold.
#if defined(__AVX512F__)
constexpr int ROWS = 14;
#else
constexpr int ROWS = 6;
#endif

/// sums (N, PACK) = sums + et x v, or et x v where `begins`: e (count, PACK), of which N columns,
/// v (count, PACK).
template <int N>
RESNET_FAST_INLINE void add_product(const float* e, const float* v, int64_t count, bool begins,
                                    float* sums) {
  Vec sum[N][2] = {};
#pragma GCC unroll 14
  for (int r = 0; r < N; ++r) {
    __builtin_prefetch(sums + r * PACK, 1);
    __builtin_prefetch(sums + r * PACK + LANES, 1);
  }
  for (int64_t t = 0; t < count; ++t, e += PACK, v += PACK) {
    const Vec left = load(v), right = load(v + LANES);
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      const Vec value = broadcast(e + r);
      sum[r][0] = fma(value, left, sum[r][0]);
      sum[r][1] = fma(value, right, sum[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < N; ++r) {
    float* out = sums + r * PACK;
    store(out, begins ? sum[r][0] : load(out) + sum[r][0]);
    store(out + LANES, begins ? sum[r][1] : load(out + LANES) + sum[r][1]);
  }
}

/// A pack of output channels in parts that the registers hold.
template <int... PART>
void add_product_parts(const float* e, const float* v, int64_t count, bool begins, float* sums,
                       std::integer_sequence<int, PART...>) {
  constexpr int PARTS = sizeof...(PART);
  (add_product<(PART + 1) * PACK / PARTS - PART * PACK / PARTS>(
       e + PART * PACK / PARTS, v, count, begins, sums + PART * PACK / PARTS * PACK),
   ...);
}

/// sums (PACK, PACK) = sums + et x v, or et x v where `begins`: e and v (count, PACK).
inline void add_products(const float* e, const float* v, int64_t count, bool begins, float* sums) {
  constexpr int PARTS = (PACK + ROWS - 1) / ROWS;
  add_product_parts(e, v, count, begins, sums, std::make_integer_sequence<int, PARTS>{});
}

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
