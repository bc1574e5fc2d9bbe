#include "stamps.h"

#include <algorithm>

namespace cuda_on_cpu {
namespace {

const Warp& warp_of_current() { return machine.warps[machine.current->warp()]; }

/// Whether a barrier that the current thread has passed lies behind that access.
bool ordered(const Stamp& stamp) {
  const Thread& self = *machine.current;
  if (stamp.who == NOBODY || stamp.who == self.number || stamp.clock < machine.clock) return true;
  if (stamp.who == SEVERAL || stamp.who == ATOMICS) return false;
  const int warp = stamp.who & OF_ONE_WARP ? stamp.who & ~OF_ONE_WARP : stamp.who / 32;
  return warp == self.warp() && stamp.warp_clock < warp_of_current().clock;
}

std::string name(uint16_t who) {
  if (who == SEVERAL) return "several threads";
  if (who == ATOMICS) return "an atomic operation";
  if (who & OF_ONE_WARP) return "threads of warp " + std::to_string(who & ~OF_ONE_WARP);
  const uint3& i = machine.threads[who].index;
  return "thread (" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " +
         std::to_string(i.z) + ")";
}

void must_be_ordered(const Stamp& stamp, const char* verb, const char* done,
                     const std::string& memory, const Where& where) {
  if (ordered(stamp)) return;
  fail(std::string(verb) + " " + memory + " that " + name(stamp.who) + " has " + done +
           ", with no barrier in between",
       where);
}

/// Whether the block that did it belongs to this launch and is not the current one.
bool by_another(uint32_t block) {
  return block > machine.blocks_before && block != machine.block_number;
}

}  // namespace

Stamp now() { return {machine.current->number, machine.clock, warp_of_current().clock}; }

void add_read(Accesses& accesses, const std::string& memory, const Where& where) {
  must_be_ordered(accesses.write, "reads", "written", memory, where);
  Stamp& read = accesses.read;
  const Stamp mine = now();
  if (ordered(read)) {
    read = mine;
    return;
  }
  const uint16_t warp = OF_ONE_WARP | static_cast<uint16_t>(machine.current->warp());
  const bool same_warp =
      read.who == warp || (read.who < OF_ONE_WARP && read.who / 32 == machine.current->warp());
  read = {same_warp ? warp : SEVERAL, mine.clock, mine.warp_clock};
}

void add_write(Accesses& accesses, const std::string& memory, const Where& where) {
  must_be_ordered(accesses.read, "writes", "read", memory, where);
  must_be_ordered(accesses.write, "writes", "written", memory, where);
  accesses.write = now();
  accesses.read = {};
}

void add_atomic(Accesses& accesses, const std::string& memory, const Where& where) {
  const bool first = accesses.write.who != ATOMICS || accesses.write.clock < machine.clock;
  if (first) add_write(accesses, memory, where);
  accesses.write.who = ATOMICS;
}

void Launched::add(size_t first, size_t size, Access access, const Where& where) {
  for (size_t i = first; i < first + size; ++i) {
    Byte& byte = bytes_[i];
    const bool atomics = access == Access::atomic && byte.accesses.write.who == ATOMICS;
    if (by_another(byte.writer) && !atomics) {
      fail(std::string(access == Access::read ? "reads " : "writes ") + name_ +
               " where another block of this launch writes it",
           where);
    }
    const bool read_elsewhere =
        by_another(byte.reader) || (byte.readers && byte.reader > machine.blocks_before);
    if (access != Access::read && read_elsewhere) {
      fail("writes " + name_ + " where another block of this launch reads it", where);
    }
    if (std::max(byte.writer, byte.reader) != machine.block_number) {
      byte.accesses = {};
      if (atomics) byte.accesses.write.who = ATOMICS;
    }
    if (access == Access::read) {
      add_read(byte.accesses, name_, where);
      byte.readers = read_elsewhere;
      byte.reader = machine.block_number;
      continue;
    }
    access == Access::write ? add_write(byte.accesses, name_, where)
                            : add_atomic(byte.accesses, name_, where);
    byte.writer = machine.block_number;
  }
}

}  // namespace cuda_on_cpu
