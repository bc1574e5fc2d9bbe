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

// Vectors of channels side by side: whole cache lines are read in order.
constexpr int VECS = LANES == 16 ? 4 : 2;
// Windows of one row whose keys a thread keeps, in L1, and that one fp32 sum is formed over.
constexpr int64_t BLOCK_Q = 64;
// Rows of windows to one task: of each task the first row is read twice, from a cache.
constexpr int64_t BLOCK_P = 8;
// index where no gradient passes.
constexpr uint32_t BLOCKED = 9;

/// Calls body(channel, count, lanes) on groups of VECS vectors, then vectors, then the tail.
template <class Body>
void for_each_group(int64_t k, const Body& body) {
  int64_t channel = 0;
  for (; channel + VECS * LANES <= k; channel += VECS * LANES) {
    body(channel, std::integral_constant<int, VECS>{}, All{});
  }
  for_each_vector(channel, k, [&](int64_t first, auto lanes) {
    body(first, std::integral_constant<int, 1>{}, lanes);
  });
}

/// Images (n, h, w) and their windows (n, p, q).
struct Images {
  int64_t n, h, w, p, q;

  template <class Args>
  explicit Images(const Args& args)
      : n(args.n), h(args.h), w(args.w), p((args.h + 1) / 2), q((args.w + 1) / 2) {}
};

// Every value of a window is >= 0 or NaN, so its bits, without the sign, are in order as integers,
// NaN above all. A key holds them and 8 - place: of equal values the first has the largest key. Of
// what lies outside the image the key is 0, as small as the smallest inside.

/// 16 bits of value above, 8 - place below.
template <class T>
struct Key {
  VecBits bits;

  static Key of(Vec activation) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      // Rounded in place, to nearest even. Of NaN's bits no more than the first: it cannot
      // overflow.
      const VecBits nan = VecBits{} + 0x7fc00000;
      const VecBits exact = (VecBits)absolute(activation);
      const VecBits value = exact > nan ? nan : exact;
      return {(value + 0x7fff + (value >> 16 & 1)) & 0xffff0000};
    } else {
      return {widen_bits(narrow(absolute(activation), T{})) << 16};
    }
  }

  Key at(uint32_t code) const { return {bits + code}; }

  /// The larger; `later` comes behind this in the window.
  Key or_later(Key later) const { return {larger(bits, later.bits)}; }

  template <class Lanes>
  void store_value(T* z, Lanes lanes) const {
    if constexpr (std::is_same_v<Lanes, All>) {
      store_bits(z, narrow_bits(bits >> 16));
    } else {
      const VecHalf half = narrow_bits(bits >> 16);
      for (int i = 0; i < lanes.n; ++i) z[i].bits = half[i];
    }
  }

  VecBits place() const { return bits >> 16 == 0 ? VecBits{} + BLOCKED : 8 - (bits & 15); }
};

/// fp32 leaves no bits for the place.
template <>
struct Key<float> {
  VecBits bits, code;

  static Key of(Vec activation) { return {(VecBits)absolute(activation), VecBits{}}; }

  Key at(uint32_t more) const { return {bits, code + more}; }

  Key or_later(Key later) const {
    const auto wins = later.bits > bits;
    return {wins ? later.bits : bits, wins ? later.code : code};
  }

  template <class Lanes>
  void store_value(float* z, Lanes lanes) const {
    store(z, (Vec)bits, lanes);
  }

  VecBits place() const { return bits == 0 ? VecBits{} + BLOCKED : 8 - code; }
};

/// A block of windows: rows [p, p_end) and columns [q, q_end) of one image.
struct Windows {
  int64_t image, p, p_end, q, q_end;
};

