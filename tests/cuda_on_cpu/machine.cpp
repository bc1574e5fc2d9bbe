#include "machine.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "include/cuda_runtime_api.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(CUDA_ON_CPU_UCONTEXT)
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {

Machine machine;
Indices indices;
Stack stack;

namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_SIZE = size_t{64} << 10;
constexpr size_t PAGE = 4096;
constexpr size_t DEFAULT_SHARED = size_t{48} << 10;
constexpr int MULTIPROCESSORS = 4;

cudaError_t last_error = cudaSuccess;

std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

/// A thread's stack, above a page that traps. Tops differ in their low bits, or all stacks would
/// share the same few sets of the cache.
char* stack_of(unsigned thread) {
  static char* const stacks = [] {
    const size_t size = MAX_THREADS * (STACK_SIZE + PAGE);
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < MAX_THREADS; ++i) {
      mprotect(static_cast<char*>(p) + i * (STACK_SIZE + PAGE), PAGE, PROT_NONE);
    }
    return static_cast<char*>(p);
  }();
  return stacks + thread * (STACK_SIZE + PAGE) + PAGE;
}

std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

uint3 unflatten(unsigned i, const dim3& size) {
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

unsigned volume(const dim3& size) { return size.x * size.y * size.z; }

void yield() { machine.current->fiber.switch_to(machine.scheduler); }

void release_barrier() {
  machine.held = machine.holding;
  machine.waiting = machine.holding = 0;
  machine.first_at_barrier = nullptr;
  ++machine.clock;
  for (Thread& thread : machine.threads) {
    if (thread.state != State::at_barrier) continue;
    thread.state = State::ready;
    machine.warps[thread.warp()].ready |= 1u << thread.lane();
  }
}

/// Does the work of a collective for which nobody is missing any more.
bool finish(Warp& warp, size_t i) {
  const Collective collective = warp.pending[i];
  const unsigned needed = collective.whole_warp ? 0xffffffffu : collective.mask & warp.live;
  if (needed != collective.arrived) return false;
  warp.pending.erase(warp.pending.begin() + static_cast<ptrdiff_t>(i));
  collective.work(collective);
  Thread* lanes = &machine.threads[(&warp - machine.warps.data()) * 32];
  for (int lane = 0; lane < 32; ++lane) {
    if (!(collective.arrived >> lane & 1) || lanes[lane].state != State::in_collective) continue;
    lanes[lane].state = State::ready;
    warp.ready |= 1u << lane;
  }
  return true;
}

void thread_main() {
  machine.launch.body(machine.launch.arguments);
  Thread& self = *machine.current;
  Warp& warp = machine.warps[self.warp()];
  self.state = State::ended;
  warp.live &= ~(1u << self.lane());
  --machine.live;
  for (size_t i = 0; i < warp.pending.size();) i = finish(warp, i) ? 0 : i + 1;
  yield();
}

[[noreturn]] void throw_failure() {
  Thread* thread = machine.current;
  const std::string kernel = describe_code(machine.launch.kernel, true);
  std::string message = kernel + ": block " + text(indices.block) + ", thread " +
                        text(thread->index) + " " + machine.failure;
  if (machine.failed_at.site.file) {
    message += "\n  at " + text(machine.failed_at.site);
  } else if (machine.failed_at.pc) {
    message += "\n" + describe_code(machine.failed_at.pc, false);
  }
  throw Fault(message);
}

void resume(Thread& thread) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(stack_of(thread.number));
  stack = {low, STACK_SIZE};
  indices.thread = thread.index;
  machine.current = &thread;
  machine.scheduler.switch_to(thread.fiber);
  stack = {};
  if (!machine.failure.empty()) throw_failure();
  machine.current = nullptr;
}

/// Everybody waits, and nothing can happen any more.
[[noreturn]] void throw_deadlock() {
  Thread *at_barrier = nullptr, *in_collective = nullptr;
  for (Thread& thread : machine.threads) {
    if (thread.state == State::at_barrier && !at_barrier) at_barrier = &thread;
    if (thread.state == State::in_collective && !in_collective) in_collective = &thread;
  }
  machine.current = in_collective;
  machine.failure = std::string("waits for ever in ") + in_collective->waits_in;
  if (at_barrier) {
    machine.failure += ", while thread " + text(at_barrier->index) + " waits at the barrier in " +
                       text(at_barrier->waits_at.site);
  }
  machine.failed_at = in_collective->waits_at;
  throw_failure();
}

void run_warp(int number) {
  Warp& warp = machine.warps[number];
  while (warp.ready) {
    const int lane = machine.reversed ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    resume(machine.threads[number * 32 + lane]);
  }
}

