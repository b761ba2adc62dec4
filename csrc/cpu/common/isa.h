// The choice of the instruction set. Kernels for all of them are linked in; each call picks one.
#pragma once

#include <cstdint>
#include <string>

namespace fastvdm {

// avx512_bf16: avx512 with bf16 products; amx: its larger products use tile registers.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The set in use: the best that the CPU and its operating system allow, or the one asked for.
Isa isa();
// name: auto | amx | avx512_bf16 | avx512 | avx2 | portable. Returns the name now in use; throws if
// the machine or this build lacks it.
std::string set_cpu_isa(std::string name);
std::string cpu_isa();
// Whether the CPU multiplies 16-bit floats natively; if not, oneDNN emulates them, several times
// slower than fp32.
bool cpu_has_native(bool bf16);

// The storage type of a tensor; arithmetic is always fp32.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// At least `bytes` of 64-byte aligned memory, which this thread may use until its next call.
void* scratch(int64_t bytes);

}  // namespace fastvdm

// Declares a kernel in the namespace of each instruction set, and picks the one in use. Only
// kernels that gain from bf16 instructions are compiled for avx512_bf16 and amx (BF16 in
// csrc/build.py); they are declared by FASTVDM_DECLARE_BF16. For the others these would duplicate
// the AVX-512 object.
#define FASTVDM_DECLARE_IN(isa, signature) \
  namespace isa {                          \
  signature;                               \
  }
#if FASTVDM_X86
#define FASTVDM_DECLARE(signature)        \
  FASTVDM_DECLARE_IN(portable, signature) \
  FASTVDM_DECLARE_IN(avx2, signature)     \
  FASTVDM_DECLARE_IN(avx512, signature)
#define FASTVDM_DECLARE_BF16(signature)      \
  FASTVDM_DECLARE(signature)                 \
  FASTVDM_DECLARE_IN(avx512_bf16, signature) \
  FASTVDM_DECLARE_IN(amx, signature)
#if FASTVDM_EMULATE_BF16  // the CPU may lack AVX-512
#define FASTVDM_BESIDE_BF16(fn) avx2::fn
#else
#define FASTVDM_BESIDE_BF16(fn) avx512::fn
#endif
#define FASTVDM_PICK_WITH(amx_fn, bf16_fn, fn)                    \
  (::fastvdm::isa() == ::fastvdm::Isa::amx           ? amx_fn     \
   : ::fastvdm::isa() == ::fastvdm::Isa::avx512_bf16 ? bf16_fn    \
   : ::fastvdm::isa() == ::fastvdm::Isa::avx512      ? avx512::fn \
   : ::fastvdm::isa() == ::fastvdm::Isa::avx2        ? avx2::fn   \
                                                     : portable::fn)
#define FASTVDM_PICK(fn) FASTVDM_PICK_WITH(FASTVDM_BESIDE_BF16(fn), FASTVDM_BESIDE_BF16(fn), fn)
#define FASTVDM_PICK_BF16(fn) FASTVDM_PICK_WITH(amx::fn, avx512_bf16::fn, fn)
#else
#define FASTVDM_DECLARE(signature) FASTVDM_DECLARE_IN(portable, signature)
#define FASTVDM_DECLARE_BF16 FASTVDM_DECLARE
#define FASTVDM_PICK(fn) (portable::fn)
#define FASTVDM_PICK_BF16 FASTVDM_PICK
#endif
