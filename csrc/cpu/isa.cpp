// Run-time choice of the instruction set, and the threads' scratch memory.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace fastvdm {
namespace {

Isa best() {
#if FASTVDM_X86
  // __builtin_cpu_supports checks cpuid and, through xgetbv, that the system saves the registers.
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")))
    return Isa::portable;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  return Isa::avx2;
#else
  return Isa::portable;
#endif
}

std::atomic<int> current{-1};

const char* const kNames[] = {"portable", "avx2", "avx512"};

struct Arena {
  void* data = nullptr;
  int64_t size = 0;
  ~Arena() { std::free(data); }
};

}  // namespace

Isa isa() {
  int value = current.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int>(best());
    current.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

std::string set_cpu_isa(std::string name) {
  if (name == "auto") {
    current.store(static_cast<int>(best()), std::memory_order_relaxed);
    return kNames[static_cast<int>(isa())];
  }
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    if (i > static_cast<int>(best()))
      throw std::runtime_error("this machine or build has no " + name + " path, only " +
                               kNames[static_cast<int>(best())] + " and below");
    current.store(i, std::memory_order_relaxed);
    return name;
  }
  throw std::runtime_error("cpu isa must be auto, avx512, avx2 or portable, got '" + name +
                           "' (there is no AMX path yet)");
}

std::string cpu_isa() { return kNames[static_cast<int>(isa())]; }

bool cpu_has_native(bool bf16) {
#if FASTVDM_X86
  __builtin_cpu_init();
  return bf16 ? __builtin_cpu_supports("avx512bf16") : __builtin_cpu_supports("avx512fp16");
#else
  (void)bf16;
  return true;
#endif
}

void* scratch(int64_t bytes) {
  thread_local Arena arena;
  if (bytes > arena.size) {
    std::free(arena.data);
    arena.size = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    arena.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (arena.data == nullptr) throw std::bad_alloc();
    arena.size = rounded;
  }
  return arena.data;
}

}  // namespace fastvdm
