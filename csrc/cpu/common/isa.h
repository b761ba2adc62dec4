// Which instruction set runs. The kernels of every one are linked in; one is picked per call.
#pragma once

#include <cstdint>
#include <string>

namespace fastvdm {

// amx: avx512 with bf16 products on tile registers.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The set in force: the best that the CPU and its operating system allow, or the one asked for.
Isa isa();
// name: auto | amx | avx512 | avx2 | portable. Returns the name now in force; throws where the machine
// or this build lacks it.
std::string set_cpu_isa(std::string name);
std::string cpu_isa();
// Whether the CPU multiplies 16-bit floats itself; where not, oneDNN emulates them several times
// slower than fp32.
bool cpu_has_native(bool bf16);

// Storage of a tensor; arithmetic is always fp32.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// At least `bytes` of 64-byte aligned memory that belongs to this thread until its next call.
void* scratch(int64_t bytes);

}  // namespace fastvdm

// Declares a kernel in the namespace of each instruction set, and picks the one in force.
#if FASTVDM_X86
#define FASTVDM_DECLARE(signature) \
  namespace portable {             \
  signature;                       \
  }                                \
  namespace avx2 {                 \
  signature;                       \
  }                                \
  namespace avx512 {               \
  signature;                       \
  }                                \
  namespace amx {                  \
  signature;                       \
  }
#define FASTVDM_PICK(fn)                                 \
  (::fastvdm::isa() == ::fastvdm::Isa::amx      ? amx::fn    \
   : ::fastvdm::isa() == ::fastvdm::Isa::avx512 ? avx512::fn \
   : ::fastvdm::isa() == ::fastvdm::Isa::avx2   ? avx2::fn   \
                                                : portable::fn)
#else
#define FASTVDM_DECLARE(signature) \
  namespace portable {             \
  signature;                       \
  }
#define FASTVDM_PICK(fn) (portable::fn)
#endif
