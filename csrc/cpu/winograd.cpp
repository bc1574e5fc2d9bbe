// Convolutions 3 x 3, stride 1, padding 1, after Winograd, on the CPU: tiles of M x M outputs cost
// (M + 2)^2 multiplications per pair of channels instead of 9 * M^2.
//
// Compiled once per instruction set, as bn_act.cpp. Arithmetic is fp32 whatever the storage.
//
// With d an (A x A) patch of the input, A = M + 2, and g a filter, the tile of outputs is
//   Y = At [ (G g Gt) * (Bt d B) ] A,   * elementwise, summed over the input channels:
// A^2 matrix products (tiles, C) x (C, K). docs/conv.md has the matrices.
#include <omp.h>

#include <type_traits>

#include "isa.h"
#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Tiles to a row block: rows of accumulators, two vectors wide, that the registers hold.
#if defined(__AVX512F__)
constexpr int ROWS = 14;
#else
constexpr int ROWS = 6;
#endif
// Floats of transformed input that stay in the level-2 cache, beside the weights that pass.
constexpr int64_t RESIDENT = 240 * 1024;
// What it costs to fetch a panel of weights, in row blocks multiplied with it.
constexpr double FETCH = 0.5;
// What it costs to transform a row block's channels in and out, in panels multiplied with it.
constexpr double TRANSFORM = 0.1;

/// The transforms along one axis, on vectors of channels.
template <int M>
struct Axis;

template <>
struct Axis<2> {
  static constexpr int A = 4;

  RESNET_FAST_INLINE void input(Vec (&d)[A]) {
    const Vec a = d[0] - d[2], b = d[1] + d[2], c = d[2] - d[1], e = d[1] - d[3];
    d[0] = a, d[1] = b, d[2] = c, d[3] = e;
  }
  RESNET_FAST_INLINE void filter(const Vec (&g)[3], Vec (&u)[A]) {
    const Vec outer = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
    u[0] = g[0], u[1] = outer + middle, u[2] = outer - middle, u[3] = g[2];
  }
  RESNET_FAST_INLINE void output(const Vec (&m)[A], Vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

/// Tiles of M x M outputs, row by row, image by image.
template <int M>
struct Grid {
  int64_t n, h, w, down, across;

  explicit Grid(const WinogradConv& args)
      : n(args.n), h(args.h), w(args.w), down(cdiv(args.h, M)), across(cdiv(args.w, M)) {}

  int64_t count() const { return n * down * across; }

  /// The tile's image, and the row and the column of its first output.
  struct Place {
    int64_t image, row, column;
  };
  Place operator[](int64_t i) const {
    return {i / across / down, i / across % down * M, i % across * M};
  }
};

/// How the work is cut: `blocks` of at most `rows` row blocks each, times `groups` of panels.
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
    for (int64_t groups = 1; groups <= smaller(panels, threads); ++groups) {
      const double turns = static_cast<double>(cdiv(blocks * groups, threads));
      const double width = static_cast<double>(cdiv(panels, groups));
      const double time = turns * (width * (rows + FETCH) + rows * TRANSFORM);
      if (best.rows == 0 || time < least) {
        least = time;
        best = {row_blocks, rows, blocks, groups};
      }
    }
  }
  return best;
}

/// Floats of one row block's transformed input; a line more than it takes, lest all of its parts
/// fall into the same sets of a cache.
int64_t resident(int64_t c, int area) { return area * (ROWS * padded(c) + 16); }

template <int M>
constexpr int AREA = Axis<M>::A* Axis<M>::A;

template <int M>
int64_t workspace_of(const WinogradConv& args) {
  const Grid<M> grid(args);
  if (grid.count() == 0) return 0;
  const Cut c = cut(grid.count(), args.c, args.k, args.threads, AREA<M>);
  return c.rows * resident(args.c, AREA<M>) + AREA<M> * ROWS * PACK;
}

template <int HALF, class T, class Lanes>
RESNET_FAST_INLINE Vec load_half(const T* p, Lanes lanes) {
  return widen(load_pack(p, lanes)).v[HALF];
}

