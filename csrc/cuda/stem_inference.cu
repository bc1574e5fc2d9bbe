// Inference: a whole stem (convolution of stride 2, affine, ReLU, max-pool) in one kernel. x goes
// in and z comes out; y, four times as large as z, never leaves the multiprocessor. Not yet run on
// a GPU.
//
//   y = relu(conv7x7(x, w) * scale + shift)        stride 2, padding 3, 3 to 64 channels
//   z = maxpool(y)                                 3 x 3, stride 2, padding 1
//
// A CTA walks over tiles of 8 x 8 pixels of z. For one it needs 17 x 17 of y, and of x a patch of
// 39 x 39, which lies in shared memory as pairs of pixels of four channels, the last one 0:
//
//   unit (16 bytes)     0        1        2        3        4        5
//   columns of x      0    1   2    3   4    5   6    7   8    9  10   11
//   y's column 0      [ taps 0 to 6, and one that counts 0 ]
//   y's column 1               [ taps 0 to 6, and one that counts 0 ]
//
// So a row of the filter is 32 deep, two steps of mma.sync m16n8k16, and its operand begins at a
// unit: ldmatrix reads it as it lies, eight neighbours in eight different banks.
#include "mma.cuh"

namespace resnet_fast::cuda {
namespace {

constexpr int STEM_WARPS = 8;
constexpr int STEM_BLOCK = 8;
constexpr int SIDE = 2 * STEM_BLOCK + 1, PIXELS = SIDE * SIDE;  // of y
constexpr int TAPS = 7, DEPTH = 32, STEM_CHANNELS = 64;
constexpr int PATCH_ROWS = 2 * SIDE + TAPS - 2, PATCH_UNITS = SIDE + 3;
constexpr int WARPS_N = STEM_CHANNELS / 32, WARPS_M = STEM_WARPS / WARPS_N;
constexpr int BOXES = 3;  // of 16 pixels, that a warp has at once
// Elements of shared memory: the filter, by its rows; the patch; y.
constexpr int SLAB = STEM_CHANNELS * DEPTH;
constexpr int FILTER_SIZE = TAPS * SLAB, PATCH_SIZE = PATCH_ROWS * PATCH_UNITS * 8;
constexpr int STEM_SHARED = 2 * (FILTER_SIZE + PATCH_SIZE + PIXELS * STEM_CHANNELS);

template <class T>
struct StemProblem {
  const uint16_t *x, *w;  // moved as bits
  const float *scale, *shift;
  T* z;
  int h, width, p, q;  // of x, and of z
  unsigned tiles_p, tiles_q, tiles;
};

/// The filter into shared memory: row r's channels, eight taps of four channels each.
__device__ inline void load_filter(uint16_t* filter, const uint16_t* w) {
  for (int i = threadIdx.x; i < TAPS * STEM_CHANNELS * 4; i += STEM_WARPS * 32) {
    const int r = i / (STEM_CHANNELS * 4), channel = i / 4 % STEM_CHANNELS, unit = i % 4;
    Pack<uint16_t, 8> pack{};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int s = 2 * unit + e / 4, c = e % 4;
      if (s < TAPS && c < 3) pack.value[e] = w[((channel * TAPS + r) * TAPS + s) * 3 + c];
    }
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    *reinterpret_cast<uint4*>(filter + r * SLAB + weight_at<4>(channel, unit)) = bits;
  }
}

/// The patch whose first pixel is (row, column) of an image, 0 outside of it.
template <class T>
__device__ inline void load_patch(uint16_t* patch, const StemProblem<T>& problem, int64_t image,
                                  int row, int column) {
#pragma unroll 1
  for (int i = threadIdx.x; i < PATCH_ROWS * PATCH_UNITS; i += STEM_WARPS * 32) {
    const int h = row + i / PATCH_UNITS, first = column + i % PATCH_UNITS * 2;
    Pack<uint16_t, 8> pack{};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int v = first + side;
      if (static_cast<unsigned>(h) < static_cast<unsigned>(problem.h) &&
          static_cast<unsigned>(v) < static_cast<unsigned>(problem.width)) {
        const uint16_t* pixel = problem.x + ((image * problem.h + h) * problem.width + v) * 3;
#pragma unroll
        for (int c = 0; c < 3; ++c) pack.value[4 * side + c] = pixel[c];
      }
    }
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    *reinterpret_cast<uint4*>(patch + i * 8) = bits;
  }
}

