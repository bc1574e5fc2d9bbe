// Inference: a whole residual bottleneck (1x1, 3x3, 1x1, each with its affine and ReLU, and the
// shortcut) in one kernel. x goes in and z comes out; what lies between never leaves the
// multiprocessor. Not yet run on a GPU.
//
//   a1 = relu(conv1x1(x, w1) * scale1 + shift1)                        WIDTH channels
//   a2 = relu(conv3x3(a1, w2) * scale2 + shift2)                       WIDTH channels
//   z  = relu(conv1x1(a2, w3) * scale3 + shift3 + shortcut)            k channels
//   shortcut = x (c = k), or, PROJECTION, conv1x1(x, rw) * rscale + rshift
//
// One CTA per multiprocessor walks over tiles of z; bottleneck.cuh draws one, and has what lies in
// shared memory.
//
//   conv1   a1[patch, WIDTH] = x[patch, c] * w1       x comes in chunks of 64 channels (cp.async)
//   conv2   a2[tile, WIDTH] = nine shifted products: ldmatrix takes any eight rows, so a shift by
//           a pixel costs nothing. A row of eight pixels, once in registers, serves the three taps
//           above, at and below it.
//   conv3   z[tile, k], 64 channels at a time; x is added from memory (L2: it was just read)
//
// Eight warps share a product as WARPS_M x WARPS_N, 32 columns each (mma.cuh).
//
// Work goes by steps, each with its own slab of weights: c / 64 of conv1, 3 * WIDTH / DEPTH of
// conv2 (a column of taps, DEPTH channels of a1), k / 64 of conv3. A step waits for its operands,
// meets the other warps, starts the copies for a later step, and multiplies.
#include "bottleneck.cuh"
#include "mma.cuh"

namespace resnet_fast::cuda {
namespace {

template <class V>
struct Cta {
  using T = typename V::T;
  static constexpr int WIDTH = V::WIDTH, UNITS = WIDTH / 8;
  static constexpr int WARPS_M = V::WARPS_M;

  const Problem<T>& problem;
  T *patch, *chunks, *weights;  // shared memory
  int thread, warp, lane;
  int steps1, steps;  // of conv1, and of a tile
  int stage = 0;      // of the ring of chunks: what the next step of conv1 takes
  int slot = 0;       // of the ring of slabs: what the next step takes

  __device__ explicit Cta(const Problem<T>& asked) : problem(asked) {
    patch = dynamic_shared<T>();
    chunks = patch + PATCH * WIDTH;
    weights = chunks + V::X_STAGES * V::X_CHUNK;
    thread = static_cast<int>(threadIdx.x);
    warp = thread / 32, lane = thread % 32;
    steps1 = problem.c / CHUNK;
    steps = steps1 + V::STEPS2 + problem.k / CHUNK;
  }

  // -- Copies

  /// Chunk `ahead` of the x of tile `number`, or of a later tile of this CTA, into `to`.
  __device__ void copy_chunk(T* to, unsigned number, int ahead) {
    while (ahead >= steps1) {
      ahead -= steps1;
      if (problem.tiles - number <= gridDim.x) return;
      number += gridDim.x;
    }
    const Tile tile(problem, number);
#pragma unroll 1
    for (int i = thread; i < tile.pixels * 8; i += WARPS * 32) {
      const int pixel = i / 8, unit = i % 8;
      const int row = tile.row_of(pixel), column = pixel - row * tile.pitch;
      const bool inside = tile.inside(problem, row, column);
      const int64_t at = tile.image + int64_t{tile.p - 1 + row} * problem.w + (tile.q - 1 + column);
      const int64_t offset = inside ? at * problem.c + ahead * CHUNK + unit * 8 : 0;
      cp_async_16(to + pixel_at<8>(pixel, unit), problem.x + offset, inside);
    }
  }

  /// `rows` rows of UNITS units, of which source(row) is the first.
  template <int ROW_UNITS, class Source>
  __device__ void copy_rows(T* to, int rows, Source source) {
#pragma unroll 1
    for (int i = thread; i < rows * ROW_UNITS; i += WARPS * 32) {
      const int row = i / ROW_UNITS, unit = i % ROW_UNITS;
      cp_async_16(to + weight_at<ROW_UNITS>(row, unit), source(row) + unit * 8);
    }
  }

