// Chooses the instruction set at run time, and manages the threads' scratch memory.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

#if FASTVDM_X86 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastvdm {
namespace {

// Whether the CPU multiplies bf16 tiles and the system saves them and lets this process use them.
bool has_amx() {
#if FASTVDM_X86 && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;  // xgetbv
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;  // amx-bf16, amx-tile
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

Isa best() {
#if FASTVDM_X86
  // __builtin_cpu_supports checks cpuid and, through xgetbv, that the system saves the registers.
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")))
    return Isa::portable;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni"))
      return Isa::avx512;
    static const bool amx = has_amx();
    return amx ? Isa::amx : Isa::avx512_bf16;
  }
  return Isa::avx2;
#else
  return Isa::portable;
#endif
}

std::atomic<int> current{-1};

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

bool allowed(Isa isa) {
#if FASTVDM_EMULATE_BF16
  if (isa >= Isa::avx512_bf16) return best() >= Isa::avx2;  // this build emulates them
#endif
  return isa <= best();
}

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
  for (int i = 0; i < 5; ++i) {
    if (name != kNames[i]) continue;
    if (!allowed(static_cast<Isa>(i)))
      throw std::runtime_error("this machine or build has no " + name + " path, only " +
                               kNames[static_cast<int>(best())] + " and below");
    current.store(i, std::memory_order_relaxed);
    return name;
  }
  throw std::runtime_error(
      "cpu isa must be auto, amx, avx512_bf16, avx512, avx2 or portable, got '" + name + "'");
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
