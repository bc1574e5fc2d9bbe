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
// Rows of windows to one task: of each task the first row is read twice, from a cache.
constexpr int64_t BLOCK_P = 8;
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

/// The largest value of a part of a window as it is stored, and its place. Every value is >= 0 or
/// NaN: its bits, without the sign, are in order as integers, NaN above all. What lies outside the
/// image is 0 and comes first nowhere but before another 0, whose place does not matter.
template <class T>
struct Best {
  Pack<T> value, place;

  static Best of(const Pack<T>& value, int at) {
    Best best{value, {}};
    for (auto& part : best.place.v) {
      part = typename Storage<T>::Part{} + static_cast<typename Storage<T>::Bits>(at);
    }
    return best;
  }

  /// The same, `by` places further.
  Best moved(int by) const {
    Best best = *this;
    for (auto& part : best.place.v) part += static_cast<typename Storage<T>::Bits>(by);
    return best;
  }

  /// The larger; `later` comes behind this in the window.
  Best or_later(const Best& later) const {
    using S = Storage<T>;
    Best best;
    for (int i = 0; i < S::PARTS; ++i) {
      const auto wins = (typename S::Signed)later.value.v[i] > (typename S::Signed)value.v[i];
      best.value.v[i] = wins ? later.value.v[i] : value.v[i];
      best.place.v[i] = wins ? later.place.v[i] : place.v[i];
    }
    return best;
  }

  Pack<T> index() const {
    Pack<T> index;
    for (int i = 0; i < Storage<T>::PARTS; ++i) {
      index.v[i] = value.v[i] == 0 ? typename Storage<T>::Part{} +
                                         static_cast<typename Storage<T>::Bits>(BLOCKED)
                                   : place.v[i];
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
  // An activation as it is stored, without its sign.
  const auto value = [&](const T* at, int v) {
    Pair pair = widen(load_pack(at + v * PACK, lanes));
    for (int i = 0; i < 2; ++i) {
      pair.v[i] = relu(fma(pair.v[i], vectors(0, v * PACK, i), vectors(1, v * PACK, i)));
    }
    Pack<T> stored = narrow(pair, T{});
    for (auto& part : stored.v) part &= Storage<T>::SIGN - 1;
    return stored;
  };
  // The best of row r's three columns, of which `at` is the middle; `left`, the last column of the
  // window before, moves on.
  const auto row_best = [&](const T* at, bool has_right, int v, int r, Pack<T>& left) {
    const Pack<T> middle = value(at, v), right = has_right ? value(at + k, v) : Pack<T>{};
    const Best<T> best = Best<T>::of(left, 3 * r).or_later(Best<T>::of(middle, 3 * r + 1));
    left = right;
    return best.or_later(Best<T>::of(right, 3 * r + 2));
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
        above[q - block.q][v] = row_best(at, 2 * q + 1 < w, v, 0, left[v]);
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
        Best<T> best = top.or_later(row_best(at, has_right, v, 1, left[v]));
        if (has_below) {
          const Best<T> below = row_best(at + w * k, has_right, v, 2, lower_left[v]);
          best = best.or_later(below);
          top = below.moved(-6);
        }
        store_pack(z + offset + v * PACK, best.value, lanes);
        store_bytes(index + offset + v * PACK, best.index(), lanes);
      }
    }
  }
}

template <class T>
void affine_act_maxpool_kernel(const AffineActMaxpool& args) {
  const Images images(args);
  const int64_t k = args.k, down = cdiv(images.p, BLOCK_P), across = cdiv(images.q, BLOCK_Q);
  const int64_t count = images.n * down * across;
#pragma omp parallel for schedule(static) if (images.n * images.h * images.w * k > SERIAL)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = i / across % down * BLOCK_P, q = i % across * BLOCK_Q;
    const Windows block{i / across / down, p, smaller(p + BLOCK_P, images.p), q,
                        smaller(q + BLOCK_Q, images.q)};
    for_each_group(k, [&](int64_t channel, auto packs, auto lanes) {
      affine_act_maxpool_tile<T, packs()>(args, images, block, channel, lanes);
    });
  }
}

/// The gradient of the pooled output at some windows, and which of their values it goes to.
struct Pooled {
  Pair dz;
  VecBits place[2];

  /// sum, and what goes to place `wanted` added.
  Pair add(Pair sum, uint32_t wanted) const {
    for (int h = 0; h < 2; ++h) {
      sum.v[h] = place[h] == wanted ? sum.v[h] + dz.v[h] : sum.v[h];
    }
    return sum;
  }
};