  /// The weights of one step.
  __device__ void copy_slab(T* to, int step) {
    if (step < steps1) {
      const T* from = problem.w1 + step * CHUNK;
      copy_rows<8>(to, WIDTH, [&](int row) { return from + int64_t{row} * problem.c; });
      return;
    }
    step -= steps1;
    if (step < V::STEPS2) {  // row r * WIDTH + channel: the taps (r, s) of a column s
      constexpr int PARTS = WIDTH / V::DEPTH;
      const T* from = problem.w2 + step / PARTS * WIDTH + step % PARTS * V::DEPTH;
      copy_rows<V::DEPTH / 8>(to, 3 * WIDTH, [&](int row) {
        const int r = row / WIDTH, channel = row % WIDTH;
        return from + (channel * 3 + r) * 3 * WIDTH;
      });
      return;
    }
    step -= V::STEPS2;
    const T* from = problem.w3 + int64_t{step} * CHUNK * WIDTH;
    copy_rows<UNITS>(to, CHUNK, [&](int row) { return from + row * WIDTH; });
    if (V::PROJECTION) {
      const T* other = problem.rw + int64_t{step} * CHUNK * CHUNK;
      copy_rows<8>(to + CHUNK * WIDTH, CHUNK, [&](int row) { return other + row * CHUNK; });
    }
  }

  /// Where the slab of a step lies, RESIDENT.
  __device__ T* resident(int step) {
    if (step < steps1) return weights + step * V::SLAB1;
    T* behind1 = weights + steps1 * V::SLAB1;
    step -= steps1;
    if (step < V::STEPS2) return behind1 + step * V::SLAB2;
    return behind1 + V::STEPS2 * V::SLAB2 + (step - V::STEPS2) * V::SLAB3;
  }

  /// The copies that run ahead when the first step begins: groups as begin() expects them.
  __device__ void start() {
    if (V::RESIDENT) {
      for (int step = 0; step < steps; ++step) copy_slab(resident(step), step);
    }
    constexpr int GROUPS = V::RESIDENT ? V::X_STAGES - 1 : RING - 1;
    for (int i = 0; i < GROUPS; ++i) {
      if (!V::RESIDENT) copy_slab(weights + i * V::SLAB2, i);
      if (i < V::X_STAGES - 1) copy_chunk(chunks + i * V::X_CHUNK, blockIdx.x, i);
      cp_async_commit();
    }
  }

  /// Waits for what a step needs, lets the copies for a later one begin, and returns its weights.
  ///
  /// Each step commits one group (RESIDENT: each step of conv1), with the slab of the step after
  /// next, and in conv1 the chunk X_STAGES - 1 further on. What is copied over was read before the
  /// barrier.
  __device__ const T* begin(unsigned number, int step, bool first_of_phase) {
    const bool conv1 = step < steps1;
    if (conv1) {
      cp_async_wait<V::X_STAGES - 2>();
    } else if (!V::RESIDENT) {
      cp_async_wait<RING - 2>();
    }
    if (conv1 || !V::RESIDENT || first_of_phase) __syncthreads();
    if (conv1) {
      const int free = (stage + V::X_STAGES - 1) % V::X_STAGES;
      copy_chunk(chunks + free * V::X_CHUNK, number, step + V::X_STAGES - 1);
    }
    if (V::RESIDENT) {
      if (conv1) cp_async_commit();
      return resident(step);
    }
    const int later = step + RING - 1;
    const bool last = problem.tiles - number <= gridDim.x;
    T* free = weights + (slot + RING - 1) % RING * V::SLAB2;
    if (later < steps || !last) copy_slab(free, later < steps ? later : later - steps);
    cp_async_commit();
    const T* own = weights + slot * V::SLAB2;
    slot = (slot + 1) % RING;
    return own;
  }

  // -- Products

