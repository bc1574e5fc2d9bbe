// Tiles of an (npq, k) matrix, and the sums over them that are merged in a fixed order: they follow
// from the shape alone, so results do not depend on the number of threads.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include "vec.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// A sum down a tile's rows is fp32, and its rounding error grows with them. Rows of up to 512
// channels are read from end to end: the prefetchers follow, and the sums stay in L1.
constexpr int64_t BLOCK_NPQ = 128;
constexpr int64_t BLOCK_K = 512;
// Channels that one thread merges at a time.
constexpr int64_t MERGE_K = 64;
// Waking the other threads costs more than this many elements.
constexpr int64_t SERIAL = 32768;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// One tile: rows [row, row_end) and channels [channel, channel_end); `index` counts row blocks.
struct Tile {
  int64_t index, row, row_end, channel, channel_end;
};

/// An (npq, k) matrix cut into tiles.
struct Tiles {
  int64_t npq, k;

  int64_t row_blocks() const { return cdiv(npq, BLOCK_NPQ); }
  int64_t channel_blocks() const { return cdiv(k, BLOCK_K); }
  int64_t rows(int64_t index) const { return smaller(BLOCK_NPQ, npq - index * BLOCK_NPQ); }

  Tile operator[](int64_t i) const {
    const int64_t index = i / channel_blocks();
    const int64_t row = index * BLOCK_NPQ;
    const int64_t channel = i % channel_blocks() * BLOCK_K;
    return {index, row, row + rows(index), channel, smaller(channel + BLOCK_K, k)};
  }
};

template <class Body>
void for_each_tile(const Tiles& tiles, Body body) {
  const int64_t count = tiles.row_blocks() * tiles.channel_blocks();
#pragma omp parallel for schedule(static) if (tiles.npq * tiles.k > SERIAL)
  for (int64_t i = 0; i < count; ++i) body(tiles[i]);
}

/// Calls body(channel, lanes) on every vector of the channels [first, last).
template <class Body>
void for_each_vector(int64_t first, int64_t last, const Body& body) {
  int64_t channel = first;
  for (; channel + LANES <= last; channel += LANES) body(channel, All{});
  if (channel < last) body(channel, First{static_cast<int>(last - channel)});
}

/// Calls body(first, last) on blocks of at most MERGE_K channels, of `blocks` partial results each.
template <class Body>
void for_each_channel_block(int64_t blocks, int64_t k, Body body) {
  const int64_t count = cdiv(k, MERGE_K);
#pragma omp parallel for schedule(static) if (blocks * k > SERIAL)
  for (int64_t i = 0; i < count; ++i) body(i * MERGE_K, smaller((i + 1) * MERGE_K, k));
}

/// total[c - first] = sum of term(index, c) over the blocks in order, in double.
template <class Term>
void merge(int64_t blocks, int64_t first, int64_t last, double (&total)[MERGE_K], Term term) {
  for (double& t : total) t = 0;
  for (int64_t index = 0; index < blocks; ++index) {
#pragma omp simd
    for (int64_t c = first; c < last; ++c) total[c - first] += term(index, c);
  }
}

/// Merges SUMS workspace planes of (blocks, k) into SUMS outputs of (k,).
template <int SUMS>
void merge_sums(int64_t blocks, int64_t k, const float* workspace, float* const (&out)[SUMS]) {
  for_each_channel_block(blocks, k, [&](int64_t first, int64_t last) {
    double total[MERGE_K];
    for (int s = 0; s < SUMS; ++s) {
      const float* partial = workspace + s * blocks * k;
      merge(blocks, first, last, total,
            [=](int64_t index, int64_t c) { return double{partial[index * k + c]}; });
      for (int64_t c = first; c < last; ++c) out[s][c] = static_cast<float>(total[c - first]);
    }
  });
}

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
