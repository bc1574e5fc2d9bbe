// What kernels may access, byte by byte. The compiler announces every load and store (the calls
// that -fsanitize=thread inserts), and misaligned pointers and indices off an array's end
// (-fsanitize=alignment,bounds); the functions that it calls for that stand at the end.
//
// Each byte of shared memory and of what kernels write remembers who wrote it last, and who has
// read it since (stamps.h): accesses of two threads with no barrier in between are faults, and so
// is reading shared memory that nobody wrote in this block.
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "stamps.h"

namespace cuda_on_cpu {
namespace {

struct Byte {
  enum : uint8_t { EMPTY, COPYING, WRITTEN };
  uint32_t block = 0;  // in another block, this byte is empty
  uint8_t content = EMPTY;
  Accesses accesses;
};

struct SharedSpace {
  uintptr_t begin = 0;
  std::vector<Byte> bytes;

  uintptr_t end() const { return begin + bytes.size(); }
};

constexpr size_t DYNAMIC_SHARED = size_t{228} << 10;
const std::string SHARED = "shared memory";

std::vector<Operand> operands;
std::vector<Launched> launched;  // of each operand
std::vector<Operand> arrays;     // static shared arrays, by address
SharedSpace static_shared;
uintptr_t module_base;
std::vector<Stack> constants;  // what this module's file holds: tables, literals
std::string module_path;

SharedSpace& dynamic_space() {
  static SharedSpace space = [] {
    static const std::unique_ptr<char[]> memory(new char[DYNAMIC_SHARED + 1024]);
    SharedSpace result;
    result.begin = (reinterpret_cast<uintptr_t>(memory.get()) + 1023) / 1024 * 1024;
    result.bytes.resize(DYNAMIC_SHARED);
    return result;
  }();
  return space;
}

void must_be_written(const Byte& byte, const Where& where) {
  if (byte.content == Byte::EMPTY) {
    fail("reads shared memory that no thread of this block has written", where);
  }
  if (byte.content == Byte::COPYING) {
    fail("reads shared memory before its cp.async was waited for", where);
  }
}

void check_shared(SharedSpace& space, uintptr_t begin, size_t size, Access access,
                  const Where& where) {
  for (size_t i = begin - space.begin; i < begin - space.begin + size; ++i) {
    Byte& byte = space.bytes[i];
    if (byte.block != machine.block_number) {
      byte = {};
      byte.block = machine.block_number;
    }
    if (access == Access::read) {
      must_be_written(byte, where);
      add_read(byte.accesses, SHARED, where);
    } else if (access == Access::write) {
      add_write(byte.accesses, SHARED, where);
      byte.content = Byte::WRITTEN;
    } else {
      must_be_written(byte, where);
      add_atomic(byte.accesses, SHARED, where);
    }
  }
}

/// The shared memory that holds all of these bytes, or null.
SharedSpace* shared_space(uintptr_t begin, size_t size) {
  SharedSpace& dynamic = dynamic_space();
  if (begin >= dynamic.begin && begin + size <= dynamic.begin + machine.launch.dynamic_shared) {
    return &dynamic;
  }
  if (begin < static_shared.begin || begin + size > static_shared.end()) return nullptr;
  const auto after = std::upper_bound(arrays.begin(), arrays.end(), begin,
                                      [](uintptr_t p, const Operand& a) { return p < a.begin; });
  const bool inside = after != arrays.begin() && begin + size <= std::prev(after)->end;
  return inside ? &static_shared : nullptr;
}

bool may_read(uintptr_t begin, size_t size) {
  const auto holds = [=](uintptr_t first, size_t bytes) {
    return begin >= first && begin + size <= first + bytes;
  };
  if (holds(reinterpret_cast<uintptr_t>(&indices), sizeof indices) ||
      holds(reinterpret_cast<uintptr_t>(machine.launch.arguments), machine.launch.arguments_size)) {
    return true;
  }
  return std::any_of(constants.begin(), constants.end(),
                     [&](const Stack& part) { return holds(part.begin, part.size); });
}

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates";
}

/// "reads 4 bytes, 0 bytes past the end of y (28 bytes)": by the nearest operand.
std::string out_of_bounds(uintptr_t begin, size_t size, Access access) {
  std::vector<Operand> known = operands;
  known.insert(known.end(), arrays.begin(), arrays.end());
  if (machine.launch.dynamic_shared) {
    const uintptr_t p = dynamic_space().begin;
    known.push_back({p, p + machine.launch.dynamic_shared, "the dynamic shared memory", true});
  }
  const auto distance = [=](const Operand& o) {
    return begin + size > o.end ? begin + size - o.end : o.begin > begin ? o.begin - begin : 0;
  };
  std::string text = std::string(verb(access)) + " " + std::to_string(size) + " bytes ";
  const auto nearest = std::min_element(
      known.begin(), known.end(),
      [&](const Operand& a, const Operand& b) { return distance(a) < distance(b); });
  if (nearest == known.end() || distance(*nearest) > (uintptr_t{1} << 20)) {
    char address[32];
    std::snprintf(address, sizeof address, "%#zx", static_cast<size_t>(begin));
    return text + "at " + address + ", far from every operand";
  }
  const std::string of =
      nearest->name + " (" + std::to_string(nearest->end - nearest->begin) + " bytes)";
  if (begin < nearest->begin) {
    return text + "that begin " + std::to_string(nearest->begin - begin) + " before " + of;
  }
  return text + "at offset " + std::to_string(begin - nearest->begin) + " of " + of;
}

}  // namespace