  /// a1 of the patch, into shared memory.
  __device__ void conv1(unsigned number, const Tile& tile) {
    constexpr int M = (PATCH + 15) / 16 / WARPS_M;
    static_assert(M * WARPS_M * 16 >= PATCH);
    const int warp_m = warp % WARPS_M, channel = warp / WARPS_M * 32;
    Sums sums[M] = {};
    for (int step = 0; step < steps1; ++step) {
      const T* slab = begin(number, step, step == 0);
      const T* x = chunks + stage * V::X_CHUNK;
      stage = (stage + 1) % V::X_STAGES;
#pragma unroll
      for (int k16 = 0; k16 < CHUNK / 16; ++k16) {
        uint32_t b[4][2];
        load_weights<8>(b, slab, channel, k16);
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const int first = (warp_m + i * WARPS_M) * 16;
          if (first >= tile.pixels) break;
          uint32_t a[4];
          const int pixel = min(first + lane % 16, tile.pixels - 1);
          ldmatrix_x4(a, x + pixel_at<8>(pixel, 2 * k16 + lane / 16));
          multiply<T>(sums[i], a, b);
        }
      }
    }
    const int mine = channel + lane % 4 * 8;
    const Channels<8> scale(problem.scale1, mine), shift(problem.shift1, mine);
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int pixel = (warp_m + i * WARPS_M) * 16 + row * 8 + lane / 4;
        if (pixel >= tile.pixels) continue;
        const int patch_row = tile.row_of(pixel);
        uint4 unit{};
        if (tile.inside(problem, patch_row, pixel - patch_row * tile.pitch)) {
          unit = rounded_unit<T>(
              [&](int j) { return relu(affine(element(sums[i], j, row), scale[j], shift[j])); });
        }
        *reinterpret_cast<uint4*>(patch + pixel_at<UNITS>(pixel, mine / 8)) = unit;
      }
    }
  }

  /// a2 of the tile, over a1: pixel p * 16 + q.
  __device__ void conv2(unsigned number, const Tile& tile) {
    constexpr int PAIRS = BLOCK_P / 2 / WARPS_M;
    constexpr int PARTS = WIDTH / V::DEPTH;
    const int warp_m = warp % WARPS_M, channel = warp / WARPS_M * 32;
    Sums sums[PAIRS][2] = {};
    for (int step = 0; step < V::STEPS2; ++step) {
      const T* slab = begin(number, steps1 + step, step == 0);
      const int s = step / PARTS, unit = step % PARTS * (V::DEPTH / 8);
#pragma unroll
      for (int k16 = 0; k16 < V::DEPTH / 16; ++k16) {
        // Four rows of the patch for each pair, two in a load: row lane / 8 % 2, column lane % 8.
        uint32_t a[PAIRS][2][2][4];
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int pair = warp_m + i * WARPS_M;
            if (2 * pair >= tile.rows || 8 * half >= tile.columns) continue;
            const int column = min(8 * half + lane % 8 + s, tile.columns + 1);
#pragma unroll
            for (int two = 0; two < 2; ++two) {
              const int row = min(2 * pair + 2 * two + lane / 8 % 2, tile.rows + 1);
              ldmatrix_x4(a[i][half][two], patch + pixel_at<UNITS>(row * tile.pitch + column,
                                                                   unit + 2 * k16 + lane / 16));
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          uint32_t b[4][2];
          load_weights<V::DEPTH / 8>(b, slab, r * WIDTH + channel, k16);
#pragma unroll
          for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if (2 * (warp_m + i * WARPS_M) >= tile.rows || 8 * half >= tile.columns) continue;
              const auto& [above, below] = a[i][half];
              if (r == 1) {  // the second row of the upper two, and the first of the lower
                const uint32_t between[4] = {above[1], below[0], above[3], below[2]};
                multiply<T>(sums[i][half], between, b);
              } else {
                multiply<T>(sums[i][half], r == 0 ? above : below, b);
              }
            }
          }
        }
      }
    }
    __syncthreads();  // a1 has been read by all
    const int mine = channel + lane % 4 * 8;
    const Channels<8> scale(problem.scale2, mine), shift(problem.shift2, mine);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int p = 2 * (warp_m + i * WARPS_M) + row, q = 8 * half + lane / 4;
          const uint4 unit = rounded_unit<T>([&](int j) {
            return relu(affine(element(sums[i][half], j, row), scale[j], shift[j]));
          });
          const int pixel = p * BLOCK_Q + q;
          *reinterpret_cast<uint4*>(patch + pixel_at<UNITS>(pixel, mine / 8)) = unit;
        }
      }
    }
  }

  /// z of the tile: a warp has one pair of rows, and 32 of every 64 channels.
  __device__ void conv3(unsigned number, const Tile& tile) {
    const int pair = warp % 4, channel = warp / 4 * 32;
    const T* x = chunks + (stage + V::X_STAGES - 1) % V::X_STAGES * V::X_CHUNK;  // its last chunk
    // With 64 channels a2 stays in registers for all steps.
    constexpr bool KEPT = WIDTH == 64;
    uint32_t kept[KEPT ? WIDTH / 16 : 1][2][4];
    const auto load_a2 = [&](uint32_t (&a)[4], int half, int k16) {
      const int pixel = (2 * pair + lane / 8 % 2) * BLOCK_Q + 8 * half + lane % 8;
      ldmatrix_x4(a, patch + pixel_at<UNITS>(pixel, 2 * k16 + lane / 16));
    };
    for (int step = 0; step < problem.k / CHUNK; ++step) {
      const T* slab = begin(number, steps1 + V::STEPS2 + step, step == 0);
      if (2 * pair >= tile.rows) continue;
      if (KEPT && step == 0) {
#pragma unroll
        for (int k16 = 0; k16 < (KEPT ? WIDTH / 16 : 0); ++k16) {
#pragma unroll
          for (int half = 0; half < 2; ++half) load_a2(kept[k16][half], half, k16);
        }
      }
      const int mine = step * CHUNK + channel + lane % 4 * 8;
      const auto offset = [&](int half, int row) {  // of this thread's unit of z, or of x
        const int64_t pixel = tile.image + int64_t{tile.p + 2 * pair + row} * problem.w + tile.q +
                              8 * half + lane / 4;
        return pixel * problem.k + mine;
      };
      const auto stored = [&](int half, int row) {
        return 2 * pair + row < tile.rows && 8 * half + lane / 4 < tile.columns;
      };
      Pack<T, 8> residual[2][2];
      if constexpr (!V::PROJECTION) {  // under way while the products are formed
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            if (stored(half, row)) {
              residual[half][row] = load_pack<8>(problem.x + offset(half, row));
            }
          }
        }
      }
      Sums sums[2] = {}, shortcut[2] = {};