// z = max of relu(y * scale + shift) over 3 x 3;  index = its place, or 9 where z is not > 0
// Shapes    y (N, H, W, K), z, index (N, P, Q, K) channels-last; scale, shift (K,) fp32
// Tiles     BLOCK_P x BLOCK_Q windows of one image, shared out to the threads; in each, groups of
//           VECS vectors of channels
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
  Vec scale[COUNT], shift[COUNT];
  for (int v = 0; v < COUNT; ++v) {
    scale[v] = load(args.scale + channel + v * LANES, lanes);
    shift[v] = load(args.shift + channel + v * LANES, lanes);
  }
  const auto key = [&](int64_t row, int64_t column, int v) {
    const Vec value = load(y + (row * w + column) * k + v * LANES, lanes);
    return Key<T>::of(relu(fma(value, scale[v], shift[v])));
  };
  // The best of three columns of a row; `left`, the last column of the window before, moves on.
  const auto row_best = [&](int64_t row, int64_t q, int v, Key<T>& left) {
    const Key<T> middle = key(row, 2 * q, v);
    const Key<T> right = 2 * q + 1 < w ? key(row, 2 * q + 1, v) : Key<T>{};
    const Key<T> best = left.at(2).or_later(middle.at(1)).or_later(right);
    left = right;
    return best;
  };
  const auto column_before = [&](int64_t row, Key<T>(&left)[COUNT]) {
    for (int v = 0; v < COUNT; ++v) left[v] = block.q > 0 ? key(row, 2 * block.q - 1, v) : Key<T>{};
  };

  Key<T> above[BLOCK_Q][COUNT] = {};  // of row 2p - 1
  Key<T> left[COUNT], lower_left[COUNT] = {};
  if (block.p > 0) {
    column_before(2 * block.p - 1, left);
    for (int64_t q = block.q; q < block.q_end; ++q) {
      for (int v = 0; v < COUNT; ++v) {
        above[q - block.q][v] = row_best(2 * block.p - 1, q, v, left[v]);
      }
    }
  }
  for (int64_t p = block.p; p < block.p_end; ++p) {
    const bool has_below = 2 * p + 1 < h;
    column_before(2 * p, left);
    if (has_below) column_before(2 * p + 1, lower_left);
    for (int64_t q = block.q; q < block.q_end; ++q) {
      for (int v = 0; v < COUNT; ++v) {
        Key<T>& top = above[q - block.q][v];
        Key<T> best = top.at(6).or_later(row_best(2 * p, q, v, left[v]).at(3));
        if (has_below) {
          const Key<T> below = row_best(2 * p + 1, q, v, lower_left[v]);
          best = best.or_later(below);
          top = below;
        }
        const int64_t offset = (p * images.q + q) * k + v * LANES;
        best.store_value(z + offset, lanes);
        store_bytes(index + offset, best.place(), lanes);
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
    for_each_group(k, [&](int64_t channel, auto vectors, auto lanes) {
      affine_act_maxpool_tile<T, vectors()>(args, images, block, channel, lanes);
    });
  }
}

/// The gradient of the pooled output at some windows, and which of their values it goes to.
struct Pooled {
  Vec dz;
  VecBits place;

  Vec where(uint32_t wanted) const { return place == wanted ? dz : Vec{}; }
};

/// g of the values that a row of windows shares with no window above it: rows 2p and 2p + 1. Calls
/// body(row, column, v, g) on each vector of them, for windows [q, q_end) of row p of an image, in
/// order of the columns.
template <class T, int COUNT, class Args, class Lanes, class Body>
void for_each_gradient(const Args& args, const Images& images, const Windows& block,
                       int64_t channel, Lanes lanes, const Body& body) {
  const int64_t k = args.k, p = block.p;
  const int64_t first = block.image * images.p * images.q * k + channel;
  const T* dz = static_cast<const T*>(args.dz) + first;
  const uint8_t* index = args.index + first;
  const auto pooled = [&](int64_t row, int64_t column, int v) {
    const int64_t offset = (row * images.q + column) * k + v * LANES;
    return Pooled{load(dz + offset, lanes), load_bytes(index + offset, lanes)};
  };
  const Pooled nothing{Vec{}, VecBits{} + BLOCKED};
  const bool window_below = p + 1 < images.p, row_below = 2 * p + 1 < images.h;
  const auto around = [&](int64_t q, bool window_right,
                          bool column_right) __attribute__((always_inline)) {
    for (int v = 0; v < COUNT; ++v) {
      const Pooled here = pooled(p, q, v);
      const Pooled right = window_right ? pooled(p, q + 1, v) : nothing;
      body(2 * p, 2 * q, v, here.where(4));
      if (column_right) body(2 * p, 2 * q + 1, v, here.where(5) + right.where(3));
      if (!row_below) continue;
      const Pooled below = window_below ? pooled(p + 1, q, v) : nothing;
      const Pooled across = window_below && window_right ? pooled(p + 1, q + 1, v) : nothing;
      body(2 * p + 1, 2 * q, v, here.where(7) + below.where(1));
      if (column_right) {
        body(2 * p + 1, 2 * q + 1, v,
             (here.where(8) + right.where(6)) + (below.where(2) + across.where(0)));
      }
    }
  };
  const int64_t inner_end = smaller(block.q_end, images.q - 1);
  for (int64_t q = block.q; q < inner_end; ++q) around(q, true, true);
  if (inner_end < block.q_end) around(inner_end, false, 2 * inner_end + 1 < images.w);
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
// Shapes    dz, index (N, P, Q, K), y (N, H, W, K) channels-last; mean, sums (K,) fp32;
//           workspace (2, tiles, K) fp32
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
  Vec mean[COUNT], g_sums[COUNT] = {}, gy_sums[COUNT] = {};
  for (int v = 0; v < COUNT; ++v) mean[v] = load(args.mean + channel + v * LANES, lanes);
  for_each_gradient<T, COUNT>(
      args, images, block, channel, lanes,
      [&, w = images.w, k = args.k](int64_t row, int64_t column, int v, Vec g)
          __attribute__((always_inline)) {
            const Vec value = load(y + (row * w + column) * k + v * LANES, lanes);
            g_sums[v] += g;
            gy_sums[v] = fma(g, value - mean[v], gy_sums[v]);
          });
  for (int v = 0; v < COUNT; ++v) {
    float* g = sum_g + channel + v * LANES;
    float* gy = sum_gy + channel + v * LANES;
    store(g, begins ? g_sums[v] : load(g, lanes) + g_sums[v], lanes);
    store(gy, begins ? gy_sums[v] : load(gy, lanes) + gy_sums[v], lanes);
  }
}

template <class T>
void maxpool_backward_sums_kernel(const MaxpoolBackwardSums& args) {
  const Images images(args);
  const Rows rows{images};
  const int64_t k = args.k, values = images.n * images.h * images.w;
  const int64_t length = values > 0 ? cdiv(rows.count(), Tiles{values, k}.row_blocks()) : 1;
  const int64_t tiles = cdiv(rows.count(), length), plane = tiles * k;
#pragma omp parallel for schedule(static) if (values * k > SERIAL)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float* sum_g = args.workspace + tile * k;
    for (int64_t i = tile * length; i < smaller((tile + 1) * length, rows.count()); ++i) {
      for_each_group(k, [&](int64_t channel, auto vectors, auto lanes) {
        maxpool_backward_sums_tile<T, vectors()>(args, images, rows[i], channel, lanes,
                                                 i == tile * length, sum_g, sum_g + plane);
      });
    }
  }
  merge_sums(tiles, k, args.workspace, {args.sum_g, args.sum_gy});
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
  Vec mean[COUNT], a[COUNT], b[COUNT], c[COUNT];
  for (int v = 0; v < COUNT; ++v) {
    mean[v] = load(args.mean + channel + v * LANES, lanes);
    a[v] = load(args.a + channel + v * LANES, lanes);
    b[v] = load(args.b + channel + v * LANES, lanes);
    c[v] = load(args.c + channel + v * LANES, lanes);
  }
  for_each_gradient<T, COUNT>(args, images, block, channel, lanes,
                              [&, w = images.w, k = args.k](int64_t row, int64_t column, int v,
                                                            Vec g) __attribute__((always_inline)) {
                                const int64_t offset = (row * w + column) * k + v * LANES;
                                const Vec centred = load(y + offset, lanes) - mean[v];
                                store(dy + offset, fma(a[v], g, fma(b[v], centred, c[v])), lanes);
                              });
}

template <class T>
void maxpool_backward_apply_kernel(const MaxpoolBackwardApply& args) {
  const Images images(args);
  const Rows rows{images};
  const int64_t k = args.k, count = rows.count();
#pragma omp parallel for schedule(static) if (images.n * images.h * images.w * k > SERIAL)
  for (int64_t i = 0; i < count; ++i) {
    for_each_group(k, [&](int64_t channel, auto vectors, auto lanes) {
      maxpool_backward_apply_tile<T, vectors()>(args, images, rows[i], channel, lanes);
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