/// v = Bt d B of one tile, at a pack of channels. `parts` floats lie between the A^2 results.
template <int M, int HALF, class T, class Lanes>
RESNET_FAST_INLINE void input_half(const T* x, int64_t row_stride, int64_t column_stride,
                                   const bool* rows_in, const bool* columns_in, bool inside,
                                   float* v, int64_t parts, Lanes lanes) {
  constexpr int A = Axis<M>::A;
  // The next tile's place, which is in the level-2 cache at best.
  for (int i = 0; i < A * A; ++i) __builtin_prefetch(v + i * parts + HALF * LANES + PACK, 1);
  Vec d[A][A];
  for (int j = 0; j < A; ++j) {
    Vec column[A];
    for (int i = 0; i < A; ++i) {
      const bool in = inside || (rows_in[i] && columns_in[j]);
      column[i] = in ? load_half<HALF>(x + i * row_stride + j * column_stride, lanes) : Vec{};
    }
    Axis<M>::input(column);
    for (int i = 0; i < A; ++i) d[i][j] = column[i];
  }
  for (int i = 0; i < A; ++i) {
    Axis<M>::input(d[i]);
    for (int j = 0; j < A; ++j) store(v + (i * A + j) * parts + HALF * LANES, d[i][j]);
  }
}

/// The tiles [first, first + count) of one row block into v: (A^2, padded(c) / PACK, count, PACK).
template <int M, class T>
void transform_input(const WinogradConv& args, const Grid<M>& grid, int64_t first, int64_t count,
                     float* v, int64_t parts) {
  constexpr int A = Axis<M>::A;
  const int64_t c = args.c, column_stride = c, row_stride = grid.w * c;
  for (int64_t t = 0; t < count; ++t) {
    const auto place = grid[first + t];
    bool rows_in[A], columns_in[A], inside = true;
    for (int i = 0; i < A; ++i) {
      rows_in[i] = place.row - 1 + i >= 0 && place.row - 1 + i < grid.h;
      columns_in[i] = place.column - 1 + i >= 0 && place.column - 1 + i < grid.w;
      inside = inside && rows_in[i] && columns_in[i];
    }
    const T* x = static_cast<const T*>(args.x) +
                 ((place.image * grid.h + place.row - 1) * grid.w + place.column - 1) * c;
    for_each_pack(0, c, [&](int64_t channel, auto lanes) __attribute__((always_inline)) {
      float* out = v + channel * count + t * PACK;
      const auto both = [&](auto in) __attribute__((always_inline)) {
        input_half<M, 0>(x + channel, row_stride, column_stride, rows_in, columns_in, in(), out,
                         parts, lanes);
        input_half<M, 1>(x + channel, row_stride, column_stride, rows_in, columns_in, in(), out,
                         parts, lanes);
      };
      if (inside) {
        both(std::true_type{});
      } else {
        both(std::false_type{});
      }
    });
  }
}

