// The backward of a convolution 1 x 1, stride 1, behind and before a batch norm, in one pass, on
// the CPU: dx and dw from a gradient that is formed on load, and so is the activation.
//
// Compiled once per instruction set, as bn_act.cpp. Arithmetic is fp32 whatever the storage.
#include "isa.h"
#include "products.h"
#include "queue.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Pixels to a block, a multiple of ROWS: dy and x of them stay in the level-2 cache, beside the
// filters and the sums of their gradient, and their sum is formed in registers.
constexpr int64_t BLOCK = 70 / ROWS * ROWS;
// Channels of dy whose products are summed in registers: longer sums lose digits.
constexpr int64_t CHUNK = 128;
// Segments of the pixels, each with sums of its own, while all of these stay below so many floats.
constexpr int64_t SEGMENTS = 64;
constexpr int64_t SUMS = 2 * 1024 * 1024;

/// How the work is cut: `segments` of the blocks of pixels, which follow from the shape alone, so
/// that results do not depend on the number of threads.
struct Plan {
  int64_t npq, blocks, segments, k_packs, c_packs;

  explicit Plan(const PointwiseBackward& args)
      : npq(args.npq),
        blocks(cdiv(args.npq, BLOCK)),
        k_packs(cdiv(args.k, PACK)),
        c_packs(cdiv(args.channels, PACK)) {
    segments = SUMS / (k_packs * c_packs * PACK * PACK);
    segments = smaller(smaller(segments < 1 ? 1 : segments, SEGMENTS), blocks);
  }

  /// Floats of a pack's values of a block.
  static constexpr int64_t pack() { return BLOCK * PACK; }
  /// Of the filters, packed: (c_packs, padded(k), PACK).
  int64_t filters() const { return k_packs * c_packs * PACK * PACK; }
  /// Of the sums: (segments, k_packs, c_packs, PACK, PACK).
  int64_t sums() const { return segments * filters(); }
  /// Of a thread: dy, x, and products.
  int64_t own() const { return (k_packs + c_packs) * pack() + ROWS * PACK; }
};

/// dy of the rows [row, row + count) into e (k_packs, BLOCK, PACK), as bn_backward_apply forms and
/// rounds it.
template <bool LAZY, bool MASKED, class T, class Vectors>
void form_gradient(const PointwiseBackward& args, int64_t row, int64_t count,
                   const Vectors& vectors, float* e) {
  const T* gradient = static_cast<const T*>(args.g) + row * args.k;
  const T* y = static_cast<const T*>(args.y) + (LAZY ? row * args.k : 0);
  for (int64_t r = 0; r < count; ++r, gradient += args.k, y += LAZY ? args.k : 0, e += PACK) {
    for_each_pack(0, args.k, [&](int64_t channel, auto lanes) __attribute__((always_inline)) {
      Pair g = widen(load_pack(gradient + channel, lanes));
      if constexpr (LAZY) {
        const Pair value = widen(load_pack(y + channel, lanes));
        for (int h = 0; h < 2; ++h) {
          const auto vector = [&](int i) { return vectors(i, channel, h); };
          if (MASKED) g.v[h] = where_active(fma(value.v[h], vector(4), vector(5)), g.v[h]);
          const Vec rest = fma(vector(2), value.v[h] - vector(0), vector(3));
          g.v[h] = fma(vector(1), g.v[h], rest);
        }
        g = widen(narrow(g, T{}));
      }
      float* out = e + channel * BLOCK;
      for (int h = 0; h < 2; ++h) store(out + h * LANES, g.v[h]);
    });
  }
}

