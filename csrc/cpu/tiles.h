// Tiles of an (npq, k) matrix, and the sums over them that are merged in a fixed order: they follow
// from the shape alone, so results do not depend on the number of threads.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include <type_traits>

#include "vec.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// A sum down a tile's rows is fp32, and its rounding error grows with them. Rows of up to BLOCK_K
// channels are read from end to end: the prefetchers follow, and the sums stay in L1.
constexpr int64_t BLOCK_NPQ = 256;
constexpr int64_t BLOCK_K = 512;
// Where a matrix is written, too, rows of this many bytes or more are gone through whole, up to
// this many channels, and one at a time: of half a page or of rows side by side the prefetchers
// would have to find three streams anew, again and again.
constexpr int64_t WRITE_BYTES = 512;
constexpr int64_t WRITE_K = 2048;
// Blocks of rows come in multiples of this many, all alike, so that two, four or eight threads have
// the same work; and rows in multiples of READ_ROWS.
constexpr int64_t SHARES = 8;
// Rows whose sum is formed in registers before it is added to that of the tile: more where nothing
// is written, which wants its lines in order.
constexpr int64_t READ_ROWS = 8;
constexpr int64_t WRITE_ROWS = 2;
// Waking the other threads costs more than this many elements.
constexpr int64_t SERIAL = 32768;
// The same of partial sums, right behind a loop in which all threads ran: they are awake.
constexpr int64_t SERIAL_MERGE = 8192;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// One tile: rows [row, row_end) and channels [channel, channel_end); `index` counts row blocks.
struct Tile {
  int64_t index, row, row_end, channel, channel_end;
};

/// An (npq, k) matrix cut into tiles of `width` channels. Sums do not depend on the width.
struct Tiles {
  int64_t npq, k, width = BLOCK_K;

  /// Rows of every block but the last.
  int64_t height() const {
    const int64_t blocks = cdiv(npq, BLOCK_NPQ * SHARES) * SHARES;
    return npq > 0 ? cdiv(cdiv(npq, blocks), READ_ROWS) * READ_ROWS : READ_ROWS;
  }
  int64_t row_blocks() const { return cdiv(npq, height()); }
  int64_t channel_blocks() const { return cdiv(k, width); }
  int64_t rows(int64_t index) const { return smaller(height(), npq - index * height()); }

  Tile operator[](int64_t i) const {
    const int64_t index = i / channel_blocks();
    const int64_t row = index * height();
    const int64_t channel = i % channel_blocks() * width;
    return {index, row, row + rows(index), channel, smaller(channel + width, k)};
  }
};

template <class Body>
void for_each_tile(const Tiles& tiles, Body body) {
  const int64_t count = tiles.row_blocks() * tiles.channel_blocks();
#pragma omp parallel for schedule(static) if (tiles.npq * tiles.k > SERIAL)
  for (int64_t i = 0; i < count; ++i) body(tiles[i]);
}

/// Calls body(channel, lanes) on every pack of the channels [first, last).
template <class Body>
void for_each_pack(int64_t first, int64_t last, const Body& body) {
  int64_t channel = first;
  for (; channel + PACK <= last; channel += PACK) body(channel, All{});
  if (channel < last) body(channel, First{static_cast<int>(last - channel)});
}

/// COUNT vectors at a block of at most BLOCK channels, in the order in which packs of T are
/// widened, so that a vector of channels is one load. Every NaN is the usual one (see narrow());
/// what has no channel is 0. A null pointer is a vector that nobody reads.
template <class T, int COUNT, int64_t BLOCK>
struct Channels {
  static_assert(BLOCK % PACK == 0);
  alignas(64) float values[COUNT][BLOCK];

  Channels(const float* const (&vectors)[COUNT], int64_t first, int64_t last) {
    for (int i = 0; i < COUNT; ++i) {
      if (vectors[i]) arrange(values[i], vectors[i] + first, last - first);
    }
  }

  static void arrange(float* out, const float* vector, int64_t count) {
    for_each_pack(0, count, [=](int64_t channel, auto lanes) {
      alignas(64) float tail[PACK] = {};
      const float* in = vector + channel;
      if constexpr (std::is_same_v<decltype(lanes), First>) {
        for (int i = 0; i < lanes.n; ++i) tail[i] = in[i];
        in = tail;
      }
      for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < LANES; ++lane) {
          const float value = in[Storage<T>::channel(half, lane)];
          out[channel + half * LANES + lane] = value != value ? __builtin_nanf("") : value;
        }
      }
    });
  }

  /// Vector `i` at one half of the pack `local` channels from the block's first.
  Vec operator()(int i, int64_t local, int half) const {
    return load(values[i] + local + half * LANES);
  }
};

/// Channels of a workspace's row: whole packs, in the order in which packs of T are widened.
inline int64_t padded(int64_t k) { return cdiv(k, PACK) * PACK; }

/// Calls body(first, count) on every pack's worth of channels, of `blocks` partial results each.
template <class Body>
void for_each_merge(int64_t blocks, int64_t k, Body body) {
  const int64_t packs = cdiv(k, PACK);
#pragma omp parallel for schedule(static) if (blocks * k > SERIAL_MERGE)
  for (int64_t i = 0; i < packs; ++i) body(i * PACK, smaller(PACK, k - i * PACK));
}

/// total[i] = sum of term(index, i) over the blocks in order, in double, for i < count.
template <class Term>
void merge(int64_t blocks, int64_t count, double (&total)[PACK], Term term) {
  for (double& t : total) t = 0;
  for (int64_t index = 0; index < blocks; ++index) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) total[i] += term(index, i);
  }
}

/// Calls body(i, channel) for the `count` channels of a pack of T: where each is when widened.
template <class T, class Body>
void for_each_widened(int64_t count, const Body& body) {
  for (int half = 0; half < 2; ++half) {
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t channel = Storage<T>::channel(half, lane);
      if (channel < count) body(half * LANES + lane, channel);
    }
  }
}

/// Merges SUMS workspace planes of (blocks, padded(k)) into SUMS outputs of (k,).
template <class T, int SUMS>
void merge_sums(int64_t blocks, int64_t k, const float* workspace, float* const (&out)[SUMS]) {
  for_each_merge(blocks, k, [&](int64_t first, int64_t count) {
    double total[PACK];
    for (int s = 0; s < SUMS; ++s) {
      const float* partial = workspace + s * blocks * padded(k) + first;
      merge(blocks, PACK, total,
            [=](int64_t index, int64_t i) { return double{partial[index * padded(k) + i]}; });
      for_each_widened<T>(count, [&](int64_t i, int64_t channel) {
        out[s][first + channel] = static_cast<float>(total[i]);
      });
    }
  });
}

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
