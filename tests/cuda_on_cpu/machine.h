// The machine that runs kernels: threads as fibers, one at a time, warp by warp, block after block.
// A fiber runs until it ends or must wait for others at a barrier or in a warp collective.
#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "include/cuda_on_cpu.h"

namespace cuda_on_cpu {

/// Something that a GPU would not forgive.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Where in the source: an address in the code, or a site if that is known.
struct Where {
  const void* pc = nullptr;
  Site site{nullptr, 0};
};

struct AsyncCopy {
  char* smem;
  const void* gmem;  // null: zeros
};

enum class State : uint8_t { ready, at_barrier, in_collective, ended };

struct Thread {
  Fiber fiber;
  State state;
  uint16_t number;  // in the block
  uint3 index;
  Where waits_at;
  const char* waits_in;
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;

  int warp() const { return number / 32; }
  int lane() const { return number % 32; }
};

/// Lanes that wait for the rest of their mask. The last one to come does the work for all.
struct Collective {
  unsigned mask, arrived;
  const char* name;
  bool whole_warp;
  Site site;
  void (*work)(const Collective&);
  void* slots[32];  // what each lane brought, on its stack
};

struct Warp {
  unsigned live, ready;
  uint32_t clock;  // syncwarps so far
  std::vector<Collective> pending;
};

struct Machine {
  Launch launch;
  Fiber scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* current = nullptr;                // none: the host's code runs
  bool reversed = false;                    // threads, warps and blocks from the last to the first
  size_t shared_limit = size_t{163} << 10;  // of a block: sm_80's; sm_90 has 227 KiB
  uint32_t block_number = 0;                // of all blocks of all launches
  uint32_t blocks_before = 0;               // this launch
  uint32_t clock;                           // barriers of this block so far
  int live, waiting, holding;
  Thread* first_at_barrier;
  int held;  // the predicates of the barrier last passed that held
  std::string failure;
  Where failed_at;
};
extern Machine machine;

/// Ends the launch: the fault names kernel, block, thread and the lines of source.
[[noreturn]] void fail(const std::string& what, const Where& where);

/// The current lane meets the others of `mask`, but for those that have ended. `whole_warp`: none
/// of the 32 may be missing, and all must come from the same line.
void meet(unsigned mask, const char* name, bool whole_warp, Site site, void* slot,
          void (*work)(const Collective&));

// ---- Memory

enum class Access : uint8_t { read, write, atomic };

/// Fails unless the current thread may access these bytes now.
void check(const void* p, size_t size, Access access, const Where& where);

/// The same for the host's code that hands bytes to the device: throws.
void check_host_write(const void* p, size_t size);

/// An asynchronous copy into these bytes of shared memory begins, or has ended.
void begin_copy(const void* smem, size_t size, const Where& where);
void end_copy(const void* smem, size_t size);

struct Operand {
  uintptr_t begin, end;
  std::string name;
  bool writable;
};

/// What kernels may access until further notice.
void set_operands(std::vector<Operand> operands);

/// Finds this module in memory, and in it the shared arrays: offset, size and name of each.
struct SharedArray {
  uintptr_t offset;
  size_t size;
  std::string name;
};
void set_shared_arrays(const std::vector<SharedArray>& arrays);

/// The range of addresses of the current thread's stack, empty while the host's code runs.
struct Stack {
  uintptr_t begin;
  size_t size;
};
extern Stack stack;

/// The source line of an address in this module's code, with what was inlined there.
std::string describe_code(const void* pc, bool function_only);

}  // namespace cuda_on_cpu