/// x of these rows, or act(x * scale + shift), rounded as affine_act rounds it, into v (c_packs,
/// BLOCK, PACK).
template <bool LAZY, class T, class Vectors>
void form_activation(const PointwiseBackward& args, int64_t row, int64_t count,
                     const Vectors& vectors, float* v) {
  const T* x = static_cast<const T*>(args.x) + row * args.channels;
  const auto form = [&](int64_t channel, auto lanes) __attribute__((always_inline)) {
    Pair value = widen(load_pack(x + channel, lanes));
    if constexpr (LAZY) {
      for (int h = 0; h < 2; ++h) {
        const Vec scale = vectors(0, channel, h), shift = vectors(1, channel, h);
        value.v[h] = relu(fma(value.v[h], scale, shift));
      }
      value = widen(narrow(value, T{}));
    }
    for (int h = 0; h < 2; ++h) store(v + channel * BLOCK + h * LANES, value.v[h]);
  };
  for (int64_t r = 0; r < count; ++r, x += args.channels, v += PACK) {
    for_each_pack(0, args.channels, form);
  }
}

/// What the next block reads, one after the other: it is asked for while this one is multiplied.
struct Ahead {
  const char* at[4] = {};
  int64_t bytes[4] = {};
  int64_t total = 0;

  template <class T>
  void add(int i, const T* rows, int64_t row, int64_t count, int64_t channels) {
    if (!rows) return;
    at[i] = reinterpret_cast<const char*>(rows + row * channels);
    bytes[i] = count * channels * static_cast<int64_t>(sizeof(T));
    total += bytes[i];
  }
  /// Where part i of `parts` begins.
  const char* part(int64_t i, int64_t parts) const {
    int64_t offset = i * total / parts;
    for (int r = 0; r < 4; ++r) {
      if (offset < bytes[r]) return at[r] + offset;
      offset -= bytes[r];
    }
    return nullptr;
  }
};

/// m (N, PACK) = e x w: e (packs, BLOCK, PACK), of which N rows, w (packs * PACK, PACK). At every
/// channel a line from `ahead` on is asked for, `step` bytes further each time.
template <int N>
void multiply(const float* e, const float* w, int64_t packs, float* m, const char* ahead,
              int64_t step) {
  for (int64_t first = 0; first < packs; first += CHUNK / PACK) {
    Vec sum[N][2] = {};
    const int64_t last = smaller(first + CHUNK / PACK, packs);
    for (int64_t pack = first; pack < last; ++pack, e += BLOCK * PACK) {
      for (int i = 0; i < PACK; ++i, w += PACK, ahead += step) {
        __builtin_prefetch(ahead, 0, 2);
        const Vec left = load(w), right = load(w + LANES);
#pragma GCC unroll 14
        for (int r = 0; r < N; ++r) {
          const Vec value = broadcast(e + r * PACK + i);
          sum[r][0] = fma(value, left, sum[r][0]);
          sum[r][1] = fma(value, right, sum[r][1]);
        }
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      float* out = m + r * PACK;
      store(out, first == 0 ? sum[r][0] : load(out) + sum[r][0]);
      store(out + LANES, first == 0 ? sum[r][1] : load(out + LANES) + sum[r][1]);
    }
  }
}

using Multiply = decltype(&multiply<1>);

template <int... N>
Multiply multiply_rows(int64_t rows, std::integer_sequence<int, N...>) {
  static constexpr Multiply FUNCTIONS[] = {multiply<N + 1>...};
  return FUNCTIONS[rows - 1];
}

template <class T>
RESNET_FAST_INLINE void ask_for(const T* pack) {
  constexpr int LINE = 64;
  for (int i = 0; i < static_cast<int>(PACK * sizeof(T)); i += LINE) {
    __builtin_prefetch(reinterpret_cast<const char*>(pack) + i);
  }
}

/// dx of the rows [row, row + count) at one pack of channels.
template <class T, class Lanes>
void form_dx(const PointwiseBackward& args, const Plan& plan, int64_t row, int64_t count,
             const float* e, const float* w, float* m, const Ahead& next, int64_t channel,
             Lanes lanes) {
  constexpr int64_t CALLS = cdiv(BLOCK, ROWS);
  const int64_t parts = CALLS * plan.c_packs, step = next.total / parts / padded(args.k);
  const T* residual = static_cast<const T*>(args.residual);
  for (int64_t first = 0; first < count; first += ROWS) {
    const int64_t rows = smaller(ROWS, count - first);
    for (int64_t r = 0; r < rows; ++r) {  // the rows lie far apart: no processor follows
      const int64_t at = (row + first + r) * args.channels + channel;
      if (residual) ask_for(residual + at);
      ask_for(static_cast<const T*>(args.dx) + at);
    }
    const char* ahead = next.part(channel / PACK * CALLS + first / ROWS, parts);
    multiply_rows(rows, std::make_integer_sequence<int, ROWS>{})(
        e + first * PACK, w, plan.k_packs, m, ahead ? ahead : reinterpret_cast<const char*>(w),
        ahead ? step : 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + first + r) * args.channels + channel;
      Pair value{{load(m + r * PACK), load(m + r * PACK + LANES)}};
      if (residual) {
        const Pair other = widen(load_pack(residual + at, lanes));
        for (int h = 0; h < 2; ++h) value.v[h] += other.v[h];
      }
      store_pack(static_cast<T*>(args.dx) + at, narrow(value, T{}), lanes);
    }
  }
}

