// The geometry of the whole-block kernel (bottleneck.cu): tiles of z, the patch of a1 around one,
// and what of it lies in shared memory.
//
// One CTA per multiprocessor walks over tiles of 8 x 16 pixels of z:
//
//        q-1  q ....... q+7 q+8 ...... q+15 q+16
//   p-1   . . . . . . . . . . . . . . . . . . .     the patch, 10 x 18: where a1 is needed. It is
//   p     . +---------------+---------------+ .     0 outside of the image, after affine and ReLU.
//   p+1   . |  pair 0, left |  pair 0, right| .
//   p+2   . +---------------+---------------+ .     +---+ 16 pixels of z, two rows of eight: the
//   p+3   . |  pair 1, left |  pair 1, right| .     |   | M of one mma.sync m16n8k16. One that lies
//    :    . +---------------+---------------+ .     +---+ behind the image is left out.
//   p+7   . |  pair 3, left |  pair 3, right| .
//   p+8   . . . . . . . . . . . . . . . . . . .     A patch at the image's edge is smaller, by what
//                                                   of the tile does not exist.
//
// Shared memory, 16-bit elements:    patch    a1, then (in its place) a2
//                                    X_STAGES chunks of x, patch * 64
//                                    weights: RESIDENT all of them, once; else RING slabs of 24 KB
#pragma once

#include "common.cuh"

namespace resnet_fast::cuda {

constexpr int WARPS = 8;
constexpr int BLOCK_P = 8, BLOCK_Q = 16;
constexpr int PATCH = (BLOCK_P + 2) * (BLOCK_Q + 2);
constexpr int CHUNK = 64;
constexpr int RING = 3;

/// What the kernel is asked for; images are (n, h, w, channels), weights (out, r, s, in).
template <class T>
struct Problem {
  const T *x, *w1, *w2, *w3, *rw;
  const float *scale1, *shift1, *scale2, *shift2, *scale3, *shift3, *rscale, *rshift;
  T* z;
  int h, w, c, k;
  unsigned tiles_p, tiles_q, tiles;
};

/// One way to run it: sizes in elements.
template <class T_, int WIDTH_, bool PROJECTION_, bool RESIDENT_>
struct Variant {
  using T = T_;
  static constexpr int WIDTH = WIDTH_;
  static constexpr bool PROJECTION = PROJECTION_, RESIDENT = RESIDENT_;

  static constexpr int WARPS_N = WIDTH / 32, WARPS_M = WARPS / WARPS_N;
  static constexpr int DEPTH = 4096 / WIDTH;
  static constexpr int X_CHUNK = PATCH * CHUNK;
  static constexpr int X_STAGES = WIDTH == 64 && !(PROJECTION && RESIDENT) ? 3 : 2;
  // Slabs: of w1, w2 and w3 (with rw's behind it).
  static constexpr int SLAB1 = WIDTH * CHUNK;
  static constexpr int SLAB2 = 3 * WIDTH * DEPTH;
  static constexpr int SLAB3 = CHUNK * (WIDTH + (PROJECTION ? CHUNK : 0));
  static constexpr int STEPS2 = 3 * WIDTH / DEPTH;
  static_assert(SLAB1 <= SLAB2 && SLAB3 <= SLAB2);

  static __host__ __device__ constexpr int64_t weights(int64_t c, int64_t k) {
    if (!RESIDENT) return RING * SLAB2;
    return c / CHUNK * SLAB1 + STEPS2 * SLAB2 + k / CHUNK * SLAB3;
  }
  static constexpr int64_t shared_bytes(int64_t c, int64_t k) {
    return 2 * (PATCH * WIDTH + X_STAGES * X_CHUNK + weights(c, k));
  }
};

/// A tile of z, and the patch of a1 around it.
struct Tile {
  int64_t image;      // the pixels before it, all images
  int p, q;           // the first pixel
  int rows, columns;  // that lie in the image
  int pitch, pixels;  // of the patch: pixels in a row, and in all
  unsigned reciprocal;

  template <class T>
  __device__ Tile(const Problem<T>& problem, unsigned number) {
    const unsigned line = number / problem.tiles_q;
    q = static_cast<int>(number % problem.tiles_q) * BLOCK_Q;
    p = static_cast<int>(line % problem.tiles_p) * BLOCK_P;
    image = int64_t{line / problem.tiles_p} * problem.h * problem.w;
    rows = min(BLOCK_P, problem.h - p);
    columns = min(BLOCK_Q, problem.w - q);
    pitch = columns + 2;
    pixels = (rows + 2) * pitch;
    reciprocal = 65536u / static_cast<unsigned>(pitch) + 1;
  }

  /// The patch's row in which one of its pixels lies: exact below 3640 pixels.
  __device__ int row_of(int pixel) const {
    return static_cast<int>(static_cast<unsigned>(pixel) * reciprocal >> 16);
  }

  /// Whether the patch's (row, column) lies in the image.
  template <class T>
  __device__ bool inside(const Problem<T>& problem, int row, int column) const {
    return static_cast<unsigned>(p - 1 + row) < static_cast<unsigned>(problem.h) &&
           static_cast<unsigned>(q - 1 + column) < static_cast<unsigned>(problem.w);
  }
};

}  // namespace resnet_fast::cuda