void check(const void* p, size_t size, Access access, const Where& where) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  const Operand* holder = nullptr;
  for (const Operand& operand : operands) {
    if (begin < operand.begin || begin + size > operand.end) continue;
    if (operand.writable) {
      launched[&operand - operands.data()].add(begin - operand.begin, size, access, where);
      return;
    }
    if (access == Access::read) return;
    holder = &operand;
  }
  if (holder) fail(std::string(verb(access)) + " the input " + holder->name, where);
  if (SharedSpace* space = shared_space(begin, size)) {
    check_shared(*space, begin, size, access, where);
  } else if (access != Access::read || !may_read(begin, size)) {
    fail(out_of_bounds(begin, size, access), where);
  }
}

void check_host_write(const void* p, size_t size) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (const Operand& operand : operands) {
    if (operand.writable && begin >= operand.begin && begin + size <= operand.end) return;
  }
  if (size) throw Fault("cudaMemsetAsync " + out_of_bounds(begin, size, Access::write));
}

void begin_copy(const void* smem, size_t size, const Where& where) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(smem);
  SharedSpace* space = shared_space(begin, size);
  if (!space)
    fail("copies to what is not shared memory: " + out_of_bounds(begin, size, Access::write),
         where);
  check_shared(*space, begin, size, Access::write, where);
  for (size_t i = 0; i < size; ++i) {
    space->bytes[begin - space->begin + i].content = Byte::COPYING;
  }
}

void end_copy(const void* smem, size_t size) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(smem);
  SharedSpace* space = shared_space(begin, size);
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = space->bytes[begin - space->begin + i];
    byte.content = Byte::WRITTEN;
    byte.accesses.write = now();
  }
}

void* dynamic_shared() { return reinterpret_cast<void*>(dynamic_space().begin); }

void set_operands(std::vector<Operand> list) {
  operands = std::move(list);
  launched.clear();
  for (const Operand& operand : operands) launched.emplace_back(operand);
}

void set_shared_arrays(const std::vector<SharedArray>& list) {
  constants.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const auto own = reinterpret_cast<uintptr_t>(&operands);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
          if (part.p_type != PT_LOAD || own < begin || own >= begin + part.p_memsz) continue;
          module_base = info->dlpi_addr;
          module_path = info->dlpi_name;
          for (int j = 0; j < info->dlpi_phnum; ++j) {
            const auto& held = info->dlpi_phdr[j];
            if (held.p_type == PT_LOAD) {
              constants.push_back({info->dlpi_addr + held.p_vaddr, held.p_filesz});
            }
          }
          return 1;
        }
        return 0;
      },
      nullptr);
  arrays.clear();
  for (const SharedArray& array : list) {
    const uintptr_t begin = module_base + array.offset;
    arrays.push_back({begin, begin + array.size, array.name, true});
  }
  if (arrays.empty()) return;
  std::sort(arrays.begin(), arrays.end(),
            [](const Operand& a, const Operand& b) { return a.begin < b.begin; });
  static_shared.begin = arrays.front().begin;
  static_shared.bytes.assign(arrays.back().end - arrays.front().begin, {});
}