/// The filters, (k, channels), of one pack of channels, into w (padded(k), PACK): both in the order
/// in which packs of T are widened, 0 where there is no channel. Every NaN is the usual one.
template <class T>
void pack_filters(const PointwiseBackward& args, int64_t first, float* w) {
  for (int64_t k_pack = 0; k_pack < args.k; k_pack += PACK, w += PACK * PACK) {
    for (int64_t i = 0; i < PACK * PACK; ++i) w[i] = 0;
    for_each_widened<T>(smaller(PACK, args.k - k_pack), [&](int64_t row, int64_t k) {
      const float* in = args.w + (k_pack + k) * args.channels + first;
      for_each_widened<T>(smaller(PACK, args.channels - first), [&](int64_t i, int64_t c) {
        w[row * PACK + i] = in[c] != in[c] ? __builtin_nanf("") : in[c];
      });
    });
  }
}

/// dw at a pair of packs: the sum of the segments'.
template <class T>
void merge_segments(const PointwiseBackward& args, const Plan& plan, const float* sums,
                    int64_t k_pack, int64_t c_pack) {
  const int64_t first = c_pack * PACK, pair = (k_pack * plan.c_packs + c_pack) * PACK * PACK;
  for_each_widened<T>(smaller(PACK, args.k - k_pack * PACK), [&](int64_t row, int64_t k) {
    Vec total[2] = {};
    for (int64_t segment = 0; segment < plan.segments; ++segment) {
      const float* in = sums + segment * plan.filters() + pair + row * PACK;
      for (int h = 0; h < 2; ++h) total[h] += load(in + h * LANES);
    }
    alignas(64) float values[PACK];
    for (int h = 0; h < 2; ++h) store(values + h * LANES, total[h]);
    float* out = args.dw + (k_pack * PACK + k) * args.channels + first;
    for_each_widened<T>(smaller(PACK, args.channels - first),
                        [&](int64_t i, int64_t c) { out[c] = values[i]; });
  });
}

