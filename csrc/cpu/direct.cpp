// Convolutions as matrix products on the CPU: rows of patches (NPQ, D) times filters (D, K), where
// D counts the R * S * C values under a filter.
//
// Compiled once per instruction set, as bn_act.cpp. Storage and arithmetic are fp32.
#include <utility>

#include "isa.h"
#include "products.h"
#include "queue.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Floats of patches that are kept while filters pass: what the level-2 cache holds, or a small part
// of it where all filters, up to FILTERS floats, stay in it as well.
constexpr int64_t RESIDENT = 280 * 1024, SMALL = 16 * 1024, FILTERS = 160 * 1024;
// Row blocks that are to share what is read of the filters, even so.
constexpr int64_t FEWEST = 4;
// Values of a patch that are multiplied at a time: their filters, of one panel, lie in level 1.
constexpr int64_t CHUNK = 128;
// Values between two looks at what is to be asked for ahead.
constexpr int PIECE = 8;
// Units of work for each thread: what one has left, another may take.
constexpr int64_t UNITS = 16;
// What it costs to gather a row block's patches, and to read a panel of filters from afar, in row
// blocks multiplied with a panel.
constexpr double GATHER = 0.35;
constexpr double READ = 0.5;

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

/// How the work is cut: `blocks` of at most `height` row blocks each, times `groups` of panels. All
/// groups of a block stand together in the order of units.
struct Cut {
  int64_t height, blocks, groups;
  bool near;

  int64_t units() const { return blocks * groups; }
};

Cut cut(const Shape& shape, int64_t threads) {
  const bool near = shape.depth * shape.panels * PACK <= FILTERS;
  const int64_t block = ROWS * padded(shape.depth);
  int64_t most = RESIDENT / block;
  if (near) most = smaller(most, SMALL / block < FEWEST ? FEWEST : SMALL / block);
  most = most < 1 ? 1 : smaller(most, shape.row_blocks);
  Cut best{};
  double least = 0;
  for (int64_t height = most; height >= 1; --height) {
    const int64_t blocks = cdiv(shape.row_blocks, height);
    const int64_t groups = smaller(cdiv(UNITS * threads, blocks), shape.panels);
    const double turns = static_cast<double>(cdiv(blocks * groups, threads));
    const double width = static_cast<double>(cdiv(shape.panels, groups));
    const double share = static_cast<double>(blocks) / static_cast<double>(threads);
    const double time = turns * width * height + (share < 1 ? 1 : share) * height * GATHER +
                        (near ? 0 : share * shape.panels * READ) +
                        (threads > 1 ? width * height / 2 : 0);  // one waits for the other's last
    if (best.height == 0 || time < least) {
      least = time;
      best = {height, blocks, groups, near};
    }
  }
  return best;
}

/// The workspace, in floats: a queue's, and for each thread the patches of some row blocks, their
/// sums and a row. A line lies between the patches of row blocks, lest they fall into the same
/// cache sets.
struct Layout {
  Cut work;
  int64_t threads, block, row;

  Layout(const Shape& shape, int64_t count)
      : work(cut(shape, count)),
        threads(count),
        block(ROWS * padded(shape.depth) + 16),
        row(padded(shape.depth) + PACK) {}

  int64_t share() const { return work.height * (block + ROWS * PACK) + row; }
  float* of(float* workspace, int64_t t) const {
    return workspace + Queue::size(threads) + t * share();
  }
  int64_t size() const { return Queue::size(threads) + threads * share(); }
};

/// `count` floats, a multiple of PACK, from x to packs that lie `step` floats apart.
RESNET_FAST_INLINE void copy_packs(const float* x, int64_t count, float* v, int64_t step) {
  for (; count > 0; count -= PACK, x += PACK, v += step) {
    store(v, load(x));
    store(v + LANES, load(x + LANES));
  }
}

RESNET_FAST_INLINE void clear_packs(int64_t count, float* v, int64_t step) {
  for (; count > 0; count -= PACK, v += step) {
    store(v, Vec{});
    store(v + LANES, Vec{});
  }
}

