// What only the host can tell or do: whether buffers have changed, which OpenMP serves the process,
// and pages.
#include <dlfcn.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../resnet_fast.h"

namespace resnet_fast::cpu {
namespace {

/// A multiply-and-fold hash of 8-byte words. Words go to eight independent chains in turn, so that
/// the loads, most of them cache misses, and the multiplications overlap.
struct Hash {
  static constexpr int CHAINS = 8;
  uint64_t chain[CHAINS] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb,
                            0xd6e8feb86659fd93, 0xa0761d6478bd642f, 0xe7037ed1a0b428db,
                            0x8ebc6af09c88c6e3, 0x589965cc75374cc3};

  static uint64_t mix(uint64_t state, uint64_t word) {
    const uint64_t product = (state ^ word) * 0x9fb21c651e98df25;
    return product ^ product >> 32;
  }

  void add(int i, uint64_t word) { chain[i] = mix(chain[i], word); }

  uint64_t value() const {
    uint64_t state = chain[0];
    for (int i = 1; i < CHAINS; ++i) state = mix(state, chain[i]);
    return state;
  }
};

uint64_t word_at(const char* p, int64_t nbytes = 8) {
  uint64_t word = 0;
  std::memcpy(&word, p, nbytes);
  return word;
}

/// The line at `p` will be read soon. Any address will do: nothing is read that does not exist.
inline void ask_for(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}

constexpr int64_t LINE = 64;
/// Sampled words that are on their way while one is hashed: each is a miss, most of the TLB, too.
constexpr size_t AHEAD = 24;

/// Every byte of a span. Meanwhile its neighbour `next`, if there is one, is asked for line by
/// line.
void add_whole(Hash& hash, const Span& span, const Span* next) {
  const char* p = static_cast<const char*>(span.address);
  const int64_t words = span.nbytes / 8, tail = span.nbytes % 8;
  hash.add(0, static_cast<uint64_t>(span.nbytes));
  int64_t asked = 0;
  const auto ask = [&](int64_t bytes) {
    for (; next && asked < bytes && asked < next->nbytes; asked += LINE) {
      ask_for(static_cast<const char*>(next->address) + asked);
    }
  };
  int64_t i = 0;
  for (; i + Hash::CHAINS <= words; i += Hash::CHAINS) {
    ask(8 * i + 2 * LINE);
    for (int c = 0; c < Hash::CHAINS; ++c) hash.add(c, word_at(p + 8 * (i + c)));
  }
  for (; i < words; ++i) hash.add(0, word_at(p + 8 * i));
  if (tail > 0) hash.add(2, word_at(p + 8 * words, tail));
  ask(std::numeric_limits<int64_t>::max());
}

}  // namespace

Fingerprint::Fingerprint(const std::vector<Span>& spans, int64_t whole, int64_t stride) {
  if (stride < LINE || stride % LINE != 0) {
    throw std::invalid_argument("stride: found " + std::to_string(stride) +
                                ", supported are multiples of 64");
  }
  for (const Span& span : spans) {
    if (span.nbytes <= whole) {
      whole_.push_back(span);
      continue;
    }
    lengths_ = Hash::mix(lengths_, static_cast<uint64_t>(span.nbytes));
    const char* p = static_cast<const char*>(span.address);
    // Not the same line of each stretch: those would share a few sets of the caches.
    int64_t line = 0;
    for (int64_t begin = 0; begin < span.nbytes;
         begin += stride, line = (line + 9) % (stride / LINE)) {
      sampled_.push_back(p + std::min(begin + line * LINE, span.nbytes - 8));
    }
    sampled_.push_back(p + span.nbytes - 8);
  }
}

uint64_t Fingerprint::part(int64_t index) const {
  const auto cut = [=](size_t size, int64_t i) { return size * static_cast<size_t>(i) / PARTS; };
  const size_t first = cut(sampled_.size(), index), last = cut(sampled_.size(), index + 1);
  const size_t begin = cut(whole_.size(), index), end = cut(whole_.size(), index + 1);
  Hash hash;
  for (size_t i = first; i < std::min(first + AHEAD, last); ++i) ask_for(sampled_[i]);
  for (size_t i = begin; i < end; ++i) {
    add_whole(hash, whole_[i], i + 1 < end ? &whole_[i + 1] : nullptr);
  }
  for (size_t i = first; i < last; ++i) {
    if (i + AHEAD < last) ask_for(sampled_[i + AHEAD]);
    hash.add(static_cast<int>(i % Hash::CHAINS), word_at(sampled_[i]));
  }
  return hash.value();
}

uint64_t Fingerprint::value() const {
  uint64_t parts[PARTS];
  // Below some microseconds of work the threads would cost more than they save.
#pragma omp parallel for schedule(static) if (sampled_.size() + 8 * whole_.size() > 1024)
  for (int64_t i = 0; i < PARTS; ++i) parts[i] = part(i);
  uint64_t state = lengths_;
  for (const uint64_t value : parts) state = Hash::mix(state, value);
  return state;
}

void lerp(float* a, const float* b, int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) {
    // As torch's lerp: exact at both ends.
    const float step = b[i] - a[i];
    a[i] = factor < 0.5f ? a[i] + factor * step : b[i] - step * (1.0f - factor);
  }
}

int64_t huge_pages(const Span& span) {
  // MADV_COLLAPSE, Linux 6.1: at once, and without a mark on what lies there later.
  constexpr int COLLAPSE = 25;
  constexpr uintptr_t SIZE = uintptr_t{1} << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(span.address);
  const uintptr_t first = (address + SIZE - 1) / SIZE * SIZE;
  const uintptr_t last = (address + static_cast<uintptr_t>(span.nbytes)) / SIZE * SIZE;
  int64_t done = 0;
#if defined(__linux__)
  for (uintptr_t page = first; page < last; page += SIZE) {
    if (madvise(reinterpret_cast<void*>(page), SIZE, COLLAPSE) != 0) break;
    done += SIZE;
  }
#endif
  return done;
}

OpenMP openmp_info() {
  Dl_info library;
  // The pointer dispatches through the dynamic linker, so it names the runtime that was bound.
  const bool found = dladdr(reinterpret_cast<const void*>(&omp_get_max_threads), &library) != 0;
  return {omp_get_max_threads(), found && library.dli_fname ? library.dli_fname : "unknown"};
}

}  // namespace resnet_fast::cpu
