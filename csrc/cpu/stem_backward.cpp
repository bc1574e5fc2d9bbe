// The backward of the stem's BatchNorm, ReLU and max-pooling on the CPU: of stem.cpp, and compiled
// as it is. Arithmetic is fp32 whatever the storage.
#include "isa.h"
#include "windows.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

/// `i`, or the nearest place to it in [0, count).
int64_t inside(int64_t i, int64_t count) { return i < 0 ? 0 : smaller(i, count - 1); }

/// The gradient of the pooled output at some windows, and which of their values it goes to.
struct Pooled {
  Pair dz;
  VecBits place[2];

  /// sum, and what goes to place `wanted` added, `weight` times.
  Pair add(Pair sum, uint32_t wanted, const Pair& weight) const {
    for (int h = 0; h < 2; ++h) {
      sum.v[h] = place[h] == wanted ? fma(weight.v[h], dz.v[h], sum.v[h]) : sum.v[h];
    }
    return sum;
  }
};

/// Of rows 2p and 2p + 1, where p is a row of windows: calls end(row, column, v, sum) on each pack,
/// sum being begin(row, column, v) + weight(v) * g.
template <class T, int COUNT, class Args, class Lanes, class Weight, class Begin, class End>
void for_each_gradient(const Args& args, const Images& images, const Windows& block,
                       int64_t channel, Lanes lanes, const Weight& weight, const Begin& begin,
                       const End& end) {
  const int64_t k = args.k, p = block.p;
  const int64_t start = block.image * images.p * images.q * k + channel;
  const T* dz = static_cast<const T*>(args.dz) + start;
  const uint8_t* index = args.index + start;
  const bool window_below = p + 1 < images.p, row_below = 2 * p + 1 < images.h;
  const auto pooled = [&](int64_t row, int64_t column, int v) {
    const int64_t offset = (row * images.q + column) * k + v * PACK;
    Pooled result;
    result.dz = widen(load_pack(dz + offset, lanes));
    widen_integers(load_bytes<T>(index + offset, lanes), result.place);
    return result;
  };
  Pooled nothing{};
  for (VecBits& place : nothing.place) place += BLOCKED;

  // A window's values are shared with its neighbours to the right, below and across: those of one
  // column of windows are kept for the next.
  Pooled here[COUNT], below[COUNT];
  for (int v = 0; v < COUNT; ++v) {
    here[v] = pooled(p, block.q, v);
    below[v] = window_below ? pooled(p + 1, block.q, v) : nothing;
  }
  for (int64_t q = block.q; q < block.q_end; ++q) {
    const bool window_right = q + 1 < images.q, column_right = 2 * q + 1 < images.w;
#pragma GCC unroll 2  // here and below stay in registers
    for (int v = 0; v < COUNT; ++v) {
      const Pooled right = window_right ? pooled(p, q + 1, v) : nothing;
      const Pooled across = window_right && window_below ? pooled(p + 1, q + 1, v) : nothing;
      const Pair w = weight(v);
      end(2 * p, 2 * q, v, here[v].add(begin(2 * p, 2 * q, v), 4, w));
      if (column_right) {
        const Pair sum = here[v].add(begin(2 * p, 2 * q + 1, v), 5, w);
        end(2 * p, 2 * q + 1, v, right.add(sum, 3, w));
      }
      if (row_below) {
        const Pair sum = here[v].add(begin(2 * p + 1, 2 * q, v), 7, w);
        end(2 * p + 1, 2 * q, v, below[v].add(sum, 1, w));
        if (column_right) {
          const Pair upper = right.add(here[v].add(begin(2 * p + 1, 2 * q + 1, v), 8, w), 6, w);
          end(2 * p + 1, 2 * q + 1, v, across.add(below[v].add(upper, 2, w), 0, w));
        }
      }
      here[v] = right;
      below[v] = across;
    }
  }
}

/// The windows of all images in rows of at most BLOCK_Q.
struct Rows {
  Images images;

