// Gradients of the filters of convolutions 3 x 3, stride 1, padding 1, after Winograd, on the CPU:
// tiles of M x M outputs cost (M + 2)^2 multiplications per pair of channels instead of 9 * M^2.
//
// Compiled once per instruction set, as bn_act.cpp. Arithmetic is fp32 whatever the storage.
//
// With d a patch of the input and e the gradient of the tile of outputs that it belongs to,
//   dg = Gt [ sum over the tiles of (A e At) * (Bt d B) ] G,   * elementwise:
// (M + 2)^2 matrix products (K, tiles) x (tiles, C). docs/conv.md has the matrices.
#include "isa.h"
#include "queue.h"
#include "winograd.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

constexpr int M = 2;
constexpr int A = Axis<M>::A;
// Floats that stay in the level-2 cache: the sums of a unit, and the transformed tiles of a block.
constexpr int64_t BUDGET = 280 * 1024;
// Channels of a unit, at most: sums of 16 * 64 * 128 floats.
constexpr int64_t GROUP_K = 64;
constexpr int64_t GROUP_C = 128;
// Tiles to a block, at most: their sum is formed in registers.
constexpr int64_t BLOCK_TILES = 64;
// Units that the tiles are cut for, while the sums of all their segments stay below so many floats.
constexpr int64_t UNITS = 16;
constexpr int64_t SUMS = 1024 * 1024;

/// How the work is cut: `segments` of the tiles, each in blocks of at most `block` tiles, times
/// groups of packs of output and input channels. Sums are formed over a block, over a segment's
/// blocks and over the segments, in order: these follow from the shape alone, so that results do
/// not depend on the number of threads, which only `k_group` depends on.
struct Plan {
  int64_t tiles, k_packs, c_packs, k_group, c_group, block, segments;

  explicit Plan(const WinogradWgrad& args)
      : tiles(Grid<M>(args).count()),
        k_packs(cdiv(args.k, PACK)),
        c_packs(cdiv(args.c, PACK)),
        k_group(smaller(cdiv(GROUP_K, PACK), k_packs)),
        c_group(smaller(cdiv(GROUP_C, PACK), c_packs)) {
    const int64_t sums = AREA<M> * k_group * c_group * PACK * PACK;
    block = (BUDGET - sums) / (AREA<M> * (k_group + c_group) * PACK);
    block = block > BLOCK_TILES ? BLOCK_TILES : block < ROWS ? ROWS : block;
    segments = smaller(cdiv(UNITS, groups()), SUMS / (AREA<M> * args.k * args.c));
    segments = smaller(segments < 1 ? 1 : segments, cdiv(tiles, block));
    while (k_group > 1 && units() < 2 * args.threads) k_group = cdiv(k_group, 2);
  }

  int64_t k_groups() const { return cdiv(k_packs, k_group); }
  int64_t c_groups() const { return cdiv(c_packs, c_group); }
  int64_t groups() const { return k_groups() * c_groups(); }
  int64_t units() const { return segments * groups(); }

  /// Floats from one of the A^2 parts of a pack's transformed tiles to the next: not a power of
  /// two, lest all parts fall into the same cache sets.
  int64_t part() const { return block * PACK + 16; }
  /// Of a pack's transformed tiles.
  int64_t pack() const { return AREA<M> * part(); }
  /// Of the sums of a pair of packs.
  static constexpr int64_t pair() { return AREA<M> * PACK * PACK; }

  int64_t all_sums() const { return segments * k_packs * c_packs * pair(); }
  int64_t sums(int64_t segment, int64_t k_pack, int64_t c_pack) const {
    return ((segment * k_packs + k_pack) * c_packs + c_pack) * pair();
  }
  /// A thread's own.
  int64_t own() const { return (k_group + c_group) * pack(); }
  int64_t size() const { return all_sums() + own(); }
};

/// e = A dY At at half a pack of channels of `count` tiles: (A^2, count, PACK), `part` floats from
/// one of the A^2 to the next. dY is 0 outside of the image.
template <int HALF, class T, class Lanes>
RESNET_FAST_INLINE void transform_gradient(const T* dy, const Grid<M>& grid, int64_t k,
                                           int64_t first, int64_t count, int64_t part, float* e,
                                           Lanes lanes) {
  Place<M> place(grid, first);
  for (int64_t t = 0; t < count; ++t, e += PACK, place.advance(grid)) {
    const T* at = dy + ((place.image * grid.h + place.row) * grid.w + place.column) * k;
    const bool below = place.row + 1 < grid.h, beside = place.column + 1 < grid.w;
    if (HALF == 0) {  // what comes four tiles later
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < M; ++j) prefetch_pack(at + (i * grid.w + j + 4 * M) * k);
      }
    }
    Vec columns[M][A];
