// Convolutions 3 x 3, stride 1, padding 1, after Winograd, on the CPU: tiles of M x M outputs cost
// (M + 2)^2 multiplications per pair of channels instead of 9 * M^2.
//
// Compiled once per instruction set, as bn_act.cpp. Arithmetic is fp32 whatever the storage.
//
// With d an (A x A) patch of the input, A = M + 2, and g a filter, the tile of outputs is
//   Y = At [ (G g Gt) * (Bt d B) ] A,   * elementwise, summed over the input channels:
// A^2 matrix products (tiles, C) x (C, K). docs/conv.md has the matrices.
#include "winograd.h"

#include "isa.h"
#include "queue.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Floats of transformed input that stay in the level-2 cache, beside the weights that pass.
constexpr int64_t RESIDENT = 240 * 1024;
// Input channels whose filters are transformed at a time, into the level-2 cache, and those that
// are together in it: 16 parts of them are written in turns, and must fit into L1 with few pages.
constexpr int64_t CHUNK = 128;
constexpr int PIECE = 8;
// What it costs to transform a panel of filters, in row blocks multiplied with it.
constexpr double EXPAND = 0.4;
// What it costs to transform a row block's channels, in panels multiplied with it.
constexpr double TRANSFORM = 0.1;
// Units of work for each thread: what one has left, another may take.
constexpr int64_t UNITS = 8;

/// How the work is cut: `blocks` of at most `rows` row blocks each, times `groups` of panels. All
/// groups of a block stand together in the order of units.
struct Cut {
  int64_t row_blocks, rows, blocks, groups;
};

Cut cut(int64_t tiles, int64_t c, int64_t k, int64_t threads, int area) {
  const int64_t row_blocks = cdiv(tiles, ROWS), panels = cdiv(k, PACK);
  int64_t most = RESIDENT / (area * ROWS * padded(c));
  most = most < 1 ? 1 : smaller(most, row_blocks);
  Cut best{};
  double least = 0;
  for (int64_t rows = most; rows >= 1; --rows) {
    const int64_t blocks = cdiv(row_blocks, rows);
    const int64_t groups = smaller(cdiv(UNITS * threads, blocks), panels);
    const double turns = static_cast<double>(cdiv(blocks * groups, threads));
    const double unit = static_cast<double>(cdiv(panels, groups)) * (rows + EXPAND);
    const double share = static_cast<double>(blocks) / static_cast<double>(threads);
    // Behind its last unit a thread waits for the others'.
    const double time = (turns + (threads > 1 ? 0.5 : 0)) * unit +
                        (share < 1 ? 1 : share) * static_cast<double>(rows) * TRANSFORM;
    if (best.rows == 0 || time < least) {
      least = time;
      best = {row_blocks, rows, blocks, groups};
    }
  }
  return best;
}

/// A thread's workspace, in floats: the transformed input of some row blocks, their products, and
/// transformed filters. A line lies between the parts, lest they fall into the same cache sets.
template <int M>
struct Layout {
  Cut work;
  int64_t block, product, filters, kept;

  explicit Layout(const WinogradConv& args)
      : work(cut(Grid<M>(args).count(), args.c, args.k, args.threads, AREA<M>)),
        block(AREA<M> * ROWS * padded(args.c) + 16),
        product(AREA<M> * ROWS * PACK + 16),
        filters(AREA<M> * smaller(padded(args.c), CHUNK) * PACK),
        kept(padded(args.c) > CHUNK ? work.rows : 1) {}

  float* inputs(float* workspace, int64_t i) const { return workspace + i * block; }
  float* products(float* workspace, int64_t i) const {
    return workspace + work.rows * block + (kept > 1 ? i * product : 0);
  }
  float* chunk(float* workspace) const { return workspace + work.rows * block + kept * product; }
  int64_t size() const { return work.rows * block + kept * product + filters; }
};

