// The two skeletons of what passes once over an (npq, k) matrix: elementwise ops, and sums down its
// rows.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include <omp.h>

#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Channels from which on what comes next in these rows is asked for, this many bytes ahead, not the
// rows below.
constexpr int64_t WIDE = 512;
constexpr int64_t WIDE_AHEAD_BYTES = 256;
// What is asked for of narrower rows that are only read lies this far ahead: a page, where a stream
// ends for the processor's own prefetchers.
constexpr int64_t AHEAD_BYTES = 4096;
// Channels whose vectors a thread keeps in L1 while it goes down its rows.
constexpr int64_t ELEMENT_K = 2048;

/// Where a pack lies: at `offset` of the matrix, which is `channel` of `row`, and `local` channels
/// from the first of its block. What lies `ahead` further is to be asked for, where rows are read
/// side by side: the processor's own prefetchers lose their way there.
struct At {
  int64_t offset, row, channel, local, ahead;
};

/// The skeleton of every elementwise op: calls body(at, lanes, vectors) on every pack of an (npq,
/// k) matrix of T.
template <class T, int COUNT, class Body>
void for_each_element(int64_t npq, int64_t k, const float* const (&vectors)[COUNT], Body body) {
  // Each thread has a body and a k of its own: shared ones are read again after every store.
#pragma omp parallel firstprivate(body, k) if (npq * k > SERIAL)
  {
    for (int64_t first = 0; first < k; first += ELEMENT_K) {
      const int64_t last = smaller(first + ELEMENT_K, k);
      const Channels<T, COUNT, ELEMENT_K> channels(vectors, first, last);
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < npq; ++row) {
        for_each_pack(first, last, [=, start = row * k, &channels](int64_t channel, auto lanes) {
          body(At{start + channel, row, channel, channel - first, 0}, lanes, channels);
        });
      }
    }
  }
}

/// The sums of COUNT packs side by side over ROWS rows from `row`, added to the tile's, or set if
/// the tile begins here.
template <class T, int64_t ROWS, int COUNT, int SUMS, class Add, class Lanes>
void sum_group(const Tile& tile, int64_t row, int64_t k, int64_t channel, Lanes lanes,
               const Add& add, float* const (&out)[SUMS]) {
  const int64_t local = channel - tile.channel;
  // Rows of many channels lie a page apart or nearly: those below would push out what is asked for.
  constexpr int64_t SIZE = sizeof(T), PAGE = AHEAD_BYTES / SIZE;
  const int64_t narrow = ROWS == READ_ROWS ? PAGE : ROWS * k;
  const int64_t ahead = k >= WIDE ? WIDE_AHEAD_BYTES / SIZE : narrow;
  Vec sums[COUNT][SUMS][2] = {};
#pragma GCC unroll 2
  for (int64_t r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < COUNT; ++p) {
      const int64_t at = p * PACK;
      add(At{(row + r) * k + channel + at, row + r, channel + at, local + at, ahead}, lanes,
          sums[p]);
    }
  }
  for (int s = 0; s < SUMS; ++s) {
    for (int i = 0; i < 2 * COUNT; ++i) {
      float* total = out[s] + local + i * LANES;
      const Vec sum = sums[i / 2][s][i % 2];
      store(total, row == tile.row ? sum : load(total) + sum);
    }
  }
}

/// The skeleton of every reduction: add(at, lanes, sums) adds one pack of a tile to its channels'
/// SUMS sums. out[0..SUMS) get those of the tile, in the order of widened packs. ROWS rows are
/// summed in registers; where nothing is written two packs at a time, since one pack's sums are too
/// few to hide an addition's latency.
template <class T, int64_t ROWS, int SUMS, class Add>
void sum_tile(const Tile& tile, int64_t k, const Add& add, float* const (&out)[SUMS]) {
  constexpr int COUNT = ROWS == READ_ROWS ? 2 : 1;
  const auto sum_rows = [&](int64_t row, auto rows) {
    int64_t first = tile.channel;
    if constexpr (COUNT > 1) {
      for (; first + COUNT * PACK <= tile.channel_end; first += COUNT * PACK) {
        sum_group<T, rows(), COUNT>(tile, row, k, first, All{}, add, out);
      }
    }
    for_each_pack(first, tile.channel_end, [&](int64_t channel, auto lanes) {
      sum_group<T, rows(), 1>(tile, row, k, channel, lanes, add, out);
    });
  };
  int64_t row = tile.row;
  for (; row + ROWS <= tile.row_end; row += ROWS) {
    sum_rows(row, std::integral_constant<int64_t, ROWS>{});
  }
  for (; row < tile.row_end; ++row) sum_rows(row, std::integral_constant<int64_t, 1>{});
}

/// Reduces SUMS sums over a whole matrix of T: tiles into the workspace, then the tiles in order.
/// `make(vectors)` is the tile's add. Tiles are WIDTH channels wide, narrower if threads would have
/// none.
template <class T, int64_t ROWS, int64_t WIDTH, int SUMS, int COUNT, class Make>
void reduce(int64_t npq, int64_t k, float* workspace, const float* const (&vectors)[COUNT],
            const Make& make, float* const (&out)[SUMS]) {
  Tiles tiles{npq, k, WIDTH};
  if (tiles.row_blocks() < omp_get_max_threads()) tiles.width = BLOCK_K;
  const int64_t plane = tiles.row_blocks() * padded(k);
  for_each_tile(tiles, [&](const Tile& tile) {
    const Channels<T, COUNT, WIDTH> channels(vectors, tile.channel, tile.channel_end);
    float* partial[SUMS];
    for (int s = 0; s < SUMS; ++s) {
      partial[s] = workspace + s * plane + tile.index * padded(k) + tile.channel;
    }
    sum_tile<T, ROWS>(tile, k, make(channels), partial);
  });
  merge_sums<T>(tiles.row_blocks(), k, workspace, out);
}

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