void start_block(unsigned count) {
  ++machine.block_number;
  machine.clock = 0;
  machine.live = static_cast<int>(count);
  machine.waiting = machine.holding = 0;
  machine.first_at_barrier = nullptr;
  machine.threads.resize(count);
  machine.warps.resize((count + 31) / 32);
  for (Warp& warp : machine.warps) warp = {0, 0, 0, {}};
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = machine.threads[i];
    const size_t shift = i % 32 * 128;
    thread.number = static_cast<uint16_t>(i);
    thread.fiber.start(stack_of(i), STACK_SIZE - shift, thread_main);
    thread.state = State::ready;
    thread.index = unflatten(i, machine.launch.block);
    thread.open_copies.clear();
    thread.copy_groups.clear();
    machine.warps[thread.warp()].live |= 1u << thread.lane();
  }
  for (Warp& warp : machine.warps) warp.ready = warp.live;
}

void run_block() {
  const int warps = static_cast<int>(machine.warps.size());
  while (true) {
    for (int i = 0; i < warps; ++i) run_warp(machine.reversed ? warps - 1 - i : i);
    if (machine.live == 0) return;
    if (machine.waiting < machine.live) throw_deadlock();
    release_barrier();
  }
}

}  // namespace

void fail(const std::string& what, const Where& where) {
  if (!machine.current) {
    std::fprintf(stderr, "cuda_on_cpu: the host's code %s\n%s\n", what.c_str(),
                 where.pc ? describe_code(where.pc, false).c_str() : "");
    std::abort();
  }
  machine.failure = what;
  machine.failed_at = where;
  yield();  // for good: resume() throws
  std::abort();
}

void run(const Launch& launch) {
  if (machine.current) throw std::logic_error("cuda_on_cpu: a launch inside of a kernel");
  machine.launch = launch;
  machine.failure.clear();
  machine.blocks_before = machine.block_number;
  indices.block_size = launch.block;
  indices.grid_size = launch.grid;
  struct Leave {
    ~Leave() {
      machine.current = nullptr;
      stack = {};
    }
  } leave;
  const unsigned blocks = volume(launch.grid);
  for (unsigned i = 0; i < blocks; ++i) {
    indices.block = unflatten(machine.reversed ? blocks - 1 - i : i, launch.grid);
    start_block(volume(launch.block));
    run_block();
  }
}

int syncthreads(bool predicate, Site site) {
  Thread& self = *machine.current;
  if (Thread* first = machine.first_at_barrier) {
    const Site& other = first->waits_at.site;
    if (other.line != site.line || std::strcmp(other.file, site.file) != 0) {
      fail(
          "comes to a divergent barrier: thread " + text(first->index) + " waits in " + text(other),
          {nullptr, site});
    }
  } else {
    machine.first_at_barrier = &self;
  }
  self.waits_at = {nullptr, site};
  self.state = State::at_barrier;
  ++machine.waiting;
  machine.holding += predicate;
  yield();
  return machine.held;
}

void meet(unsigned mask, const char* name, bool whole_warp, Site site, void* slot,
          void (*work)(const Collective&)) {
  Thread& self = *machine.current;
  Warp& warp = machine.warps[self.warp()];
  if (!(mask >> self.lane() & 1)) {
    fail(std::string("comes to ") + name + " in whose mask it is not", {nullptr, site});
  }
  size_t i = 0;
  while (i < warp.pending.size() && warp.pending[i].mask != mask) ++i;
  if (i == warp.pending.size()) warp.pending.push_back({mask, 0, name, whole_warp, site, work, {}});
  Collective& collective = warp.pending[i];
  const bool elsewhere =
      collective.site.line != site.line || std::strcmp(collective.site.file, site.file) != 0;
  if (std::strcmp(collective.name, name) != 0 || (whole_warp && elsewhere)) {
    fail(std::string("comes to ") + name + " while other lanes wait in " + collective.name +
             " in " + text(collective.site),
         {nullptr, site});
  }
  collective.slots[self.lane()] = slot;
  collective.arrived |= 1u << self.lane();
  if (finish(warp, i)) return;
  self.waits_at = {nullptr, site};
  self.waits_in = name;
  self.state = State::in_collective;
  yield();
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > machine.shared_limit) {
    return last_error = cudaErrorInvalidValue;
  }
  shared_limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t check_configuration(const void* kernel, const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const auto limit = shared_limits().find(kernel);
  const size_t shared = limit == shared_limits().end() ? DEFAULT_SHARED : limit->second;
  const bool grid_fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff &&
                         grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = block.x > 0 && block.y > 0 && block.z > 0 && block.x <= MAX_THREADS &&
                          block.y <= MAX_THREADS && block.z <= 64 && volume(block) <= MAX_THREADS;
  if (!grid_fits || !block_fits) return last_error = cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > shared) return last_error = cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

// ---- CUDA's runtime

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace cuda_on_cpu;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(DEFAULT_SHARED);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = MULTIPROCESSORS;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(machine.shared_limit);
      return cudaSuccess;
  }
  return last_error = cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  cuda_on_cpu::check_host_write(p, size);
  std::memset(p, value, size);
  return cudaSuccess;
}