/// g of rows 2p and 2p + 1, where p is a row of windows: body(row, column, v, g) is called on each
/// pack of them.
template <class T, int COUNT, class Args, class Lanes, class Body>
void for_each_gradient(const Args& args, const Images& images, const Windows& block,
                       int64_t channel, Lanes lanes, const Body& body) {
  const int64_t k = args.k, p = block.p;
  const int64_t start = block.image * images.p * images.q * k + channel;
  const T* dz = static_cast<const T*>(args.dz) + start;
  const uint8_t* index = args.index + start;
  const bool window_below = p + 1 < images.p, row_below = 2 * p + 1 < images.h;
  const auto pooled = [&](int64_t row, int64_t column, int v) {
    const int64_t offset = (row * images.q + column) * k + v * PACK;
    Pooled result;
    result.dz = widen(load_pack(dz + offset, lanes));
    load_bytes<T>(index + offset, result.place, lanes);
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
    for (int v = 0; v < COUNT; ++v) {
      const Pooled right = window_right ? pooled(p, q + 1, v) : nothing;
      const Pooled across = window_right && window_below ? pooled(p + 1, q + 1, v) : nothing;
      body(2 * p, 2 * q, v, here[v].add({}, 4));
      if (column_right) body(2 * p, 2 * q + 1, v, right.add(here[v].add({}, 5), 3));
      if (row_below) {
        body(2 * p + 1, 2 * q, v, below[v].add(here[v].add({}, 7), 1));
        if (column_right) {
          const Pair g = right.add(here[v].add({}, 8), 6);
          body(2 * p + 1, 2 * q + 1, v, across.add(below[v].add(g, 2), 0));
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

// sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = sum of the dz whose index points at y
// Shapes    dz, index (N, P, Q, K), y (N, H, W, K) channels-last; mean, sums (K,) fp32; workspace
//           (2, tiles, padded(K)) fp32
// Tiles     some rows of at most BLOCK_Q windows, as many as leave no more tiles than bn_workspace
//           has row blocks; each value takes from the four windows around it, none scatters
// Traffic   reads dz, index, y: NPQK * (itemsize + 1) + NHWK * itemsize; a row of dz and of index
//           is read again, from a cache, for the row of windows below
// Numerics  fp32 sums over a row, rows and tiles merged in order, tiles in double
// Source    ops.maxpool_backward_sums; docs/bn_act.md
template <class T, int COUNT, class Lanes>
void maxpool_backward_sums_tile(const MaxpoolBackwardSums& args, const Images& images,
                                const Windows& block, int64_t channel, Lanes lanes, bool begins,
                                float* sum_g, float* sum_gy) {
  const T* y = static_cast<const T*>(args.y) + block.image * images.h * images.w * args.k + channel;
  const int64_t last = smaller(channel + COUNT * PACK, args.k);
  const Group<T, 1> vectors({args.mean}, channel, last);
  Pair g_sums[COUNT] = {}, gy_sums[COUNT] = {};
  const auto body = [&, w = images.w, k = args.k](int64_t row, int64_t column, int v,
                                                  const Pair& g) __attribute__((always_inline)) {
    const Pair value = widen(load_pack(y + (row * w + column) * k + v * PACK, lanes));
    for (int h = 0; h < 2; ++h) {
      g_sums[v].v[h] += g.v[h];
      gy_sums[v].v[h] = fma(g.v[h], value.v[h] - vectors(0, v * PACK, h), gy_sums[v].v[h]);
    }
  };
  for_each_gradient<T, COUNT>(args, images, block, channel, lanes, body);
  for (int v = 0; v < COUNT; ++v) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = channel + v * PACK + h * LANES;
      store(sum_g + at, begins ? g_sums[v].v[h] : load(sum_g + at) + g_sums[v].v[h]);
      store(sum_gy + at, begins ? gy_sums[v].v[h] : load(sum_gy + at) + gy_sums[v].v[h]);
    }
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
// Numerics  fp32 from load to store; one rounding, at the store
// Source    ops.maxpool_backward_apply; docs/bn_act.md
template <class T, int COUNT, class Lanes>
void maxpool_backward_apply_tile(const MaxpoolBackwardApply& args, const Images& images,
                                 const Windows& block, int64_t channel, Lanes lanes) {
  const int64_t first = block.image * images.h * images.w * args.k + channel;
  const T* y = static_cast<const T*>(args.y) + first;
  T* dy = static_cast<T*>(args.dy) + first;
  const Group<T, 4> vectors({args.mean, args.a, args.b, args.c}, channel,
                            smaller(channel + COUNT * PACK, args.k));
  const auto body = [&, w = images.w, k = args.k](int64_t row, int64_t column, int v,
                                                  const Pair& g) __attribute__((always_inline)) {
    const int64_t offset = (row * w + column) * k + v * PACK;
    const Pair value = widen(load_pack(y + offset, lanes));
    Pair result;
    for (int h = 0; h < 2; ++h) {
      const Vec centred = value.v[h] - vectors(0, v * PACK, h);
      const Vec rest = fma(vectors(2, v * PACK, h), centred, vectors(3, v * PACK, h));
      result.v[h] = fma(vectors(1, v * PACK, h), g.v[h], rest);
    }
    store_pack(dy + offset, narrow(result, T{}), lanes);
  };
  for_each_gradient<T, COUNT>(args, images, block, channel, lanes, body);
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