#pragma GCC unroll 2
    for (int j = 0; j < M; ++j) {
      const bool in = j == 0 || beside;
      const T* p = at + j * k;
      const Vec column[M] = {in ? load_half<HALF>(p, lanes) : Vec{},
                             in && below ? load_half<HALF>(p + grid.w * k, lanes) : Vec{}};
      Axis<M>::output_gradient(column, columns[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i) {
      const Vec row[M] = {columns[0][i], columns[1][i]};
      Vec out[A];
      Axis<M>::output_gradient(row, out);
#pragma GCC unroll 4
      for (int j = 0; j < A; ++j) store(e + (i * A + j) * part + HALF * LANES, out[j]);
    }
  }
}

/// The patches of a block of tiles at one pack of input channels: of act(x * scale + shift), or x.
template <class T, class Lanes>
void transform_patches(const WinogradWgrad& args, const Grid<M>& grid, const Patch* patches,
                       int64_t count, int64_t part, float* v, int64_t channel, Lanes lanes) {
  const T* x = static_cast<const T*>(args.x) + channel;
  const int64_t row = grid.w * args.c;
  const auto both = [&](const auto& left, const auto& right) __attribute__((always_inline)) {
    transform_half<M, 0>(x, row, args.c, patches, count, part, v, lanes, left);
    transform_half<M, 1>(x, row, args.c, patches, count, part, v, lanes, right);
  };
  if (!args.scale) {
    const auto same = [](Vec value) __attribute__((always_inline)) { return value; };
    return both(same, same);
  }
  const Channels<T, 2, PACK> affine({args.scale, args.shift}, channel,
                                    smaller(channel + PACK, args.c));
  const auto activation = [&](int half) __attribute__((always_inline)) {
    const Vec scale = affine(0, 0, half), shift = affine(1, 0, half);
    return [=](Vec value) __attribute__((always_inline)) {
      return rounded<T>(relu(fma(value, scale, shift)));
    };
  };
  both(activation(0), activation(1));
}

/// dw at a pair of packs: Gt (sum of the segments' sums) G.
template <class T>
void transform_sums(const WinogradWgrad& args, const Plan& plan, int64_t k_pack, int64_t c_pack) {
  const int64_t first = c_pack * PACK, channels = smaller(PACK, args.c - first);
  for_each_widened<T>(smaller(PACK, args.k - k_pack * PACK), [&](int64_t row, int64_t channel) {
    alignas(64) float taps[9][PACK];
    for (int half = 0; half < PACK; half += LANES) {
      Vec columns[A][3];
      for (int j = 0; j < A; ++j) {
        Vec u[A] = {};
        for (int i = 0; i < A; ++i) {
          for (int64_t segment = 0; segment < plan.segments; ++segment) {
            const float* sums = args.workspace + plan.sums(segment, k_pack, c_pack);
            u[i] += load(sums + ((i * A + j) * PACK + row) * PACK + half);
          }
        }
        Axis<M>::filter_gradient(u, columns[j]);
      }
      for (int r = 0; r < 3; ++r) {
        const Vec u[A] = {columns[0][r], columns[1][r], columns[2][r], columns[3][r]};
        Vec dg[3];
        Axis<M>::filter_gradient(u, dg);
        for (int s = 0; s < 3; ++s) store(taps[3 * r + s] + half, dg[s]);
      }
    }
    float* out = args.dw + (k_pack * PACK + channel) * 9 * args.c + first;
    for (int tap = 0; tap < 9; ++tap) {
      for_each_widened<T>(channels,
                          [&](int64_t i, int64_t c) { out[tap * args.c + c] = taps[tap][i]; });
    }
  });
}

// dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * act(x[n, p + r - 1, q + s - 1, c])
// Shapes    dy (N, H, W, K), x (N, H, W, C) channels-last; dw (K, 3, 3, C) fp32; act ReLU behind
//           scale and shift (C,) fp32, or nothing
// Tiles     a segment of the tiles, a group of output and one of input channels: a unit; in it
//           blocks of tiles, A^2 parts, pairs of packs; see Plan
// Traffic   reads x once per group of output channels, dy once per group of input channels; the
//           transformed values and a unit's sums stay in the level-2 cache
// Numerics  fp32: sums over a block, over a segment's blocks and over the segments, each in order;
//           x is rounded behind the ReLU as affine_act rounds it
// Source    docs/conv.md entry 45; Lavin and Gray, Fast Algorithms for Convolutional Neural
//           Networks, 2015
template <class T>
void winograd_wgrad_kernel(const WinogradWgrad& args) {
  const Grid<M> grid(args);
  const Plan plan(args);
  if (plan.tiles == 0) {
    for (int64_t i = 0; i < args.k * 9 * args.c; ++i) args.dw[i] = 0;
    return;
  }
  const int64_t part = plan.part();
  const auto run = [&](int64_t unit, int64_t, int64_t thread) {
    float* e = args.workspace + plan.all_sums() + Queue::size(args.threads) + thread * plan.own();
    float* v = e + plan.k_group * plan.pack();
    const int64_t segment = unit / plan.groups(), group = unit % plan.groups();
    const int64_t k_begin = group / plan.c_groups() * plan.k_group;
    const int64_t k_end = smaller(k_begin + plan.k_group, plan.k_packs);
    const int64_t c_begin = group % plan.c_groups() * plan.c_group;
    const int64_t c_end = smaller(c_begin + plan.c_group, plan.c_packs);
    const int64_t begin = segment * plan.tiles / plan.segments;
    const int64_t tiles = (segment + 1) * plan.tiles / plan.segments - begin;
    const int64_t blocks = cdiv(tiles, plan.block);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = begin + block * tiles / blocks;
      const int64_t count = begin + (block + 1) * tiles / blocks - first;
      Patch patches[BLOCK_TILES];
      find_patches(grid, args.c, first, count, patches);
      for_each_pack(c_begin * PACK, smaller(c_end * PACK, args.c),
                    [&](int64_t channel, auto lanes) {
                      float* out = v + (channel / PACK - c_begin) * plan.pack();
                      transform_patches<T>(args, grid, patches, count, part, out, channel, lanes);
                    });
      for_each_pack(k_begin * PACK, smaller(k_end * PACK, args.k),
                    [&](int64_t channel, auto lanes) {
                      const T* dy = static_cast<const T*>(args.dy) + channel;
                      float* out = e + (channel / PACK - k_begin) * plan.pack();
                      transform_gradient<0>(dy, grid, args.k, first, count, part, out, lanes);
                      transform_gradient<1>(dy, grid, args.k, first, count, part, out, lanes);
                    });
      for (int i = 0; i < AREA<M>; ++i) {
        for (int64_t c = c_begin; c < c_end; ++c) {
          for (int64_t k = k_begin; k < k_end; ++k) {
            add_products(e + (k - k_begin) * plan.pack() + i * part,
                         v + (c - c_begin) * plan.pack() + i * part, count, block == 0,
                         args.workspace + plan.sums(segment, k, c) + i * PACK * PACK);
          }
        }
      }
    }
  };
  for_each_unit(plan.units(), args.workspace + plan.all_sums(), args.threads, run);
  const int64_t pairs = plan.k_packs * plan.c_packs;
#pragma omp parallel for schedule(static) if (args.k * args.c * AREA<M> > SERIAL_MERGE)
  for (int64_t i = 0; i < pairs; ++i) {
    transform_sums<T>(args, plan, i / plan.c_packs, i % plan.c_packs);
  }
}

int64_t winograd_wgrad_units(const WinogradWgrad& args) {
  return args.k == 0 || args.c == 0 ? 0 : Plan(args).units();
}

int64_t winograd_wgrad_workspace(const WinogradWgrad& args) {
  const Plan plan(args);
  return plan.all_sums() + Queue::size(args.threads) + args.threads * plan.own();
}

void winograd_wgrad(const WinogradWgrad& args) {
  visit(args.dtype, [&](auto type) { winograd_wgrad_kernel<decltype(type)>(args); });
}

}  // namespace

const WinogradGradient winograd_gradient = {winograd_wgrad_units, winograd_wgrad_workspace,
                                            winograd_wgrad};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