  int64_t across() const { return cdiv(images.q, BLOCK_Q); }
  int64_t count() const { return images.n * images.p * across(); }

  Windows operator[](int64_t i) const {
    const int64_t p = i / across() % images.p, q = i % across() * BLOCK_Q;
    return {i / across() / images.p, p, p + 1, q, smaller(q + BLOCK_Q, images.q)};
  }
};

/// The sums of one pack of channels over a part of the image, added to those of the tile.
struct PooledSums {
  Pair g, gy;

  void add(const Pair& gradient, const Pair& value, const Pair& mean) {
    for (int h = 0; h < 2; ++h) {
      g.v[h] += gradient.v[h];
      gy.v[h] = fma(gradient.v[h], value.v[h] - mean.v[h], gy.v[h]);
    }
  }

  void store(float* sum_g, float* sum_gy, bool begins) const {
    for (int h = 0; h < 2; ++h) {
      float *const to_g = sum_g + h * LANES, *const to_gy = sum_gy + h * LANES;
      cpu::RESNET_FAST_NAMESPACE::store(to_g, begins ? g.v[h] : load(to_g) + g.v[h]);
      cpu::RESNET_FAST_NAMESPACE::store(to_gy, begins ? gy.v[h] : load(to_gy) + gy.v[h]);
    }
  }
};

/// The sums over a row of windows, window by window: dz goes to one value of y, which is picked out
/// of nine as it is stored. False, and no sums, if a value of y is not finite: then 0 * y is not 0.
/// For a pack that is one vector: of two, the gather's fewer loads count for more.
template <class T, int COUNT, class Lanes>
bool sum_windows(const MaxpoolBackwardSums& args, const Images& images, const Windows& block,
                 int64_t channel, Lanes lanes, const Group<T, 1>& mean, PooledSums (&sums)[COUNT]) {
  using S = Storage<T>;
  const int64_t k = args.k, p = block.p;
  const int64_t start = (block.image * images.p + p) * images.q * k + channel;
  const T* dz = static_cast<const T*>(args.dz) + start;
  const uint8_t* index = args.index + start;
  // No index points outside the image: whatever is read there instead.
  const T* y = static_cast<const T*>(args.y) + block.image * images.h * images.w * k + channel;
  const T* rows[3];
  for (int r = 0; r < 3; ++r) rows[r] = y + inside(2 * p - 1 + r, images.h) * images.w * k;
  Pack<T> largest[COUNT] = {};
  for (int64_t q = block.q; q < block.q_end; ++q) {
    int64_t columns[3];
    for (int s = 0; s < 3; ++s) columns[s] = inside(2 * q - 1 + s, images.w) * k;
    for (int v = 0; v < COUNT; ++v) {
      const Pack<T> place = load_bytes<T>(index + q * k + v * PACK, lanes);
      Pack<T> gradient = load_pack(dz + q * k + v * PACK, lanes), value;
      for (int at = 0; at < 9; ++at) {
        const Pack<T> y_at = load_pack(rows[at / 3] + columns[at % 3] + v * PACK, lanes);
        for (int i = 0; i < S::PARTS; ++i) {
          const auto here = typename S::Part{} + static_cast<typename S::Bits>(at);
          value.v[i] = at == 0 || place.v[i] == here ? y_at.v[i] : value.v[i];
          if (at / 3 == 0 || at % 3 == 0) continue;  // seen in another window
          const auto magnitude =
              (typename S::Signed)(y_at.v[i] & static_cast<typename S::Bits>(S::SIGN - 1));
          const auto most = (typename S::Signed)largest[v].v[i];
          largest[v].v[i] = (typename S::Part)(magnitude > most ? magnitude : most);
        }
      }
      for (int i = 0; i < S::PARTS; ++i) {
        const auto blocked = typename S::Part{} + static_cast<typename S::Bits>(BLOCKED);
        gradient.v[i] = place.v[i] == blocked ? typename S::Part{} : gradient.v[i];
      }
      sums[v].add(widen(gradient), widen(value), {{mean(0, v * PACK, 0), mean(0, v * PACK, 1)}});
    }
  }
  bool finite = true;
  for (const Pack<T>& pack : largest) {
    for (const auto& part : pack.v) {
      for (size_t i = 0; i < sizeof part / sizeof(T); ++i) finite &= part[i] < S::INF;
    }
  }
  return finite;
}