#pragma unroll
      for (int k16 = 0; k16 < WIDTH / 16; ++k16) {
        uint32_t b[4][2];
        load_weights<UNITS>(b, slab, channel, k16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (8 * half >= tile.columns) continue;
          if constexpr (KEPT) {
            multiply<T>(sums[half], kept[k16][half], b);
          } else {
            uint32_t a[4];
            load_a2(a, half, k16);
            multiply<T>(sums[half], a, b);
          }
        }
      }
      if constexpr (V::PROJECTION) {
#pragma unroll
        for (int k16 = 0; k16 < CHUNK / 16; ++k16) {
          uint32_t b[4][2];
          load_weights<8>(b, slab + CHUNK * WIDTH, channel, k16);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (8 * half >= tile.columns) continue;
            const int row = 2 * pair + lane / 8 % 2 + 1;
            const int column = min(8 * half + lane % 8, tile.columns) + 1;
            uint32_t a[4];
            ldmatrix_x4(a, x + pixel_at<8>(row * tile.pitch + column, 2 * k16 + lane / 16));
            multiply<T>(shortcut[half], a, b);
          }
        }
      }
      const Channels<8> scale(problem.scale3, mine), shift(problem.shift3, mine);
      const Channels<8> rscale(V::PROJECTION ? problem.rscale : problem.scale3, mine);
      const Channels<8> rshift(V::PROJECTION ? problem.rshift : problem.shift3, mine);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (!stored(half, row)) continue;
          const uint4 unit = rounded_unit<T>([&](int j) {
            const float side = V::PROJECTION
                                   ? affine(element(shortcut[half], j, row), rscale[j], rshift[j])
                                   : load_float(residual[half][row].value[j]);
            return relu(affine(element(sums[half], j, row), scale[j], shift[j]) + side);
          });
          __stcg(reinterpret_cast<uint4*>(problem.z + offset(half, row)), unit);
        }
      }
    }
  }
};

