// What Winograd's convolutions 3 x 3 and the gradients of their filters share: tiles of M x M
// outputs, each of an (A x A) patch of the input, A = M + 2, and the patches' transform.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include <type_traits>

#include "products.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

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
  /// The middle tap comes halved.
  RESNET_FAST_INLINE void filter(const Vec (&g)[3], Vec (&u)[A]) {
    const Vec half = Vec{} + 0.5f, sum = g[0] + g[2];
    u[0] = g[0], u[1] = fma(sum, half, g[1]), u[2] = fma(sum, half, -g[1]), u[3] = g[2];
  }
  RESNET_FAST_INLINE void output(const Vec (&m)[A], Vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  /// The transposes of output() and, on filters that are not halved, of filter().
  RESNET_FAST_INLINE void output_gradient(const Vec (&dy)[2], Vec (&m)[A]) {
    m[0] = dy[0], m[1] = dy[0] + dy[1], m[2] = dy[0] - dy[1], m[3] = -dy[1];
  }
  RESNET_FAST_INLINE void filter_gradient(const Vec (&u)[A], Vec (&dg)[3]) {
    const Vec half = Vec{} + 0.5f, sum = half * (u[1] + u[2]);
    dg[0] = u[0] + sum, dg[1] = half * (u[1] - u[2]), dg[2] = sum + u[3];
  }
};

/// Tiles of M x M outputs, row by row, image by image.
template <int M>
struct Grid {
  int64_t n, h, w, down, across;

  template <class Args>
  explicit Grid(const Args& args)
      : n(args.n), h(args.h), w(args.w), down(cdiv(args.h, M)), across(cdiv(args.w, M)) {}

  int64_t count() const { return n * down * across; }
};

/// A tile: its image, and the row and the column of its first output.
template <int M>
struct Place {
  int64_t image, row, column;

  Place(const Grid<M>& grid, int64_t i)
      : image(i / grid.across / grid.down),
        row(i / grid.across % grid.down * M),
        column(i % grid.across * M) {}

  void advance(const Grid<M>& grid) {
    column += M;
    if (column < grid.w) return;
    column = 0;
    row += M;
    if (row < grid.h) return;
    row = 0;
    ++image;
  }
};

template <int M>
constexpr int AREA = Axis<M>::A * Axis<M>::A;

/// Half of a pack of channels.
template <int HALF, class T>
RESNET_FAST_INLINE Vec load_half(const T* p, All lanes) {
  if constexpr (Storage<T>::PARTS == 2) {
    Pack<T> pack;
    pack.v[HALF] = load_bits<typename Storage<T>::Part>(p + HALF * LANES);
    return widen(pack).v[HALF];
  } else {
    return widen(load_pack(p, lanes)).v[HALF];
  }
}

template <int HALF, class T>
RESNET_FAST_INLINE Vec load_half(const T* p, First lanes) {
  return widen(load_pack(p, lanes)).v[HALF];
}

/// The input of a tile: where its first value lies, or would lie outside of the image; which of
/// its rows and columns are inside; whether it shares columns with the tile before it.
struct Patch {
  int64_t start;
  uint32_t rows, columns;
  bool follows;
};

template <int M>
void find_patches(const Grid<M>& grid, int64_t c, int64_t first, int64_t count, Patch* patches) {
  constexpr int A = Axis<M>::A;
  Place<M> place(grid, first);
  for (int64_t t = 0; t < count; ++t, place.advance(grid)) {
    Patch& patch = patches[t];
    patch.start = ((place.image * grid.h + place.row - 1) * grid.w + place.column - 1) * c;
    patch.rows = patch.columns = 0;
    for (int i = 0; i < A; ++i) {
      patch.rows |= (place.row + i >= 1 && place.row + i <= grid.h) << i;
      patch.columns |= (place.column + i >= 1 && place.column + i <= grid.w) << i;
    }
    patch.follows = t > 0 && place.column > 0;
  }
}

template <class T>
RESNET_FAST_INLINE void prefetch_pack(const T* p) {
  constexpr int LINE = 64;
  for (int i = 0; i < static_cast<int>(sizeof(Pack<T>)); i += LINE) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
  }
}

/// v = Bt d B at half a pack of channels of `count` tiles: (A^2, count, PACK), `part` floats from
/// one of the A^2 to the next. d is value(x); outside of the image it is 0.
template <int M, int HALF, class T, class Lanes, class Value>
RESNET_FAST_INLINE void transform_half(const T* x, int64_t row_stride, int64_t column_stride,
                                       const Patch* patches, int64_t count, int64_t part, float* v,
                                       Lanes lanes, const Value& value) {
  constexpr int A = Axis<M>::A;
  constexpr uint32_t WHOLE = (1u << A) - 1;
  Vec columns[A][A] = {};  // of the patch, each transformed: some serve the next tile, too
  for (int64_t t = 0; t < count; ++t, v += PACK) {
    const Patch& patch = patches[t];
    const T* at = x + patch.start;
    if (HALF == 0) {  // what comes four tiles later: it is seldom in the level-2 cache
      for (int i = A - M; i < A; ++i) {
        for (int j = A - M; j < A; ++j) {
          prefetch_pack(at + i * row_stride + (j + 4 * M) * column_stride);
        }
      }
    }
    const auto fill = [&](int first, auto whole) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int j = 0; j < A; ++j) {
        if (j < first) continue;
#pragma GCC unroll 6
        for (int i = 0; i < A; ++i) {
          const bool in = whole() || (patch.rows >> i & patch.columns >> j & 1);
          columns[j][i] =
              in ? value(load_half<HALF>(at + i * row_stride + j * column_stride, lanes)) : Vec{};
        }
        Axis<M>::input(columns[j]);
      }
    };
    if (patch.follows) {
      for (int j = 0; j < A - M; ++j) {
        for (int i = 0; i < A; ++i) columns[j][i] = columns[M + j][i];
      }
      if (patch.rows == WHOLE && patch.columns == WHOLE) {
        fill(A - M, std::true_type{});
      } else {
        fill(A - M, std::false_type{});
      }
    } else {
      fill(0, std::false_type{});
    }
    for (int i = 0; i < A; ++i) {
      Vec row[A];
      for (int j = 0; j < A; ++j) row[j] = columns[j][i];
      Axis<M>::input(row);
      for (int j = 0; j < A; ++j) store(v + (i * A + j) * part + HALF * LANES, row[j]);
    }
  }
}

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
