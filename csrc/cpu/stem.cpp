// The stem behind its convolution: BatchNorm, ReLU and max-pooling 3 x 3, stride 2, padding 1, in
// one pass, and its backward, on the CPU. The activation is never written.
//
// Compiled once per instruction set, as bn_act.cpp. Arithmetic is fp32 whatever the storage.
//
// Window (p, q) covers rows 2p - 1, 2p, 2p + 1 and columns 2q - 1, 2q, 2q + 1; place 3 * r + s in
// it is row 2p - 1 + r, column 2q - 1 + s.
#include <type_traits>

#include "isa.h"
#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Packs of channels side by side: whole cache lines are read in order.
constexpr int PACKS = LANES == 16 ? 2 : 1;
// Windows of one row whose maxima a thread keeps, in L1, and that one fp32 sum is formed over.
constexpr int64_t BLOCK_Q = 64;
// Of each task's rows of windows the one before the first is read, too. A task has at least this
// many, and more where there are this many tasks.
constexpr int64_t BLOCK_P = 8;
constexpr int64_t TASKS = 32;
// index where no gradient passes.
constexpr int BLOCKED = 9;

/// Calls body(channel, count, lanes) on groups of PACKS packs, then packs, then the tail.
template <class Body>
void for_each_group(int64_t k, const Body& body) {
  int64_t channel = 0;
  for (; channel + PACKS * PACK <= k; channel += PACKS * PACK) {
    body(channel, std::integral_constant<int, PACKS>{}, All{});
  }
  for_each_pack(channel, k, [&](int64_t first, auto lanes) {
    body(first, std::integral_constant<int, 1>{}, lanes);
  });
}

/// COUNT vectors at a group's channels.
template <class T, int COUNT>
using Group = Channels<T, COUNT, PACKS * PACK>;

/// Images (n, h, w) and their windows (n, p, q).
struct Images {
  int64_t n, h, w, p, q;

  template <class Args>
  explicit Images(const Args& args)
      : n(args.n), h(args.h), w(args.w), p((args.h + 1) / 2), q((args.w + 1) / 2) {}
};

/// max(value, 0) for comparing: its bits are in order as integers, NaN above all, and 0 has no
/// sign.
RESNET_FAST_INLINE Vec ordered_relu(Vec value) {
#if defined(__AVX512F__)
  // A nibble for each class, from the lowest: quiet NaN, NaN, 0, 1, -Inf, Inf, < 0, > 0. The value
  // itself is 1, +0 is 8. The order is that of unsigned integers.
  return _mm512_maskz_fixupimm_ps(ALL_LANES, value, value, _mm512_set1_epi32(0x18181811), 0);
#else
  return (Vec)((VecBits)relu(value) & 0x7fffffff);
#endif
}

/// The largest value of a part of a window as it is stored, and its place. Every value comes from
/// ordered_relu. What lies outside the image is 0 and comes first nowhere but before another 0,
/// whose place does not matter.
template <class T>
struct Best {
  using S = Storage<T>;
  using Part = typename S::Part;
  using Bits = typename S::Bits;
#if defined(__AVX512F__)
  using Order = Part;
#else
  using Order = typename S::Signed;
#endif

  Pack<T> value, place;

  /// Of one row of a window: places 0, 1, 2.
  static Best of(const Pack<T>& left, const Pack<T>& middle, const Pack<T>& right) {
    Best best;
    for (int i = 0; i < S::PARTS; ++i) {
      const Part l = left.v[i], m = middle.v[i], r = right.v[i];
      const auto second = (Order)m > (Order)l;
      const Part two = second ? m : l, place = second ? Part{} + Bits{1} : Part{};
      const auto third = (Order)r > (Order)two;
      best.value.v[i] = third ? r : two;
      best.place.v[i] = third ? Part{} + Bits{2} : place;
    }
    return best;
  }

  /// The larger; `later` comes `by` places behind this in the window.
  Best or_later(const Best& later, Bits by) const {
    Best best;
    for (int i = 0; i < S::PARTS; ++i) {
      const auto wins = (Order)later.value.v[i] > (Order)value.v[i];
      best.value.v[i] = wins ? later.value.v[i] : value.v[i];
      best.place.v[i] = wins ? later.place.v[i] + by : place.v[i];
    }
    return best;
  }

  /// The value as it is stored.
  Pack<T> stored() const {
    Pack<T> result = value;
    for (Part& part : result.v) part &= Bits{S::SIGN - 1};
    return result;
  }

  Pack<T> index() const {
    Pack<T> index;
    for (int i = 0; i < S::PARTS; ++i) {
      index.v[i] = value.v[i] == 0 ? Part{} + Bits{BLOCKED} : place.v[i];
    }
    return index;
  }
};

/// A block of windows: rows [p, p_end) and columns [q, q_end) of one image.
struct Windows {
  int64_t image, p, p_end, q, q_end;
};

