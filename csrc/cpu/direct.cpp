// Convolutions as matrix products on the CPU: rows of patches (NPQ, D) times filters (D, K), where D
// counts the R * S * C values under a filter.
//
// Compiled once per instruction set, as bn_act.cpp. Storage and arithmetic are fp32.
#include <omp.h>

#include <utility>

#include "isa.h"
#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Pixels to a row block: rows of accumulators, two vectors wide, that the registers hold.
#if defined(__AVX512F__)
constexpr int ROWS = 14;
#else
constexpr int ROWS = 6;
#endif
#ifndef TUNE_RESIDENT
#define TUNE_RESIDENT (240 * 1024)
#define TUNE_SMALL (16 * 1024)
#define TUNE_FILTERS (256 * 1024)
#endif
// Floats of patches that are kept while filters pass: in the level-2 cache where the filters come
// from further away, in a quarter of it where they stay there themselves, beside them.
constexpr int64_t RESIDENT = TUNE_RESIDENT, SMALL = TUNE_SMALL, FILTERS = TUNE_FILTERS;
// Values of a patch that are multiplied at a time: their filters, of one panel, lie in level 1.
constexpr int64_t CHUNK = 128;
// Values between two looks at what is to be asked for ahead.
constexpr int PIECE = 8;
// What it costs to gather a row block's patches, in panels multiplied with it.
constexpr double GATHER = 0.15;

/// The matrices: `rows` pixels, `depth` values under a filter, `panels` of PACK output channels.
struct Shape {
  int64_t rows, depth, row_blocks, panels;

  explicit Shape(const DirectConv& args)
      : rows(args.n * args.p * args.q),
        depth(args.r * args.s * args.c),
        row_blocks(cdiv(rows, ROWS)),
        panels(cdiv(args.k, PACK)) {}

  /// The first pixel of a row block: they are all alike, but for one pixel.
  int64_t first(int64_t block) const { return block * rows / row_blocks; }
};

/// How the work is cut: `blocks` of at most `height` row blocks each, times `groups` of panels.
struct Cut {
  int64_t height, blocks, groups;
};

Cut cut(const Shape& shape, int64_t threads) {
  const bool near = shape.depth * shape.panels * PACK <= FILTERS;
  int64_t most = (near ? SMALL : RESIDENT) / (ROWS * padded(shape.depth));
  most = most < 1 ? 1 : smaller(most, shape.row_blocks);
  Cut best{};
  double least = 0;
  for (int64_t height = most; height >= 1; --height) {
    const int64_t blocks = cdiv(shape.row_blocks, height);
    for (int64_t groups = 1; groups <= smaller(shape.panels, threads); ++groups) {
      const double turns = static_cast<double>(cdiv(blocks * groups, threads));
      const double width = static_cast<double>(cdiv(shape.panels, groups));
      const double time = turns * (width * height + GATHER * height);
      if (best.height == 0 || time < least) {
        least = time;
        best = {height, blocks, groups};
      }
    }
  }
  return best;
}

/// A thread's workspace, in floats: the patches of some row blocks, then their sums. A line lies
/// between the parts, lest they fall into the same cache sets.
struct Layout {
  Cut work;
  int64_t block;

  Layout(const Shape& shape, int64_t threads)
      : work(cut(shape, threads)), block(ROWS * padded(shape.depth) + 16) {}

  float* patches(float* workspace, int64_t i) const { return workspace + i * block; }
  float* sums(float* workspace, int64_t i) const {
    return workspace + work.height * block + i * ROWS * PACK;
  }
  int64_t size() const { return work.height * (block + ROWS * PACK); }
};

/// Where one row of patches goes: its packs lie `count` packs apart.
struct Row {
  float* v;
  int64_t count;

  float* at(int64_t value) const { return v + value / PACK * PACK * count + value % PACK; }