/// The same, value by value of y, each with all of its gradient.
template <class T, int COUNT, class Lanes>
void sum_values(const MaxpoolBackwardSums& args, const Images& images, const Windows& block,
                int64_t channel, Lanes lanes, const Group<T, 1>& mean, PooledSums (&sums)[COUNT]) {
  const T* y = static_cast<const T*>(args.y) + block.image * images.h * images.w * args.k + channel;
  const auto weight = [](int)
                          __attribute__((always_inline)) { return Pair{{Vec{} + 1, Vec{} + 1}}; };
  const auto begin = [](int64_t, int64_t, int) __attribute__((always_inline)) { return Pair{}; };
  const auto end = [&, w = images.w, k = args.k](int64_t row, int64_t column, int v,
                                                 const Pair& g) __attribute__((always_inline)) {
    const Pair value = widen(load_pack(y + (row * w + column) * k + v * PACK, lanes));
    sums[v].add(g, value, {{mean(0, v * PACK, 0), mean(0, v * PACK, 1)}});
  };
  for_each_gradient<T, COUNT>(args, images, block, channel, lanes, weight, begin, end);
}

// sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = sum of the dz whose index points at y
// Shapes    dz, index (N, P, Q, K), y (N, H, W, K) channels-last; mean, sums (K,) fp32; workspace
//           (2, tiles, padded(K)) fp32
// Tiles     some rows of at most BLOCK_Q windows, as many as leave no more tiles than bn_workspace
//           has row blocks
// Traffic   reads dz, index, y: NPQK * (itemsize + 1) + NHWK * itemsize; an odd row of y is read
//           again, from a cache, for the row of windows below
// Numerics  fp32 sums over a row, rows and tiles merged in order, tiles in double
// Source    ops.maxpool_backward_sums; docs/bn_act.md
template <class T, int COUNT, class Lanes>
void maxpool_backward_sums_tile(const MaxpoolBackwardSums& args, const Images& images,
                                const Windows& block, int64_t channel, Lanes lanes, bool begins,
                                float* sum_g, float* sum_gy) {
  const Group<T, 1> mean({args.mean}, channel, smaller(channel + COUNT * PACK, args.k));
  PooledSums sums[COUNT] = {};
  bool summed = false;
  if constexpr (Storage<T>::PARTS == 1) {
    summed = sum_windows<T, COUNT>(args, images, block, channel, lanes, mean, sums);
  }
  if (!summed) {
    for (PooledSums& sum : sums) sum = {};
    sum_values<T, COUNT>(args, images, block, channel, lanes, mean, sums);
  }
  for (int v = 0; v < COUNT; ++v) {
    sums[v].store(sum_g + channel + v * PACK, sum_gy + channel + v * PACK, begins);
  }
}

template <class T>
void maxpool_backward_sums_kernel(const MaxpoolBackwardSums& args) {
  const Images images(args);
  const Rows rows{images};
  const int64_t k = args.k, values = images.n * images.h * images.w;
  const int64_t length = values > 0 ? cdiv(rows.count(), Tiles{values, k}.row_blocks()) : 1;
  const int64_t tiles = cdiv(rows.count(), length), plane = tiles * padded(k);
#pragma omp parallel for schedule(static) if (values * k > SERIAL)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float* sum_g = args.workspace + tile * padded(k);
    for (int64_t i = tile * length; i < smaller((tile + 1) * length, rows.count()); ++i) {
      for_each_group(k, [&](int64_t channel, auto packs, auto lanes) {
        maxpool_backward_sums_tile<T, packs()>(args, images, rows[i], channel, lanes,
                                               i == tile * length, sum_g, sum_g + plane);
      });
    }
  }
  merge_sums<T>(tiles, k, args.workspace, {args.sum_g, args.sum_gy});
}