/// The tiles [first, first + count), a row block, into v: (packs, A^2, count, PACK).
template <int M, class T>
void transform_input(const WinogradConv& args, const Grid<M>& grid, int64_t first, int64_t count,
                     float* v) {
  Patch patches[ROWS];
  find_patches(grid, args.c, first, count, patches);
  for_each_pack(0, args.c, [&](int64_t channel, auto lanes) {
    const T* x = static_cast<const T*>(args.x) + channel;
    float* out = v + channel * AREA<M> * count;
    const int64_t row = grid.w * args.c, part = count * PACK;
    const auto same = [](Vec value) __attribute__((always_inline)) { return value; };
    transform_half<M, 0>(x, row, args.c, patches, count, part, out, lanes, same);
    transform_half<M, 1>(x, row, args.c, patches, count, part, out, lanes, same);
  });
}

/// u = G g Gt of `count` input channels (a multiple of PIECE) and a panel of output channels, from
/// w (count, 9, PACK): (count / PIECE, A^2, PIECE, PACK).
template <int M>
void transform_filters(const float* w, int64_t count, float* u) {
  constexpr int A = Axis<M>::A;
  for (int64_t i = 0; i < count; ++i, w += 9 * PACK) {
    float* out = u + (i / PIECE * AREA<M> * PIECE + i % PIECE) * PACK;
    for (int half = 0; half < PACK; half += LANES) {
      Vec rows[A][3];
      for (int s = 0; s < 3; ++s) {
        const Vec g[3] = {load(w + s * PACK + half), load(w + (3 + s) * PACK + half),
                          load(w + (6 + s) * PACK + half)};
        Vec column[A];
        Axis<M>::filter(g, column);
        for (int j = 0; j < A; ++j) rows[j][s] = column[j];
      }
      for (int j = 0; j < A; ++j) {
        Vec row[A];
        Axis<M>::filter(rows[j], row);
        for (int l = 0; l < A; ++l) store(out + (j * A + l) * PIECE * PACK + half, row[l]);
      }
    }
  }
}