  /// Values [first, first + count) of the row.
  void copy(int64_t first, const float* x, int64_t length) const {
    if (first % PACK == 0) {
      float* out = at(first);
      for (; length >= PACK; length -= PACK, first += PACK, x += PACK, out += PACK * count) {
        store(out, load(x));
        store(out + LANES, load(x + LANES));
      }
    }
    while (length > 0) {
      const int64_t part = smaller(length, PACK - first % PACK);
      __builtin_memcpy(at(first), x, part * sizeof(float));
      first += part, x += part, length -= part;
    }
  }
  void clear(int64_t first, int64_t length) const {
    while (length > 0) {
      const int64_t part = smaller(length, PACK - first % PACK);
      __builtin_memset(at(first), 0, part * sizeof(float));
      first += part, length -= part;
    }
  }
};

/// The patches of the pixels [first, first + count), a row block, into v: (packs, count, PACK).
/// Values lie as the filters' do: taps row by row, all channels of each.
void gather(const DirectConv& args, int64_t first, int64_t count, float* v) {
  for (int64_t i = 0; i < count; ++i) {
    const Row row{v + i * PACK, count};
    const int64_t pixel = first + i, image = pixel / args.q / args.p;
    const int64_t top = pixel / args.q % args.p * args.stride_h - args.padding_h;
    const int64_t left = pixel % args.q * args.stride_w - args.padding_w;
    // The columns of the filter that lie in the image: their values are one piece of memory.
    const int64_t begin = left < 0 ? smaller(-left, args.s) : 0;
    const int64_t end = args.w - left < args.s ? (args.w - left < begin ? begin : args.w - left) : args.s;
    for (int64_t r = 0; r < args.r; ++r) {
      const int64_t line = top + r, start = r * args.s * args.c;
      if (line < 0 || line >= args.h) {
        row.clear(start, args.s * args.c);
        continue;
      }
      row.clear(start, begin * args.c);
      row.copy(start + begin * args.c,
               args.x + ((image * args.h + line) * args.w + left + begin) * args.c,
               (end - begin) * args.c);
      row.clear(start + end * args.c, (args.s - end) * args.c);
    }
  }
}

/// What is asked for while a row block is multiplied: filters, `step` bytes further at every value
/// of the depth, and rows of z or of the residual, two at every piece.
struct Ahead {
  const char* filters;
  int64_t step;
  const float* tile;
  int64_t stride;
};

/// Where sums go that are complete: PACK channels from `channel` on of the pixels from `pixel` on.
struct Target {
  const DirectConv* args;
  int64_t pixel, channel;
  bool complete;
};

template <int N, class Lanes>
RESNET_FAST_INLINE void finish(Vec (&sum)[N][2], const Target& target, Lanes lanes) {
  const DirectConv& args = *target.args;
  if (args.shift) {
    const Pair shift = widen(load_pack(args.shift + target.channel, lanes));
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      for (int h = 0; h < 2; ++h) sum[r][h] += shift.v[h];
    }
  }
  const int64_t at = target.pixel * args.k + target.channel;
  if (args.residual) {
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      const Pair other = widen(load_pack(args.residual + at + r * args.k, lanes));
      for (int h = 0; h < 2; ++h) sum[r][h] += other.v[h];
    }
  }
  if (args.relu) {
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      for (int h = 0; h < 2; ++h) sum[r][h] = relu(sum[r][h]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < N; ++r) {
    store_pack(args.z + at + r * args.k, narrow(Pair{{sum[r][0], sum[r][1]}}, float{}), lanes);
  }
}