/// `count` floats from x, and up to a vector more where `end`, the end of all memory, is far
/// enough.
RESNET_FAST_INLINE void copy_over(const float* x, int64_t count, float* v, const float* end) {
  if (x + count + LANES > end) {
    __builtin_memcpy(v, x, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i += LANES) store(v + i, load(x + i));
}

/// Where in x, about, the patch of a pixel begins.
int64_t input_of(const DirectConv& args, int64_t pixel) {
  const int64_t line = pixel / args.q % args.p * args.stride_h;
  const int64_t column = pixel % args.q * args.stride_w;
  return ((pixel / args.q / args.p * args.h + line) * args.w + column) * args.c;
}

/// The patches of the pixels [first, first + count), a row block, into v: (packs, count, PACK).
/// Values lie as the filters' do: taps row by row, all channels of each. `row` has room for one
/// patch and a pack.
void gather(const DirectConv& args, int64_t first, int64_t count, float* v, float* row) {
  const int64_t depth = args.r * args.s * args.c, step = count * PACK;
  const bool whole = args.c % PACK == 0;  // then no pack has values of two taps
  const float* memory_end = args.x + args.n * args.h * args.w * args.c;
  int64_t column = first % args.q, line = first / args.q % args.p, image = first / args.q / args.p;
  for (int64_t i = 0; i < count; ++i, v += PACK) {
    const int64_t top = line * args.stride_h - args.padding_h;
    const int64_t left = column * args.stride_w - args.padding_w;
    // The columns of the filter that lie in the image: their values are one piece of memory.
    const int64_t begin = left < 0 ? smaller(-left, args.s) : 0;
    const int64_t inside = smaller(args.w - left, args.s), end = inside < begin ? begin : inside;
    const int64_t before = begin * args.c, values = (end - begin) * args.c;
    const int64_t after = (args.s - end) * args.c;
    float* out = whole ? v : row;
    for (int64_t r = 0; r < args.r; ++r) {
      const bool in = top + r >= 0 && top + r < args.h;
      const float* x = args.x + ((image * args.h + top + r) * args.w + left + begin) * args.c;
      if (whole) {
        if (in) {
          clear_packs(before, out, step);
          copy_packs(x, values, out + before * count, step);
          clear_packs(after, out + (before + values) * count, step);
        } else {
          clear_packs(args.s * args.c, out, step);
        }
        out += args.s * args.c * count;
      } else {
        if (in) {
          __builtin_memset(out, 0, before * sizeof(float));
          copy_over(x, values, out + before, memory_end);
          __builtin_memset(out + before + values, 0, after * sizeof(float));
        } else {
          __builtin_memset(out, 0, args.s * args.c * sizeof(float));
        }
        out += args.s * args.c;
      }
    }
    if (!whole) copy_packs(row, depth, v, step);
    if (++column == args.q) {
      column = 0;
      if (++line == args.p) line = 0, ++image;
    }
  }
}

/// What is asked for while a row block is multiplied: a piece of memory, `step` bytes further at
/// every value of the depth, and rows of z or of the residual, two at every piece.
struct Ahead {
  const char* operand;
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

/// The sums m (N, PACK) += v x w over `depth` values, begun at 0 where `begins`: v (packs, N,
/// PACK), w (depth, PACK). Where they are complete they go to z instead. Of each pack VECTORS are
/// formed: one where the panel has no more channels, as the only one of 16 has.
template <int N, int VECTORS>
void multiply(const float* v, const float* w, int64_t depth, bool begins, float* m,
              const Target& target, Ahead ahead) {
  Vec sum[N][2] = {};
  int64_t asked = 0;
  for (int64_t pack = 0; pack < depth; pack += PACK, v += N * PACK) {
    const int64_t end = smaller(PACK, depth - pack);
    for (int64_t i = 0; i < end; i += PIECE, asked += 2) {
      for (int64_t row = asked; row < asked + 2 && row < N && ahead.tile; ++row) {
        const float* line = ahead.tile + row * ahead.stride;
        __builtin_prefetch(line, 1, 3);
        __builtin_prefetch(line + PACK - 1, 1, 3);
      }
      const int64_t stop = smaller(i + PIECE, end);
      for (int64_t j = i; j < stop; ++j, w += PACK, ahead.operand += ahead.step) {
        __builtin_prefetch(ahead.operand, 0, 2);
        const Vec left = load(w), right = VECTORS > 1 ? load(w + LANES) : Vec{};
#pragma GCC unroll 14
        for (int r = 0; r < N; ++r) {
          const Vec value = broadcast(v + r * PACK + j);
          sum[r][0] = fma(value, left, sum[r][0]);
          if (VECTORS > 1) sum[r][1] = fma(value, right, sum[r][1]);
        }
      }
    }
  }
  if (!begins) {
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      for (int h = 0; h < VECTORS; ++h) sum[r][h] += load(m + r * PACK + h * LANES);
    }
  }
  if (!target.complete) {
#pragma GCC unroll 14
    for (int r = 0; r < N; ++r) {
      for (int h = 0; h < VECTORS; ++h) store(m + r * PACK + h * LANES, sum[r][h]);
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

using Multiply = decltype(&multiply<1, 2>);

/// For a row block of `rows` pixels and a panel that has `channels` from its first to the last.
template <int... N>
Multiply multiply_tile(int64_t rows, int64_t channels, std::integer_sequence<int, N...>) {
  static constexpr Multiply NARROW[] = {multiply<N + 1, 1>...}, WIDE[] = {multiply<N + 1, 2>...};
  return (channels <= LANES ? NARROW : WIDE)[rows - 1];
}

// z = act(conv(x, w) + shift + residual)
// Shapes    x (N, H, W, C), residual, z (N, P, Q, K) channels-last; w (panels, R, S, C, PACK), a
//           panel PACK output channels; shift (K,)
// Tiles     some row blocks of at most ROWS pixels, times a group of panels: a unit; in it panels,
//           CHUNK values under a filter, row blocks; see cut()
// Traffic   reads x R * S / stride^2 times, mostly from caches, w once per block of row blocks,
//           writes z
// Numerics  fp32; sums of CHUNK products in order, added in order
// Source    docs/conv.md entries 30 to 37
void direct_conv(const DirectConv& args) {
  const Shape shape(args);
  if (shape.rows == 0 || args.k == 0) return;
  const Layout layout(shape, args.threads);
  const Cut& work = layout.work;
  const auto run = [&](int64_t unit, int64_t before, int64_t thread) {
    float* patches = layout.of(args.workspace, thread);
    float* sums = patches + work.height * layout.block;
    float* row = sums + work.height * ROWS * PACK;
    const int64_t block = unit / work.groups, group = unit % work.groups;
    const int64_t first = block * shape.row_blocks / work.blocks;
    const int64_t last = (block + 1) * shape.row_blocks / work.blocks, height = last - first;
    const bool held = before >= 0 && before / work.groups == block;
    for (int64_t i = first; i < last && !held; ++i) {
      gather(args, shape.first(i), shape.first(i + 1) - shape.first(i),
             patches + (i - first) * layout.block, row);
    }
    const int64_t panel_end = (group + 1) * shape.panels / work.groups;
    int64_t panel = group * shape.panels / work.groups;
    // The next chunk's filters or, where the thread's first block brought them near, the next
    // block's pixels.
    const int64_t begun = thread * work.units() / args.threads / work.groups;
    const bool reads_filters = !work.near || block == begun;
    const int64_t pixels = height * ROWS * args.c * args.stride_h * args.stride_w * 4;
    Ahead ahead{reinterpret_cast<const char*>(args.x + input_of(args, shape.first(last))),
                cdiv(pixels, (panel_end - panel) * shape.depth * height), nullptr, args.k};
    for (; panel < panel_end; ++panel) {
      for (int64_t start = 0; start < shape.depth; start += CHUNK) {
        const int64_t depth = smaller(CHUNK, shape.depth - start);
        const float* w = args.weights + (panel * shape.depth + start) * PACK;
        const bool complete = start + depth == shape.depth;
        if (reads_filters) {
          ahead.operand = reinterpret_cast<const char*>(w + depth * PACK);
          ahead.step = cdiv(PACK * 4, height);
        }
        for (int64_t i = first; i < last; ++i, ahead.operand += depth * ahead.step) {
          const int64_t pixel = shape.first(i), rows = shape.first(i + 1) - pixel;
          const int64_t channel = panel * PACK;
          ahead.tile = complete ? args.z + pixel * args.k + channel : nullptr;
          multiply_tile(rows, args.k - channel, std::make_integer_sequence<int, ROWS>{})(
              patches + (i - first) * layout.block + start * rows, w, depth, start == 0,
              sums + (i - first) * ROWS * PACK, {&args, pixel, channel, complete}, ahead);
        }
      }
    }
  };
  for_each_unit(work.units(), args.workspace, args.threads, run);
}

int64_t direct_workspace(const DirectConv& args) {
  return Layout(Shape(args), args.threads).size();
}

int64_t direct_panel() { return PACK; }

}  // namespace

const Direct direct = {direct_panel, direct_workspace, direct_conv};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
