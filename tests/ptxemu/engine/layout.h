// What the engine shares with decode.py, program.py, engine.py and findings.py.
#pragma once
#include <cstdint>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;

constexpr int LANES = 32;
constexpr u32 ALL = ~0u;           // every lane
constexpr u32 SHARED_BASE = 1024;  // where shared memory starts, so that address 0 is none of it

enum OperandKind { REGISTER, CONSTANT, SINK };
struct Operand {
  s32 kind, id, offset, width;
};
struct Instruction {
  s32 op, guard_offset, guard_id, guard_negated, destinations, sources, first, flags;
  s64 imm, imm2;
  s32 target, pad;
};
// Of an instruction: how often it was issued to a warp, lanes that ran it and that its guard kept
// from it; 32-byte sectors, wavefronts of shared memory and those without bank conflicts, bytes.
struct Statistics {
  u64 issued, lanes, masked, sectors, waves, bytes, conflict_free;
};
struct Allocation {
  u64 base, size;
  u32 grain, first_view, num_views, pad;
};
struct View {
  u64 base, size;
};
struct Report {
  s32 kind, pc, pc2, cta, warp, lane;
  u64 address, info, count;
};
struct Launch {
  const Instruction* code;
  const Operand* operands;
  const u8 *constants, *parameters;
  const Allocation* allocations;
  const View* views;
  Statistics* statistics;
  Report* reports;
  u64* touched;  // by allocation: bytes read, bytes written
  const s64* ctas;
  s64 num_ctas;
  s32 num_instructions, arena_bytes, num_registers, num_allocations, num_warps, shared_bytes,
      max_reports, num_reports, grid[3], seed, check, local_bytes;
};

// A tensor map, the innermost axis first.
constexpr u64 MAGIC = 0x7e5504de5c000001ull;
struct TensorMap {
  u64 magic, base;
  u32 rank, element, swizzle, fill;
  u64 extents[5], strides[4];
  u32 box[5];
};
static_assert(sizeof(TensorMap) <= 128);

enum Kind {
  OUT_OF_BOUNDS = 1,
  OUTSIDE_VIEW,
  MISALIGNED,
  SHARED_OUT_OF_BOUNDS,
  UNINITIALISED,
  RACE_SHARED,
  RACE_WARP,
  RACE_CTA,
  RACE_GRID,
  IN_FLIGHT,
  PROXY,
  ACCUMULATOR,
  DIVERGED,
  DEADLOCK,
  UNSUPPORTED,
  MBARRIER,
  SAME_VALUE,
  REFUSED,  // by descriptors.py
  OPERAND,
  PROXY_COPY
};

// Operations. alu: flags are function * 32 + type; setp: comparison * 32 + type.
// clang-format off
#define OPERATIONS(X)                                                                            \
  X(nop) X(mov32) X(mov64) X(movp) X(pack) X(unpack) X(tid) X(ctaid) X(laneid) X(warpid)         \
  X(ldparam) X(ldparam_s64) X(paramaddr) X(bra) X(ret) X(trap) X(barsync) X(warpsync) X(notp)    \
  X(andp) X(orp) X(xorp) X(selp32) X(selp64) X(shfl_bfly) X(shfl_idx) X(shfl_up) X(shfl_down)    \
  X(vote_any) X(vote_all) X(vote_ballot) X(redux) X(activemask) X(elect) X(ldg) X(stg) X(lds)    \
  X(sts) X(ldl) X(stl) X(cpasync) X(cpcommit) X(cpwait) X(cpwaitall) X(ldmatrix) X(stmatrix)     \
  X(mma_f16) X(mma_bf16) X(mma_tf32) X(mma_f64) X(wgmma) X(wgfence) X(wgcommit) X(wgwait)        \
  X(tmalloc) X(tmfree) X(tmld) X(tmst) X(tmwaitld) X(tmwaitst) X(tmmma) X(tmcommit)             \
  X(mbinit) X(mbinval) X(mbexpect) X(mbarrive) X(mbtry) X(tma) X(proxyfence) X(cvt)              \
  X(cvt_bf16x2_f32) X(cvt_f16x2_f32) X(prmt) X(lop3) X(shf_l) X(shf_r) X(bfe_u32) X(bfe_s32)     \
  X(bfi_b32) X(carry) X(popc_b32) X(clz_b32) X(brev_b32) X(alu) X(setp)
// clang-format on
enum Operation {
#define X(name) OP_##name,
  OPERATIONS(X)
#undef X
};
constexpr const char* OPERATION_NAMES[] = {
#define X(name) #name,
    OPERATIONS(X)
#undef X
};

// clang-format off
enum Type {
  U16, S16, U32, S32, U64, S64, F16, BF16, F32, F64, F16X2, BF16X2, U8, S8, TF32,
  F32X2
};
enum Function {
  ADD, SUB, MUL, MUL_HI, MUL_WIDE, MAD, MAD_WIDE, DIV, REM, MIN, MAX, ABS, NEG, AND, OR, XOR, NOT,
  SHL, SHR, FMA, EX2, LG2, RCP, SQRT, RSQRT, SIN, COS, TANH, COPYSIGN, MIN_NAN, MAX_NAN
};
// clang-format on
enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
