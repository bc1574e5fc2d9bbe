// The windows of the stem's pooling, 3 x 3, stride 2, padding 1, and how they are gone through.
//
// Window (p, q) covers rows 2p - 1, 2p, 2p + 1 and columns 2q - 1, 2q, 2q + 1; place 3 * r + s in
// it is row 2p - 1 + r, column 2q - 1 + s.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Packs of channels side by side: whole cache lines are read in order.
constexpr int PACKS = LANES == 16 ? 2 : 1;
// Windows of one row whose maxima a thread keeps, in L1, and that one fp32 sum is formed over.
constexpr int64_t BLOCK_Q = 64;
// index where no gradient passes.
constexpr int BLOCKED = 9;

/// Calls body(channel, count, lanes) on groups of PACKS packs, then packs, then the tail.
template <class Body>
void for_each_group(int64_t k, const Body& body) {
  int64_t channel = 0;
  for (; channel + PACKS * PACK <= k; channel += PACKS * PACK) {
    body(channel, std::integral_constant<int, PACKS>{}, All{});
  }
  for_each_pack(channel, k, [&](int64_t first, auto lanes) {
    body(first, std::integral_constant<int, 1>{}, lanes);
  });
}

/// COUNT vectors at a group's channels.
template <class T, int COUNT>
using Group = Channels<T, COUNT, PACKS * PACK>;

/// Images (n, h, w) and their windows (n, p, q).
struct Images {
  int64_t n, h, w, p, q;

  template <class Args>
  explicit Images(const Args& args)
      : n(args.n), h(args.h), w(args.w), p((args.h + 1) / 2), q((args.w + 1) / 2) {}
};

/// A block of windows: rows [p, p_end) and columns [q, q_end) of one image.
struct Windows {
  int64_t image, p, p_end, q, q_end;
};

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