/// m (N, PACK) = m + v x u, or v x u where `begins`: v (packs, area, N, PACK), u (packs * PACK /
/// PIECE, area, PIECE, PACK), of which one part each. At every channel a line from `ahead` on is
/// asked for, `step` bytes further each time.
template <int N>
void multiply(const float* v, const float* u, int64_t packs, int area, bool begins, float* m,
              const char* ahead, int64_t step) {
  Vec sum[N][2];
#pragma GCC unroll 14
  for (int r = 0; r < N; ++r) {
    sum[r][0] = begins ? Vec{} : load(m + r * PACK);
    sum[r][1] = begins ? Vec{} : load(m + r * PACK + LANES);
  }
  for (int64_t pack = 0; pack < packs; ++pack, v += area * N * PACK) {
    for (int piece = 0; piece < PACK; piece += PIECE, u += area * PIECE * PACK) {
      for (int i = 0; i < PIECE; ++i, ahead += step) {
        __builtin_prefetch(ahead, 0, 2);
        const Vec left = load(u + i * PACK), right = load(u + i * PACK + LANES);
#pragma GCC unroll 14
        for (int r = 0; r < N; ++r) {
          const Vec value = broadcast(v + r * PACK + piece + i);
          sum[r][0] = fma(value, left, sum[r][0]);
          sum[r][1] = fma(value, right, sum[r][1]);
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < N; ++r) {
    store(m + r * PACK, sum[r][0]);
    store(m + r * PACK + LANES, sum[r][1]);
  }
}

using Multiply = decltype(&multiply<1>);

template <int... N>
Multiply multiply_rows(int64_t rows, std::integer_sequence<int, N...>) {
  static constexpr Multiply FUNCTIONS[] = {multiply<N + 1>...};
  return FUNCTIONS[rows - 1];
}

/// Y = At m A of one tile at half a pack; `parts` floats lie between the A^2 products.
template <int M, int HALF>
RESNET_FAST_INLINE void output_half(const float* m, int64_t parts, Pair (&y)[M][M]) {
  constexpr int A = Axis<M>::A;
  Vec half[M][A];
  for (int j = 0; j < A; ++j) {
    Vec column[A], out[M];
    for (int i = 0; i < A; ++i) column[i] = load(m + (i * A + j) * parts + HALF * LANES);
    Axis<M>::output(column, out);
    for (int i = 0; i < M; ++i) half[i][j] = out[i];
  }
  for (int i = 0; i < M; ++i) {
    Vec out[M];
    Axis<M>::output(half[i], out);
    for (int j = 0; j < M; ++j) y[i][j].v[HALF] = out[j];
  }
}

/// The tiles [first, first + count) of z at one pack of channels, from m (A^2, count, PACK).
template <int M, class T, class Lanes>
void transform_output(const WinogradConv& args, const Grid<M>& grid, int64_t first, int64_t count,
                      const float* m, int64_t channel, Lanes lanes) {
  const int64_t k = args.k;
  const Channels<T, 1, PACK> vectors({args.shift}, channel, smaller(channel + PACK, k));
  const Pair shift = args.shift ? Pair{{vectors(0, 0, 0), vectors(0, 0, 1)}} : Pair{};
  const T* residual = static_cast<const T*>(args.residual);
  T* z = static_cast<T*>(args.z);
  Place<M> place(grid, first);
  for (int64_t t = 0; t < count; ++t, place.advance(grid)) {
    Pair y[M][M];
    output_half<M, 0>(m + t * PACK, count * PACK, y);
    output_half<M, 1>(m + t * PACK, count * PACK, y);
    const int64_t corner = ((place.image * grid.h + place.row) * grid.w + place.column) * k;
    for (int i = 0; i < M && place.row + i < grid.h; ++i) {
      for (int j = 0; j < M; ++j) {
        if (place.column + j >= grid.w) break;
        const int64_t at = corner + (i * grid.w + j) * k + channel;
        Pair value = y[i][j];
        for (int h = 0; h < 2; ++h) value.v[h] += shift.v[h];
        if (residual) {
          const Pair other = widen(load_pack(residual + at, lanes));
          for (int h = 0; h < 2; ++h) value.v[h] += other.v[h];
        }
        if (args.relu) {
          for (int h = 0; h < 2; ++h) value.v[h] = relu(value.v[h]);
        }
        store_pack(z + at, narrow(value, T{}), lanes);
      }
    }
  }
}

// z = act(At [ (G g Gt) * (Bt d B) ] A + shift + residual), d the patches of x
// Shapes    x (N, H, W, C), residual, z (N, H, W, K) channels-last; u (panels, padded(C), 9, PACK)
//           fp32, a panel PACK output channels; shift (K,) fp32
// Tiles     some row blocks of at most ROWS tiles, times a group of panels: a unit; in it panels,
//           CHUNK input channels of filters, row blocks, A^2 parts; see cut()
// Traffic   reads x (A / M)^2 times, mostly from caches, u once per block of row blocks, writes z
// Numerics  fp32 from load to store; sums over C in order, one rounding, at the store
// Source    docs/conv.md entries 15 to 23, 30; Lavin and Gray, Fast Algorithms for Convolutional
//           Neural Networks, 2015
template <int M, class T>
void winograd_conv_kernel(const WinogradConv& args) {
  const Grid<M> grid(args);
  if (grid.count() == 0 || args.k == 0) return;
  constexpr int area = AREA<M>;
  const Layout<M> layout(args);
  const Cut& work = layout.work;
  const int64_t tiles = grid.count(), c = padded(args.c), panels = cdiv(args.k, PACK);
  const int64_t count = work.blocks * work.groups;
  const auto run = [&](int64_t unit, int64_t before, int64_t thread) {
    float* workspace = args.workspace + Queue::size(args.threads) + thread * layout.size();
    const int64_t block = unit / work.groups, group = unit % work.groups;
    const int64_t first = block * work.row_blocks / work.blocks;
    const int64_t last = (block + 1) * work.row_blocks / work.blocks;
    const bool held = before >= 0 && before / work.groups == block;
    // The first tile of a row block: they are all alike, but for one tile.
    const auto tile = [&](int64_t i) { return i * tiles / work.row_blocks; };
    for (int64_t i = first; i < last && !held; ++i) {
      transform_input<M, T>(args, grid, tile(i), tile(i + 1) - tile(i),
                            layout.inputs(workspace, i - first));
    }
    for (int64_t panel = group * panels / work.groups; panel < (group + 1) * panels / work.groups;
         ++panel) {
      for (int64_t channel = 0; channel < c; channel += CHUNK) {
        const int64_t depth = smaller(CHUNK, c - channel);
        const float* w = args.u + (panel * c + channel) * 9 * PACK;
        float* u = layout.chunk(workspace);
        transform_filters<M>(w, depth, u);
        for (int64_t i = first; i < last; ++i) {
          const int64_t rows = tile(i + 1) - tile(i);
          const Multiply f = multiply_rows(rows, std::make_integer_sequence<int, ROWS>{});
          const float* v = layout.inputs(workspace, i - first) + channel * area * rows;
          float* m = layout.products(workspace, i - first);
          const bool begins = channel == 0, ends = channel + depth == c;
          // The next filters: 9 lines to a half of 16 channels.
          const char* next = reinterpret_cast<const char*>(w + depth * 9 * PACK);
          const int64_t step = i == first ? 9 * PACK * 4 / area : 0;
          for (int part = 0; part < area; ++part) {
            f(v + part * rows * PACK, u + part * PIECE * PACK, depth / PACK, area, begins,
              m + part * rows * PACK, next + part * depth * step, step);
          }
          if (!ends) continue;
          for_each_pack(panel * PACK, smaller((panel + 1) * PACK, args.k),
                        [&](int64_t first_k, auto lanes) {
                          transform_output<M, T>(args, grid, tile(i), rows, m, first_k, lanes);
                        });
        }
      }
    }
  };
  for_each_unit(count, args.workspace, args.threads, run);
}

// u[panel, c, tap, k] = w[k, c, tap], halved in the middle row and in the middle column
// Shapes    w (K, C, 3, 3) fp32 in any layout; u (panels, padded(C), 9, PACK) fp32, the channels in
//           the order in which packs of T are widened, 0 behind the last
// Tiles     a panel of PACK output channels and a vector's worth of input channels
// Traffic   reads w, writes u: 2 * 9 * KC * 4
// Numerics  exact: the factors are powers of two
// Source    docs/conv.md entry 16
template <class T>
void winograd_weight_tile(const WinogradWeight& args, int64_t panel, int64_t first) {
  const int64_t start = first / PACK * PACK;
  const int half = static_cast<int>(first - start) / LANES;
  float* u = args.u + (panel * padded(args.c) + first) * 9 * PACK;
  for (int h = 0; h < 2; ++h) {
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t k = panel * PACK + Storage<T>::channel(h, lane);
      for (int i = 0; i < LANES; ++i) {
        const int64_t c = start + Storage<T>::channel(half, i);
        const bool in = k < args.k && c < args.c;
        const float* w = args.w + (in ? k * args.k_stride + c * args.c_stride : 0);
        float* out = u + i * 9 * PACK + h * LANES + lane;
        for (int tap = 0; tap < 9; ++tap) {
          const float scale = (tap / 3 == 1 ? 0.5f : 1) * (tap % 3 == 1 ? 0.5f : 1);
          out[(args.flip ? 8 - tap : tap) * PACK] = in ? w[tap * args.tap_stride] * scale : 0;
        }
      }
    }
  }
}

template <class T>
void winograd_weight_kernel(const WinogradWeight& args) {
  const int64_t panels = cdiv(args.k, PACK), parts = padded(args.c) / LANES;
#pragma omp parallel for schedule(static) if (args.k * args.c * 9 > SERIAL)
  for (int64_t i = 0; i < panels * parts; ++i) {
    winograd_weight_tile<T>(args, i / parts, i % parts * LANES);
  }
}

int64_t winograd_workspace(const WinogradConv& args) {
  return Queue::size(args.threads) + args.threads * Layout<2>(args).size();
}

void winograd_conv(const WinogradConv& args) {
  visit(args.dtype, [&](auto type) { winograd_conv_kernel<2, decltype(type)>(args); });
}

int64_t winograd_weight_size(int64_t c, int64_t k) { return 9 * padded(c) * padded(k); }

void winograd_weight(const WinogradWeight& args) {
  visit(args.dtype, [&](auto type) { winograd_weight_kernel<decltype(type)>(args); });
}

}  // namespace

const Winograd winograd = {winograd_weight_size, winograd_weight, winograd_workspace,
                           winograd_conv};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
