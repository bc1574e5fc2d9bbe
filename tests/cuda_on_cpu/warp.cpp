// Warp collectives: shuffles, votes, and the instructions of csrc/cuda/ptx.cuh, lane by lane.
#include <cstring>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned FULL = 0xffffffffu;

struct Shuffle {
  const void* value;
  void* result;
  size_t size;
  int source;
};

struct Vote {
  bool predicate;
  unsigned result;
};

struct Ldmatrix {
  const uint16_t* row;
  uint32_t* r;
  bool trans;
};

struct Mma {
  float* d;
  const uint32_t *a, *b;
  ToFloat to_float;
};

template <class F>
void for_each_lane(unsigned mask, F f) {
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) f(lane);
  }
}

template <class T>
const T& slot(const Collective& collective, int lane) {
  return *static_cast<const T*>(collective.slots[lane]);
}

uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

/// Element i of a row of pairs.
uint16_t half_of(const uint32_t* pairs, int i) {
  return static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
}

}  // namespace

void syncwarp(unsigned mask, Site site) {
  meet(mask, "__syncwarp", false, site, nullptr,
       [](const Collective&) { ++machine.warps[machine.current->warp()].clock; });
}

void shuffle(unsigned mask, const void* value, void* result, size_t size, int source, Site site) {
  Shuffle self{value, result, size, source};
  meet(mask, "a shuffle", false, site, &self, [](const Collective& collective) {
    for_each_lane(collective.arrived, [&](int lane) {
      const auto& mine = slot<Shuffle>(collective, lane);
      if (!(collective.arrived >> mine.source & 1)) {
        fail("is in a shuffle in which lane " + std::to_string(lane) + " reads lane " +
                 std::to_string(mine.source) + ", which takes no part",
             {nullptr, collective.site});
      }
      std::memcpy(mine.result, slot<Shuffle>(collective, mine.source).value, mine.size);
    });
  });
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  Vote self{predicate, 0};
  meet(mask, "a vote", false, site, &self, [](const Collective& collective) {
    unsigned votes = 0;
    for_each_lane(collective.arrived, [&](int lane) {
      votes |= unsigned{slot<Vote>(collective, lane).predicate} << lane;
    });
    for_each_lane(collective.arrived,
                  [&](int lane) { static_cast<Vote*>(collective.slots[lane])->result = votes; });
  });
  return self.result;
}

void atomic_access(const void* p, size_t size, Site site) {
  const Where where{nullptr, site};
  if (reinterpret_cast<uintptr_t>(p) % size) fail("updates a misaligned address", where);
  check(p, size, Access::atomic, where);
}

// ---- cp.async: what was there is gone at once, what comes is there when it was waited for

void cp_async_16(void* smem, const void* gmem, bool valid, Site site) {
  const Where where{nullptr, site};
  for (const void* p : {static_cast<const void*>(smem), valid ? gmem : nullptr}) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("copies 16 bytes at a misaligned address", where);
  }
  if (valid) check(gmem, 16, Access::read, where);
  begin_copy(smem, 16, where);
  machine.current->open_copies.push_back({static_cast<char*>(smem), valid ? gmem : nullptr});
}

void cp_async_commit() {
  Thread& self = *machine.current;
  self.copy_groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void cp_async_wait(int groups_left) {
  auto& groups = machine.current->copy_groups;
  for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front()) {
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.gmem) {
        std::memcpy(copy.smem, copy.gmem, 16);
      } else {
        std::memset(copy.smem, 0, 16);
      }
      end_copy(copy.smem, 16);
    }
  }
}

// ---- Tensor cores. Lane l holds, of an 8x8 matrix, the elements 2 * (l % 4) and the next of row
// l / 4; of A (16x16), C and D (16x8) and B (8x16, its columns as rows) such quarters.

void ldmatrix_x4(uint32_t* r, const void* row, bool trans, Site site) {
  const Where where{nullptr, site};
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("gives ldmatrix a misaligned row", where);
  check(row, 16, Access::read, where);
  Ldmatrix self{static_cast<const uint16_t*>(row), r, trans};
  meet(FULL, "ldmatrix", true, site, &self, [](const Collective& collective) {
    for_each_lane(FULL, [&](int lane) {
      const auto& mine = slot<Ldmatrix>(collective, lane);
      const int first = lane % 4 * 2, second = first + 1, other = lane / 4;
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int i, int j) {
          return slot<Ldmatrix>(collective, matrix * 8 + i).row[j];
        };
        mine.r[matrix] = mine.trans ? pair(element(first, other), element(second, other))
                                    : pair(element(other, first), element(other, second));
      }
    });
  });
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, ToFloat to_float, Site site) {
  Mma self{d, a, b, to_float};
  meet(FULL, "mma", true, site, &self, [](const Collective& collective) {
    const ToFloat to_float = slot<Mma>(collective, 0).to_float;
    float a[16][16], b[8][16];
    for_each_lane(FULL, [&](int lane) {
      const auto& mine = slot<Mma>(collective, lane);
      const int row = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) {  // registers: upper left, lower left, upper right, lower right
        a[row + i / 2 % 2 * 8][column + i % 2 + i / 4 * 8] = to_float(half_of(mine.a, i));
      }
      for (int i = 0; i < 4; ++i) {
        b[row][column + i % 2 + i / 2 * 8] = to_float(half_of(mine.b, i));
      }
    });
    for_each_lane(FULL, [&](int lane) {
      const auto& mine = slot<Mma>(collective, lane);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) mine.d[i] += a[row][k] * b[column][k];
      }
    });
  });
}

}  // namespace cuda_on_cpu