// z = relu(conv1x1(a2, w3) * scale3 + shift3 + shortcut), a2 and shortcut as drawn above
// Shapes    x (N, H, W, C), z (N, H, W, K); w1 (WIDTH, C), w2 (WIDTH, 3, 3, WIDTH), w3 (K, WIDTH),
//           rw (K, 64); scales and shifts (WIDTH,) and (K,) fp32; C and K multiples of 64
// Tiles     8 x 16 pixels of z, all K; as many CTAs as multiprocessors, tile blockIdx.x + i * grid
// Traffic   reads x once (its patch is 1.4 tiles, the rest and the shortcut hit L2), writes z:
//           N * H * W * (C + K) * itemsize; weights from L2 once (RESIDENT), or once a tile
// Numerics  fp32 sums, affines and shortcut; a1, a2 and z are rounded once each
// Source    ops.bottleneck; docs/bottleneck.md
template <class T, int WIDTH, bool PROJECTION, bool RESIDENT>
__global__ void __launch_bounds__(WARPS * 32, 1) bottleneck_kernel(const Problem<T> problem) {
  Cta<Variant<T, WIDTH, PROJECTION, RESIDENT>> cta(problem);
  cta.start();
  for (unsigned number = blockIdx.x;;) {
    const Tile tile(problem, number);
    cta.conv1(number, tile);
    cta.conv2(number, tile);
    cta.conv3(number, tile);
    if (problem.tiles - number <= gridDim.x) break;
    number += gridDim.x;
  }
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, name, device), "device attribute");
  return value;
}

template <class T, int WIDTH, bool PROJECTION, bool RESIDENT>
void launch_variant(const Bottleneck& args) {
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  const auto tiles_p = static_cast<unsigned>(cdiv(args.h, BLOCK_P));
  const auto tiles_q = static_cast<unsigned>(cdiv(args.w, BLOCK_Q));
  const auto tiles = static_cast<unsigned>(args.n * tiles_p * tiles_q);
  const Problem<T> problem{in(args.x),
                           in(args.w1),
                           in(args.w2),
                           in(args.w3),
                           in(args.rw),
                           args.scale1,
                           args.shift1,
                           args.scale2,
                           args.shift2,
                           args.scale3,
                           args.shift3,
                           args.rscale,
                           args.rshift,
                           static_cast<T*>(args.z),
                           static_cast<int>(args.h),
                           static_cast<int>(args.w),
                           static_cast<int>(args.c),
                           static_cast<int>(args.k),
                           tiles_p,
                           tiles_q,
                           tiles};
  const auto kernel = bottleneck_kernel<T, WIDTH, PROJECTION, RESIDENT>;
  const int64_t shared = Variant<T, WIDTH, PROJECTION, RESIDENT>::shared_bytes(args.c, args.k);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  cudaGetLastError();  // the next launch would report it again
  check(error, "shared memory of bottleneck");
  const auto processors = static_cast<unsigned>(attribute(cudaDevAttrMultiProcessorCount));
  launch(kernel, dim3(min(tiles, processors)), dim3(WARPS * 32), static_cast<size_t>(shared),
         args.stream, problem);
}

/// Weights stay in shared memory where they fit.
template <class T, bool PROJECTION>
void launch_width(const Bottleneck& args, int64_t limit) {
  if (args.width == 128) return launch_variant<T, 128, PROJECTION, false>(args);
  if (Variant<T, 64, PROJECTION, true>::shared_bytes(args.c, args.k) <= limit) {
    return launch_variant<T, 64, PROJECTION, true>(args);
  }
  launch_variant<T, 64, PROJECTION, false>(args);
}

}  // namespace

int64_t shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

int64_t bottleneck_shared(int64_t c, int64_t width, int64_t k, bool projection, bool resident) {
  if (width == 128 && !resident) {
    return projection ? Variant<__half, 128, true, false>::shared_bytes(c, k)
                      : Variant<__half, 128, false, false>::shared_bytes(c, k);
  }
  if (width != 64) return -1;
  if (resident) {
    return projection ? Variant<__half, 64, true, true>::shared_bytes(c, k)
                      : Variant<__half, 64, false, true>::shared_bytes(c, k);
  }
  return projection ? Variant<__half, 64, true, false>::shared_bytes(c, k)
                    : Variant<__half, 64, false, false>::shared_bytes(c, k);
}

void bottleneck(const Bottleneck& args) {
  if (args.n * args.h * args.w == 0) return;
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (args.rw) {
      launch_width<T, true>(args, shared_limit());
    } else {
      launch_width<T, false>(args, shared_limit());
    }
  };
  switch (args.dtype) {
    case DType::bfloat16:
      return run(__nv_bfloat16{});
    case DType::float16:
      return run(__half{});
    default:
      throw std::invalid_argument("bottleneck: dtype must be bfloat16 or float16");
  }
}

}  // namespace resnet_fast::cuda