/// m (rows, PACK) = v (packs, rows, PACK) x u (packs * PACK, PACK).
template <int N>
void multiply(const float* v, const float* u, int64_t packs, float* m) {
  Vec sum[N][2] = {};
  for (int64_t pack = 0; pack < packs; ++pack, v += N * PACK) {
#pragma GCC unroll 4
    for (int i = 0; i < PACK; ++i, u += PACK) {
      const Vec left = load(u), right = load(u + LANES);
#pragma GCC unroll 14
      for (int r = 0; r < N; ++r) {
        const Vec value = broadcast(v + r * PACK + i);
        sum[r][0] = fma(value, left, sum[r][0]);
        sum[r][1] = fma(value, right, sum[r][1]);
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < N; ++r) {
    store(m + r * PACK, sum[r][0]);
    store(m + r * PACK + LANES, sum[r][1]);
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, float*);

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
  for (int64_t t = 0; t < count; ++t) {
    const auto place = grid[first + t];
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

template <int M, class T>
void winograd_conv_kernel(const WinogradConv& args) {
  const Grid<M> grid(args);
  if (grid.count() == 0 || args.k == 0) return;
  constexpr int area = AREA<M>;
  const int64_t tiles = grid.count(), c = padded(args.c), panels = cdiv(args.k, PACK);
  const Cut work = cut(tiles, args.c, args.k, args.threads, area);
  const int64_t size = workspace_of<M>(args);
  const int64_t count = work.blocks * work.groups;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (count > 1)
  for (int64_t task = 0; task < count; ++task) {
    float* v = args.workspace + omp_get_thread_num() * size;
    float* m = v + work.rows * resident(args.c, area);
    const int64_t block = task / work.groups, group = task % work.groups;
    const int64_t first = block * work.row_blocks / work.blocks;
    const int64_t last = (block + 1) * work.row_blocks / work.blocks;
    // The tiles of a row block: all alike, but for one.
    const auto tile = [&](int64_t i) { return i * tiles / work.row_blocks; };
    for (int64_t i = first; i < last; ++i) {
      const int64_t rows = tile(i + 1) - tile(i);
      transform_input<M, T>(args, grid, tile(i), rows, v + (i - first) * resident(args.c, area),
                            rows * c + 16);
    }
    for (int64_t panel = group * panels / work.groups; panel < (group + 1) * panels / work.groups;
         ++panel) {
      const float* u = args.u + panel * area * c * PACK;
      for (int64_t i = first; i < last; ++i) {
        const int64_t rows = tile(i + 1) - tile(i);
        const Multiply f = multiply_rows(rows, std::make_integer_sequence<int, ROWS>{});
        const float* operand = v + (i - first) * resident(args.c, area);
        for (int part = 0; part < area; ++part) {
          f(operand + part * (rows * c + 16), u + part * c * PACK, c / PACK, m + part * rows * PACK);
        }
        for_each_pack(panel * PACK, smaller((panel + 1) * PACK, args.k),
                      [&](int64_t channel, auto lanes) {
                        transform_output<M, T>(args, grid, tile(i), rows, m, channel, lanes);
                      });
      }
    }
  }
}

/// u = G g Gt of a panel of output channels and a vector's worth of input channels, in the order in
/// which packs of T are widened.
template <int M, class T>
void winograd_weight_tile(const WinogradWeight& args, int64_t panel, int64_t first) {
  constexpr int A = Axis<M>::A;
  alignas(64) float taps[9][LANES][PACK] = {};
  const int64_t start = first / PACK * PACK;
  const int half = static_cast<int>(first - start) / LANES;
  for (int h = 0; h < 2; ++h) {
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t k = panel * PACK + Storage<T>::channel(h, lane);
      for (int i = 0; i < LANES && k < args.k; ++i) {
        const int64_t c = start + Storage<T>::channel(half, i);
        if (c >= args.c) continue;
        const float* w = args.w + k * args.k_stride + c * args.c_stride;
        for (int tap = 0; tap < 9; ++tap) {
          taps[args.flip ? 8 - tap : tap][i][h * LANES + lane] = w[tap * args.tap_stride];
        }
      }
    }
  }
  const int64_t c = padded(args.c);
  float* u = args.u + (panel * AREA<M> * c + first) * PACK;
  for (int i = 0; i < LANES; ++i) {
    for (int h = 0; h < 2; ++h) {
      Vec rows[A][3];
      for (int s = 0; s < 3; ++s) {
        const auto tap = [&](int r) { return load(&taps[3 * r + s][i][h * LANES]); };
        const Vec g[3] = {tap(0), tap(1), tap(2)};
        Vec column[A];
        Axis<M>::filter(g, column);
        for (int j = 0; j < A; ++j) rows[j][s] = column[j];
      }
      for (int j = 0; j < A; ++j) {
        Vec row[A];
        Axis<M>::filter(rows[j], row);
        for (int l = 0; l < A; ++l) store(u + ((j * A + l) * c + i) * PACK + h * LANES, row[l]);
      }
    }
  }
}

template <int M, class T>
void winograd_weight_kernel(const WinogradWeight& args) {
  const int64_t panels = cdiv(args.k, PACK), parts = padded(args.c) / LANES;
#pragma omp parallel for schedule(static) if (args.k * args.c * 9 > SERIAL)
  for (int64_t i = 0; i < panels * parts; ++i) {
    winograd_weight_tile<M, T>(args, i / parts, i % parts * LANES);
  }
}

int64_t winograd_workspace(const WinogradConv& args) {
  return args.threads * workspace_of<2>(args);
}

void winograd_conv(const WinogradConv& args) {
  visit(args.dtype, [&](auto type) { winograd_conv_kernel<2, decltype(type)>(args); });
}

int64_t winograd_weight_size(int64_t c, int64_t k) { return AREA<2> * padded(c) * padded(k); }

void winograd_weight(const WinogradWeight& args) {
  visit(args.dtype, [&](auto type) { winograd_weight_kernel<2, decltype(type)>(args); });
}

}  // namespace

const Winograd winograd = {winograd_weight_size, winograd_weight, winograd_workspace,
                           winograd_conv};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