// z = max of relu(y * scale + shift) over 3 x 3;  index = its place, or 9 where z is not > 0
// Shapes    y (N, H, W, K), z, index (N, P, Q, K) channels-last; scale, shift (K,) fp32
// Tiles     BLOCK_P x BLOCK_Q windows of one image, shared out to the threads; in each, groups of
//           PACKS packs of channels
// Traffic   reads y, writes z, index: NHWK * itemsize + NPQK * (itemsize + 1). The maxima of an odd
//           row are kept for the windows below it, the values of an odd column for those to its
//           right, so that each value is transformed once
// Numerics  fp32 multiply-add, rounded to the storage type, then compared; NaN wins
// Source    ops.affine_act_maxpool; docs/bn_act.md
template <class T, int COUNT, class Lanes>
void affine_act_maxpool_tile(const AffineActMaxpool& args, const Images& images,
                             const Windows& block, int64_t channel, Lanes lanes) {
  const int64_t k = args.k, w = images.w, h = images.h;
  const T* y = static_cast<const T*>(args.y) + block.image * h * w * k + channel;
  T* z = static_cast<T*>(args.z) + block.image * images.p * images.q * k + channel;
  uint8_t* index = args.index + block.image * images.p * images.q * k + channel;
  const Group<T, 2> vectors({args.scale, args.shift}, channel, smaller(channel + COUNT * PACK, k));
  // An activation as it is compared.
  const auto value = [&](const T* at, int v) {
    Pair pair = widen(load_pack(at + v * PACK, lanes));
    for (int i = 0; i < 2; ++i) {
      pair.v[i] = ordered_relu(fma(pair.v[i], vectors(0, v * PACK, i), vectors(1, v * PACK, i)));
    }
    return narrow(pair, T{});
  };
  // The best of a row's three columns, of which `at` is the middle; `left`, the last column of the
  // window before, moves on.
  const auto row_best = [&](const T* at, bool has_right, int v, Pack<T>& left) {
    const Pack<T> middle = value(at, v), right = has_right ? value(at + k, v) : Pack<T>{};
    const Best<T> best = Best<T>::of(left, middle, right);
    left = right;
    return best;
  };
  const auto row_at = [&](int64_t row) { return y + (row * w + 2 * block.q) * k; };
  const auto column_before = [&](int64_t row, Pack<T>(&left)[COUNT]) {
    for (int v = 0; v < COUNT; ++v) left[v] = block.q > 0 ? value(row_at(row) - k, v) : Pack<T>{};
  };

  Best<T> above[BLOCK_Q][COUNT] = {};  // of row 2p - 1
  Pack<T> left[COUNT], lower_left[COUNT] = {};
  if (block.p > 0) {
    const T* at = row_at(2 * block.p - 1);
    column_before(2 * block.p - 1, left);
    for (int64_t q = block.q; q < block.q_end; ++q, at += 2 * k) {
      for (int v = 0; v < COUNT; ++v) {
        above[q - block.q][v] = row_best(at, 2 * q + 1 < w, v, left[v]);
      }
    }
  }
  for (int64_t p = block.p; p < block.p_end; ++p) {
    const bool has_below = 2 * p + 1 < h;
    const T* at = row_at(2 * p);
    int64_t offset = (p * images.q + block.q) * k;
    column_before(2 * p, left);
    if (has_below) column_before(2 * p + 1, lower_left);
    for (int64_t q = block.q; q < block.q_end; ++q, at += 2 * k, offset += k) {
      const bool has_right = 2 * q + 1 < w;
      for (int v = 0; v < COUNT; ++v) {
        Best<T>& top = above[q - block.q][v];
        Best<T> best = top.or_later(row_best(at, has_right, v, left[v]), 3);
        if (has_below) {
          top = row_best(at + w * k, has_right, v, lower_left[v]);
          best = best.or_later(top, 6);
        }
        store_pack(z + offset + v * PACK, best.stored(), lanes);
        store_bytes(index + offset + v * PACK, best.index(), lanes);
      }
    }
  }
}

template <class T>
void affine_act_maxpool_kernel(const AffineActMaxpool& args) {
  const Images images(args);
  const int64_t k = args.k, across = cdiv(images.q, BLOCK_Q), columns = images.n * across;
  if (columns * images.p == 0) return;
  const int64_t parts = smaller(cdiv(TASKS, columns), cdiv(images.p, BLOCK_P));
  const int64_t height = cdiv(images.p, parts), down = cdiv(images.p, height);
  const int64_t count = columns * down;
#pragma omp parallel for schedule(static) if (images.n * images.h * images.w * k > SERIAL)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = i / across % down * height, q = i % across * BLOCK_Q;
    const Windows block{i / across / down, p, smaller(p + height, images.p), q,
                        smaller(q + BLOCK_Q, images.q)};
    for_each_group(k, [&](int64_t channel, auto packs, auto lanes) {
      affine_act_maxpool_tile<T, packs()>(args, images, block, channel, lanes);
    });
  }
}

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

void affine_act_maxpool(const AffineActMaxpool& args) {
  visit(args.dtype, [&](auto type) { affine_act_maxpool_kernel<decltype(type)>(args); });
}

void maxpool_backward_sums(const MaxpoolBackwardSums& args) {
  visit(args.dtype, [&](auto type) { maxpool_backward_sums_kernel<decltype(type)>(args); });
}

void maxpool_backward_apply(const MaxpoolBackwardApply& args) {
  visit(args.dtype, [&](auto type) { maxpool_backward_apply_kernel<decltype(type)>(args); });
}

}  // namespace

const Stem stem = {affine_act_maxpool, maxpool_backward_sums, maxpool_backward_apply};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