/// The sums m (N, PACK) += v x w over `depth` values, begun at 0 where `begins`: v (packs, N, PACK),
/// w (depth, PACK). Where they are complete they go to z instead.
template <int N>
void multiply(const float* v, const float* w, int64_t depth, bool begins, float* m,
              const Target& target, Ahead ahead) {
  Vec sum[N][2] = {};
  int64_t asked = 0;
  for (int64_t pack = 0; pack < depth; pack += PACK, v += N * PACK) {
    const int64_t end = smaller(PACK, depth - pack);
    for (int64_t i = 0; i < end; i += PIECE) {
      for (int64_t row = asked; row < asked + 2 && row < N && ahead.tile; ++row) {
        const float* line = ahead.tile + row * ahead.stride;
        __builtin_prefetch(line, 1, 3);
        __builtin_prefetch(line + PACK - 1, 1, 3);
      }
      asked += 2;
      const int64_t stop = smaller(i + PIECE, end);
      for (int64_t j = i; j < stop; ++j, w += PACK, ahead.filters += ahead.step) {
        __builtin_prefetch(ahead.filters, 0, 2);
        const Vec left = load(w), right = load(w + LANES);
#pragma GCC unroll 14
        for (int r = 0; r < N; ++r) {
          const Vec value = broadcast(v + r * PACK + j);
          sum[r][0] = fma(value, left, sum[r][0]);
          sum[r][1] = fma(value, right, sum[r][1]);
        }
      }
    }
  }
  if (!begins) {
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      for (int h = 0; h < 2; ++h) sum[r][h] += load(m + r * PACK + h * LANES);
    }
  }
  if (!target.complete) {
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      for (int h = 0; h < 2; ++h) store(m + r * PACK + h * LANES, sum[r][h]);
    }
    return;
  }
  const int64_t lanes = target.args->k - target.channel;
  if (lanes >= PACK) {
    finish(sum, target, All{});
  } else {
    finish(sum, target, First{static_cast<int>(lanes)});
  }
}

using Multiply = decltype(&multiply<1>);

template <int... N>
Multiply multiply_rows(int64_t rows, std::integer_sequence<int, N...>) {
  static constexpr Multiply FUNCTIONS[] = {multiply<N + 1>...};
  return FUNCTIONS[rows - 1];
}

// z = act(conv(x, w) + shift + residual)
// Shapes    x (N, H, W, C), residual, z (N, P, Q, K) channels-last; w (panels, R, S, C, PACK), a
//           panel PACK output channels; shift (K,)
// Tiles     some row blocks of at most ROWS pixels, times a group of panels; in it panels in turn,
//           CHUNK values under a filter, row blocks; see cut()
// Traffic   reads x R * S / stride^2 times, mostly from caches, w once per block of row blocks,
//           writes z
// Numerics  fp32; sums of CHUNK products in order, added in order
// Source    docs/conv.md
void direct_conv(const DirectConv& args) {
  const Shape shape(args);
  if (shape.rows == 0 || args.k == 0) return;
  const Layout layout(shape, args.threads);
  const Cut& work = layout.work;
  const int64_t count = work.blocks * work.groups;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (count > 1)
  for (int64_t task = 0; task < count; ++task) {
    float* workspace = args.workspace + omp_get_thread_num() * layout.size();
    const int64_t block = task / work.groups, group = task % work.groups;
    const int64_t first = block * shape.row_blocks / work.blocks;
    const int64_t last = (block + 1) * shape.row_blocks / work.blocks;
    for (int64_t i = first; i < last; ++i) {
      gather(args, shape.first(i), shape.first(i + 1) - shape.first(i),
             layout.patches(workspace, i - first));
    }
    for (int64_t panel = group * shape.panels / work.groups;
         panel < (group + 1) * shape.panels / work.groups; ++panel) {
      for (int64_t start = 0; start < shape.depth; start += CHUNK) {
        const int64_t depth = smaller(CHUNK, shape.depth - start);
        const float* w = args.weights + (panel * shape.depth + start) * PACK;
        const bool complete = start + depth == shape.depth;
        // The next filters, in as many parts as there are row blocks.
        const char* next = reinterpret_cast<const char*>(w + depth * PACK);
        const int64_t step = cdiv(PACK * 4, last - first);
        for (int64_t i = first; i < last; ++i) {
          const int64_t pixel = shape.first(i), rows = shape.first(i + 1) - pixel;
          const int64_t channel = panel * PACK;
          const Ahead ahead{next + (i - first) * depth * step, step,
                            complete ? args.z + pixel * args.k + channel : nullptr, args.k};
          multiply_rows(rows, std::make_integer_sequence<int, ROWS>{})(
              layout.patches(workspace, i - first) + start * rows, w, depth, start == 0,
              layout.sums(workspace, i - first), {&args, pixel, channel, complete}, ahead);
        }
      }
    }
  }
}

int64_t direct_workspace(const DirectConv& args) {
  return args.threads * Layout(Shape(args), args.threads).size();
}

int64_t direct_panel() { return PACK; }

}  // namespace

const Direct direct = {direct_panel, direct_workspace, direct_conv};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
