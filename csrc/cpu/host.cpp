// What only the host can tell or do: whether buffers have changed, which OpenMP serves the process,
// and pages.
#include <dlfcn.h>
#include <omp.h>
#include <sys/mman.h>

#include <cstring>

#include "../resnet_fast.h"

namespace resnet_fast::cpu {
namespace {

/// A multiply-and-fold hash of 8-byte words. Words go to four independent chains in turn, so that
/// the loads, most of them cache misses, and the multiplications overlap.
struct Hash {
  static constexpr int CHAINS = 4;
  uint64_t chain[CHAINS] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb,
                            0xd6e8feb86659fd93};

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

/// Every word of the first `words` that stands at a multiple of `step` words.
void add_words(Hash& hash, const char* p, int64_t words, int64_t step) {
  int64_t i = 0;
  for (; i + (Hash::CHAINS - 1) * step < words; i += Hash::CHAINS * step) {
    for (int c = 0; c < Hash::CHAINS; ++c) hash.add(c, word_at(p + 8 * (i + c * step)));
  }
  for (; i < words; i += step) hash.add(0, word_at(p + 8 * i));
}

}  // namespace

uint64_t fingerprint(const std::vector<Span>& spans, int64_t stride) {
  const int64_t step = stride < 16 ? 1 : stride / 8;
  Hash hash;
  for (const Span& span : spans) {
    const char* p = static_cast<const char*>(span.address);
    const int64_t words = span.nbytes / 8;
    const int64_t tail = span.nbytes % 8;
    hash.add(0, static_cast<uint64_t>(span.nbytes));
    add_words(hash, p, words, step);
    if (words > 0) hash.add(1, word_at(p + 8 * (words - 1)));
    if (tail > 0) hash.add(2, word_at(p + 8 * words, tail));
  }
  return hash.value();
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