std::string describe_code(const void* pc, bool function_only) {
  // A return address is behind its call, which may end a line.
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pc) - module_base - !function_only;
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -Cfips -e '%s' %#zx 2>/dev/null",
                module_path.c_str(), static_cast<size_t>(offset));
  std::string text;
  if (FILE* output = popen(command, "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, output)) {
      line[std::strcspn(line, "\n")] = 0;
      if (char* noise = std::strstr(line, " (discriminator")) *noise = 0;
      text += std::string("  at ") + line + "\n";
    }
    pclose(output);
  }
  const auto replace = [&](const std::string& from, const char* to) {
    for (size_t at; (at = text.find(from)) != std::string::npos;) text.replace(at, from.size(), to);
  };
  replace("resnet_fast::cuda::", "");
  replace("(anonymous namespace)::", "");
  replace("at  (inlined by) ", "at ");
  replace("at void ", "at ");
  if (!text.empty()) text.pop_back();
  return function_only && text.size() > 5 ? text.substr(5, text.find('(') - 5) : text;
}

}  // namespace cuda_on_cpu

// ---- What the compiler calls

using cuda_on_cpu::Access;

namespace {

inline void access(const void* p, size_t size, Access kind, const void* pc) {
  // Locals and the host's code: no question, and most of the calls.
  if (reinterpret_cast<uintptr_t>(p) - cuda_on_cpu::stack.begin < cuda_on_cpu::stack.size) return;
  if (!cuda_on_cpu::machine.current) return;
  cuda_on_cpu::check(p, size, kind, {pc});
}

/// -fsanitize=alignment and bounds: where in the source, in the compiler's layout.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  uint8_t log_alignment, kind;
};

struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};

[[noreturn]] void undefined(const std::string& what, const void* pc) {
  cuda_on_cpu::fail(what, {pc});
}

}  // namespace

#define CALLED extern "C" __attribute__((visibility("hidden")))
#define PC __builtin_extract_return_addr(__builtin_return_address(0))
#define ACCESSES(size)                                                                      \
  CALLED void __tsan_read##size(void* p) { access(p, size, Access::read, PC); }             \
  CALLED void __tsan_write##size(void* p) { access(p, size, Access::write, PC); }           \
  CALLED void __tsan_unaligned_read##size(void* p) { access(p, size, Access::read, PC); }   \
  CALLED void __tsan_unaligned_write##size(void* p) { access(p, size, Access::write, PC); } \
  CALLED void __tsan_volatile_read##size(void* p) { access(p, size, Access::read, PC); }    \
  CALLED void __tsan_volatile_write##size(void* p) { access(p, size, Access::write, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
CALLED void __tsan_read_range(void* p, size_t size) { access(p, size, Access::read, PC); }
CALLED void __tsan_write_range(void* p, size_t size) { access(p, size, Access::write, PC); }
CALLED void __tsan_vptr_update(void**, void*) {}
CALLED void __tsan_func_entry(void*) {}
CALLED void __tsan_func_exit() {}
CALLED void __tsan_init() {}

CALLED [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* at, void* p) {
  undefined("accesses a " + std::string(at->type->name) + " at an address that is " +
                std::to_string(reinterpret_cast<uintptr_t>(p) % (1u << at->log_alignment)) +
                " bytes off its alignment, " + std::to_string(1u << at->log_alignment),
            PC);
}

CALLED [[noreturn]] void __ubsan_handle_out_of_bounds_abort(OutOfBounds* at, void* index) {
  undefined("takes element " + std::to_string(reinterpret_cast<intptr_t>(index)) + " of a " +
                std::string(at->array->name),
            PC);
}

CALLED [[noreturn]] void __ubsan_handle_divrem_overflow_abort(void*, void*, void*) {
  undefined("divides by zero", PC);
}