// dy = a * g + b * (y - mean) + c;  g = sum of the dz whose index points at y
// Shapes    dz, index (N, P, Q, K), y, dy (N, H, W, K) channels-last; mean, a, b, c (K,) fp32
// Tiles     rows of at most BLOCK_Q windows, shared out to the threads
// Traffic   reads dz, index, y, writes dy: NPQK * (itemsize + 1) + 2 * NHWK * itemsize
// Numerics  fp32 from load to store; one rounding, at the store. Of 16-bit values, whose own
// rounding
//           is coarser by far, c - b * mean is one constant
// Source    ops.maxpool_backward_apply; docs/bn_act.md
template <class T, int COUNT, class Lanes>
void maxpool_backward_apply_tile(const MaxpoolBackwardApply& args, const Images& images,
                                 const Windows& block, int64_t channel, Lanes lanes) {
  constexpr bool MERGED = sizeof(T) == 2;
  enum { MEAN, A, B, C };
  const int64_t first = block.image * images.h * images.w * args.k + channel;
  const T* y = static_cast<const T*>(args.y) + first;
  T* dy = static_cast<T*>(args.dy) + first;
  Group<T, 4> vectors({args.mean, args.a, args.b, args.c}, channel,
                      smaller(channel + COUNT * PACK, args.k));
  for (int i = 0; i < COUNT * PACK; ++i) {
    // a * g is left out where g = 0, which is right unless a is not finite.
    double c = vectors.values[C][i] + double{vectors.values[A][i]} * 0;
    if (MERGED) c -= double{vectors.values[B][i]} * vectors.values[MEAN][i];
    vectors.values[C][i] = static_cast<float>(c);
  }
  const auto weight = [&](int v) __attribute__((always_inline)) {
    return Pair{{vectors(A, v * PACK, 0), vectors(A, v * PACK, 1)}};
  };
  const auto begin = [&, w = images.w, k = args.k](int64_t row, int64_t column,
                                                   int v) __attribute__((always_inline)) {
    Pair rest = widen(load_pack(y + (row * w + column) * k + v * PACK, lanes));
    for (int h = 0; h < 2; ++h) {
      if (!MERGED) rest.v[h] -= vectors(MEAN, v * PACK, h);
      rest.v[h] = fma(vectors(B, v * PACK, h), rest.v[h], vectors(C, v * PACK, h));
    }
    return rest;
  };
  const auto end =
      [&, w = images.w, k = args.k](int64_t row, int64_t column, int v, const Pair& result)
          __attribute__((always_inline)) {
            store_pack(dy + (row * w + column) * k + v * PACK, narrow(result, T{}), lanes);
          };
  for_each_gradient<T, COUNT>(args, images, block, channel, lanes, weight, begin, end);
}

template <class T>
void maxpool_backward_apply_kernel(const MaxpoolBackwardApply& args) {
  const Images images(args);
  const Rows rows{images};
  const int64_t k = args.k, count = rows.count();
#pragma omp parallel for schedule(static) if (images.n * images.h * images.w * k > SERIAL)
  for (int64_t i = 0; i < count; ++i) {
    for_each_group(k, [&](int64_t channel, auto packs, auto lanes) {
      maxpool_backward_apply_tile<T, packs()>(args, images, rows[i], channel, lanes);
    });
  }
}

void maxpool_backward_sums(const MaxpoolBackwardSums& args) {
  visit(args.dtype, [&](auto type) { maxpool_backward_sums_kernel<decltype(type)>(args); });
}

void maxpool_backward_apply(const MaxpoolBackwardApply& args) {
  visit(args.dtype, [&](auto type) { maxpool_backward_apply_kernel<decltype(type)>(args); });
}

}  // namespace

const StemBackward stem_backward = {maxpool_backward_sums, maxpool_backward_apply};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