// dy = a * g + b * (y - mean) + c or g, behind the mask of y * gscale + gshift;
// dx = dy x w + residual;  dw = dyt x act(x * scale + shift) or dyt x x
// Shapes    g, y (NPQ, K), x, residual, dx (NPQ, C) channels-last; w, dw (K, C) fp32; mean, a, b,
//           c, gscale, gshift (K,), scale, shift (C,) fp32; K and C at most POINTWISE_CHANNELS
// Tiles     BLOCK pixels, whole rows; segments of blocks are the units
// Traffic   reads g, y, x, residual, writes dx: (2 * K + 3 * C) * NPQ * itemsize, once. What dy and
//           the activation would be is in the level-2 cache
// Numerics  dy and the activation rounded as if they were stored, the rest fp32; sums over K in
// order, CHUNK at a time;
//           those over NPQ over a block, over a segment's blocks and over the segments
// Source    docs/conv.md entry 47
template <class T>
void pointwise_backward_kernel(const PointwiseBackward& args) {
  if (args.k == 0 || args.channels == 0) return;
  const Plan plan(args);
  float* filters = args.workspace;
  float* sums = filters + plan.filters();
  float* queue = sums + plan.sums();
  if (args.npq > 0 && args.dx) {
#pragma omp parallel for schedule(static) if (args.k * args.channels > SERIAL_MERGE)
    for (int64_t i = 0; i < plan.c_packs; ++i) {
      pack_filters<T>(args, i * PACK, filters + i * padded(args.k) * PACK);
    }
  }
  const auto run = [&](int64_t segment, int64_t, int64_t thread) {
    float* e = queue + Queue::size(args.threads) + thread * plan.own();
    float* v = e + plan.k_packs * plan.pack();
    float* m = v + plan.c_packs * plan.pack();
    float* out = sums + segment * plan.filters();
    const Channels<T, 6, POINTWISE_CHANNELS> gradient(
        {args.mean, args.a, args.b, args.c, args.gscale, args.gshift}, 0, args.k);
    const Channels<T, 2, POINTWISE_CHANNELS> affine({args.scale, args.shift}, 0, args.channels);
    const int64_t begin = segment * plan.blocks / plan.segments;
    const int64_t end = (segment + 1) * plan.blocks / plan.segments;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * BLOCK, count = smaller(BLOCK, plan.npq - row);
      if (!args.y) {
        form_gradient<false, false, T>(args, row, count, gradient, e);
      } else if (!args.gscale) {
        form_gradient<true, false, T>(args, row, count, gradient, e);
      } else {
        form_gradient<true, true, T>(args, row, count, gradient, e);
      }
      if (!args.dw) {
      } else if (args.scale) {
        form_activation<true, T>(args, row, count, affine, v);
      } else {
        form_activation<false, T>(args, row, count, affine, v);
      }
      for (int64_t k = 0; k < plan.k_packs && args.dw; ++k) {
        for (int64_t c = 0; c < plan.c_packs; ++c) {
          add_products(e + k * plan.pack(), v + c * plan.pack(), count, block == begin,
                       out + (k * plan.c_packs + c) * PACK * PACK);
        }
      }
      if (!args.dx) continue;
      Ahead next;
      if (block + 1 < end) {
        const int64_t then = row + BLOCK, rows = smaller(BLOCK, plan.npq - then);
        next.add(0, static_cast<const T*>(args.g), then, rows, args.k);
        next.add(1, static_cast<const T*>(args.y), then, rows, args.k);
        next.add(2, static_cast<const T*>(args.x), then, rows, args.channels);
        next.add(3, static_cast<const T*>(args.residual), then, rows, args.channels);
      }
      for_each_pack(0, args.channels, [&](int64_t channel, auto lanes) {
        form_dx<T>(args, plan, row, count, e, filters + channel * padded(args.k), m, next, channel,
                   lanes);
      });
    }
  };
  for_each_unit(plan.segments, queue, args.threads, run);
  if (!args.dw) return;
  const int64_t pairs = plan.k_packs * plan.c_packs;
#pragma omp parallel for schedule(static) if (args.k * args.channels > SERIAL_MERGE)
  for (int64_t i = 0; i < pairs; ++i) {
    merge_segments<T>(args, plan, sums, i / plan.c_packs, i % plan.c_packs);
  }
}

int64_t pointwise_backward_units(const PointwiseBackward& args) {
  return args.k == 0 || args.channels == 0 ? 0 : Plan(args).segments;
}

int64_t pointwise_backward_workspace(const PointwiseBackward& args) {
  const Plan plan(args);
  return plan.filters() + plan.sums() + Queue::size(args.threads) + args.threads * plan.own();
}

void pointwise_backward(const PointwiseBackward& args) {
  visit(args.dtype, [&](auto type) { pointwise_backward_kernel<decltype(type)>(args); });
}

}  // namespace

const Pointwise pointwise = {pointwise_backward_units, pointwise_backward_workspace,
                             pointwise_backward};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
