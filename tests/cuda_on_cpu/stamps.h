// Who accessed a byte last, and when by the barriers of the block and of the warp: what orders two
// accesses, and what does not.
#pragma once

#include "machine.h"

namespace cuda_on_cpu {

// Numbers of threads are below 1024. Besides them an access may be by:
constexpr uint16_t NOBODY = 0xffff;
constexpr uint16_t SEVERAL = 0xfffe;      // threads of more than one warp
constexpr uint16_t ATOMICS = 0xfffd;      // any number of threads
constexpr uint16_t OF_ONE_WARP = 0x8000;  // several threads; the warp's number in the low bits

/// An access, and when it was by the block's barriers and by the warp's.
struct Stamp {
  uint16_t who = NOBODY;
  uint32_t clock = 0;
  uint32_t warp_clock = 0;
};

/// The last write of a byte, and who has read it since: accesses of one block.
struct Accesses {
  Stamp write, read;
};

/// Records the current thread's access, or fails where nothing orders it behind those before it.
/// `memory`: what the fault calls it.
void add_read(Accesses& accesses, const std::string& memory, const Where& where);
void add_write(Accesses& accesses, const std::string& memory, const Where& where);
void add_atomic(Accesses& accesses, const std::string& memory, const Where& where);

/// The current thread's access, now.
Stamp now();

/// The same for the operands that kernels write. Between the blocks of a launch nothing orders two
/// accesses but that both are atomic.
class Launched {
 public:
  explicit Launched(const Operand& operand)
      : name_(operand.name), bytes_(operand.writable ? operand.end - operand.begin : 0) {}

  /// An access to `size` bytes from number `first` on.
  void add(size_t first, size_t size, Access access, const Where& where);

 private:
  struct Byte {
    uint32_t writer = 0, reader = 0;  // the last block of each kind
    bool readers = false;             // several blocks of this launch
    Accesses accesses;                // of the last block of both
  };

  std::string name_;
  std::vector<Byte> bytes_;
};

}  // namespace cuda_on_cpu