// z = maxpool(relu(conv7x7(x, w) * scale + shift)), as above
// Shapes    x (N, H, W, 3), w (64, 7, 7, 3), z (N, P, Q, 64); scale, shift (64,) fp32
// Tiles     8 x 8 pixels of z, all channels; two CTAs a multiprocessor, tile blockIdx.x + i * grid
// Traffic   reads x once (its patch is 1.5 tiles, the rest hits L2), writes z
// Numerics  fp32 sums and affine; y is rounded once, which the maximum keeps
// Source    ops.whole_stem; docs/bottleneck.md
template <class T>
__global__ void __launch_bounds__(STEM_WARPS * 32, 2)
    whole_stem_kernel(const StemProblem<T> problem) {
  uint16_t* shared = dynamic_shared<uint16_t>();
  uint16_t* patch = shared + FILTER_SIZE;
  uint16_t* y = patch + PATCH_SIZE;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_m = warp % WARPS_M, channel = warp / WARPS_M * 32;
  const int mine = channel + lane % 4 * 8;
  load_filter(shared, problem.w);
  for (unsigned number = blockIdx.x;;) {
    const unsigned line = number / problem.tiles_q;
    const int q0 = static_cast<int>(number % problem.tiles_q) * STEM_BLOCK;
    const int p0 = static_cast<int>(line % problem.tiles_p) * STEM_BLOCK;
    const int64_t image = line / problem.tiles_p;
    load_patch(patch, problem, image, 4 * p0 - 5, 4 * q0 - 5);
    __syncthreads();
    // More boxes at once than so many, and their sums do not stay in registers.
#pragma unroll 1
    for (int begin = warp_m * 16; begin < PIXELS; begin += BOXES * 16 * WARPS_M) {
      int at[BOXES];  // where in the patch this thread's row of ldmatrix begins
#pragma unroll
      for (int i = 0; i < BOXES; ++i) {
        const int pixel = min(begin + i * 16 * WARPS_M + lane % 16, PIXELS - 1);
        at[i] = (pixel / SIDE * 2 * PATCH_UNITS + pixel % SIDE + lane / 16) * 8;
      }
      Sums sums[BOXES] = {};
#pragma unroll 1
      for (int r = 0; r < TAPS; ++r) {
#pragma unroll
        for (int k16 = 0; k16 < DEPTH / 16; ++k16) {
          uint32_t b[4][2];
          load_weights<4>(b, shared + r * SLAB, channel, k16);
#pragma unroll
          for (int i = 0; i < BOXES; ++i) {
            if (begin + i * 16 * WARPS_M >= PIXELS) break;
            uint32_t a[4];
            ldmatrix_x4(a, patch + at[i] + (r * PATCH_UNITS + 2 * k16) * 8);
            // The eighth tap: a pixel that is not below the filter, and may be NaN.
            if (k16 == 1 && lane % 4 >= 2) a[2] = a[3] = 0;
            multiply<T>(sums[i], a, b);
          }
        }
      }
      const Channels<8> scale(problem.scale, mine), shift(problem.shift, mine);
#pragma unroll
      for (int i = 0; i < BOXES; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int pixel = begin + i * 16 * WARPS_M + row * 8 + lane / 4;
          if (pixel >= PIXELS) continue;
          // Behind the image nothing wins a window: 0 is the least that a ReLU gives.
          const int h = 2 * p0 - 1 + pixel / SIDE, v = 2 * q0 - 1 + pixel % SIDE;
          uint4 unit{};
          if (h >= 0 && v >= 0 && 2 * h < problem.h && 2 * v < problem.width) {
            unit = rounded_unit<T>(
                [&](int j) { return relu(affine(element(sums[i], j, row), scale[j], shift[j])); });
          }
          *reinterpret_cast<uint4*>(y + pixel_at<8>(pixel, mine / 8)) = unit;
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < STEM_BLOCK * STEM_BLOCK * 8; i += STEM_WARPS * 32) {
      const int p = i / (8 * STEM_BLOCK), q = i / 8 % STEM_BLOCK, unit = i % 8;
      if (p0 + p >= problem.p || q0 + q >= problem.q) continue;
      float best[8] = {};
#pragma unroll
      for (int r = 0; r < 3; ++r) {
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          const int at_y = pixel_at<8>((2 * p + r) * SIDE + 2 * q + s, unit);
          const auto pack = load_pack<8>(reinterpret_cast<const T*>(y + at_y));
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const float value = load_float(pack.value[e]);
            best[e] = value > best[e] || value != value ? value : best[e];
          }
        }
      }
      const int64_t pixel = (image * problem.p + p0 + p) * problem.q + q0 + q;
      __stcg(reinterpret_cast<uint4*>(problem.z + pixel * STEM_CHANNELS + unit * 8),
             rounded_unit<T>([&](int e) { return best[e]; }));
    }
    if (problem.tiles - number <= gridDim.x) break;
    number += gridDim.x;
  }
}

template <class T>
void launch_stem(const WholeStem& args) {
  StemProblem<T> problem{};
  problem.x = static_cast<const uint16_t*>(args.x);
  problem.w = static_cast<const uint16_t*>(args.weight);
  problem.scale = args.scale;
  problem.shift = args.shift;
  problem.z = static_cast<T*>(args.z);
  problem.h = static_cast<int>(args.h);
  problem.width = static_cast<int>(args.w);
  problem.p = static_cast<int>((args.h + 3) / 4);
  problem.q = static_cast<int>((args.w + 3) / 4);
  problem.tiles_p = static_cast<unsigned>(cdiv(problem.p, STEM_BLOCK));
  problem.tiles_q = static_cast<unsigned>(cdiv(problem.q, STEM_BLOCK));
  problem.tiles = static_cast<unsigned>(args.n * problem.tiles_p * problem.tiles_q);
  const auto kernel = whole_stem_kernel<T>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, STEM_SHARED);
  cudaGetLastError();  // the next launch would report it again
  check(error, "shared memory of whole_stem");
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "device attribute");
  launch(kernel, dim3(min(problem.tiles, 2 * static_cast<unsigned>(processors))),
         dim3(STEM_WARPS * 32), STEM_SHARED, args.stream, problem);
}

}  // namespace

int64_t whole_stem_shared() { return STEM_SHARED; }

void whole_stem(const WholeStem& args) {
  if (args.n * args.h * args.w == 0) return;
  switch (args.dtype) {
    case DType::bfloat16:
      return launch_stem<__nv_bfloat16>(args);
    case DType::float16:
      return launch_stem<__half>(args);
    default:
      throw std::invalid_argument("whole_stem: dtype must be bfloat16 or float16");
  }
}

}  // namespace resnet_fast::cuda
