// One multiprocessor: CTA after CTA, its warps in lockstep from barrier to barrier.
#pragma once
#include <algorithm>
#include <map>
#include <random>
#include <tuple>
#include <limits>
#include <vector>

#include "numbers.h"

// Who last wrote and read a byte of shared memory, in which epoch (between barriers of the CTA) and
// at which bar.warp.sync. ``proxy``: 0 a thread, 1 TMA, 2 cp.async.
struct Shadow {
  u32 w_epoch, w_sync, w_pc, w_fence, r_epoch, r_sync, r_pc;
  u16 w_tid, r_tid, barrier;
  u8 proxy, defined, in_flight, readers;  // readers: 1 several lanes of a warp, 2 several warps
  u32 phase;                              // of ``barrier``, at which TMA's copy arrives
  u16 reading;                            // by wgmma in flight
};
// The same of a grain of global memory. CTAs are counted from 1; SEVERAL read it.
constexpr u32 SEVERAL = ~0u;
struct GlobalShadow {
  u32 w_cta, r_cta, w_epoch, w_pc, r_pc, r_epoch;
  u16 w_tid, r_tid;
};

struct Copy {  // cp.async
  u32 to, size;
  u8 data[16];
  u16 tid;
  u32 pc;
};
using CopyGroup = std::vector<Copy>;
struct BulkCopy {  // TMA
  TensorMap map;
  s32 at[5];
  u32 to, bytes;
  s32 pc, warp;
};
struct MatrixGroup {                        // wgmma or tcgen05.mma, up to a commit
  std::vector<s32> accumulators, operands;  // registers; of tcgen05 cells of tensor memory
  std::vector<std::pair<u32, u32>> reads;
};
struct MBarrier {
  s32 count = 0, pending = 0, index = 0;
  s64 expected = 0;
  u32 phase = 0, asked = 0;  // asked: warps that did in this phase
  std::vector<BulkCopy> queue;
  std::vector<MatrixGroup> commits;
  bool idle() const { return queue.empty() && commits.empty(); }
};
// 32 bits of tensor memory: its value, whether it was written, by which warp that has not waited for
// its store yet, and how many tcgen05.mma in flight use it.
constexpr u32 TENSOR_LANES = 128, TENSOR_COLUMNS = 512;
struct Cell {
  u32 value = ALL;
  bool defined = false;
  u8 storing = 0;
  u16 busy = 0;
};

enum State { RUNNING, AT_BARRIER, AT_MBARRIER, DONE };
enum Pending : u8 { FREE, ACCUMULATES, FEEDS };  // a register and wgmma in flight
struct Warp {
  std::vector<u8> arena, local, pending;
  std::vector<u32> defined, high;  // by register, a bit a lane; of 64 bits: the halves
  s32 index = 0, pc = 0, lane_pc[LANES];
  u32 live = ALL, sync = 1, fence = 0, fence_epoch = 0, carry = 0;
  bool diverged = false;
  State state = RUNNING;
  std::vector<CopyGroup> copies;
  CopyGroup open_copies;
  std::vector<MatrixGroup> matrices;
  MatrixGroup open_matrices;
  std::vector<s32> loading;   // registers, from tensor memory
  std::map<u32, u32> waited;  // by barrier: the phase whose end this warp has waited for
};

class Machine {
 public:
  explicit Machine(Launch& launch);
  ~Machine();
  void run();

 private:
  Launch& launch;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<Shadow> shadow;
  std::vector<GlobalShadow*> global;
  std::map<u32, MBarrier> barriers;
  std::vector<Cell> tensor;  // lane by column; empty before sm_100
  u32 columns = 0;           // allocated
  MatrixGroup open_tensor;
  std::map<std::tuple<int, int, int>, int> seen;
  std::mt19937 random;
  u32 epoch = 1, order = 0;  // order: of this CTA among those that ran
  s64 cta = 0;
  s32 cta_at[3], barrier_count = 0, last_allocation = 0;
  bool stop = false;
  u64 events = 0;  // phases of barriers that ended

  // The instruction at hand: its warp, its active lanes.
  Warp* w = nullptr;
  const Instruction* I = nullptr;
  Statistics* st = nullptr;
  u32 m = 0;

  // machine.h
  void report(int kind, int pc2 = -1, int lane = 0, u64 address = 0, u64 info = 0);
  void fail(int kind, u64 info = 0) { report(kind, -1, 0, 0, info), stop = true; }
  bool active(int lane) const { return m >> lane & 1; }
  u16 tid(int lane) const { return u16(w->index * LANES + lane); }
  const Operand& to(int k) const { return launch.operands[I->first + k]; }
  const Operand& of(int k) const { return launch.operands[I->first + I->destinations + k]; }
  const u8* raw(int k) const;
  template <class T>
  const T* source(int k) const {
    return (const T*)raw(k);
  }
  u64 wide_source(int k, int lane) const;
  u32 half_defined(int k, bool high) const;
  u32 defined(int k) const { return half_defined(k, false) & half_defined(k, true); }
  u32 all_defined() const;
  void check_defined(int k, u32 lanes, int pc2);
  template <class T>
  void put(int k, const T* values, u32 defined);
  template <class T, class F>
  void map(int sources, F of_lane);
  void put_lanes(int k, const u64* values, u32 defined) { put_lanes(k, values, defined, defined); }
  void put_lanes(int k, const u64* values, u32 low, u32 high);
  void put_predicate(int k, u32 value, u32 defined);
  void set_defined(const Operand& o, u32 lanes, u32 low, u32 high);

  // memory.h
  bool shared_ok(u32 address, u32 bytes, int lane);
  void note_read(u32 address, u32 bytes, int lane, bool by_wgmma = false);
  void note_write(u32 address, u32 bytes, int lane, const u8* data, int proxy = 0);
  void bank_waves(const u32* address, u32 lanes, int width);
  u8* global_at(u64 address, u32 bytes, int lane, bool write, int& which);
  void note_global_read(u64 address, u32 bytes, int lane, int which);
  void note_global_write(u64 address, u32 bytes, int lane, int which, const u8* data);
  void count_sectors(const u64* address, u32 lanes, u32 bytes);
  u64 gather(int first, int count, int element, int lane, u8* buffer);
  void load_global();
  void store_global();
  void load_shared();
  void store_shared();
  void local_memory(bool load);

  // copies.h
  void copy_async();
  void wait_copies(size_t keep);
  MBarrier* barrier_at(u32 address, int lane, int info);
  void init_barrier();
  void end_barrier();
  void arrive();
  bool try_wait();
  void bulk_copy();
  void finish_bulk(MBarrier& barrier);
  void finish_bulk_element(const BulkCopy& copy, const MBarrier& barrier, u64 row, u32 column);
  void settle(MBarrier& barrier);

  // matrices.h
  void load_matrix();
  void store_matrix();
  void mma(int format);
  void wgmma();
  f64 shared_element(u32 address, bool& undefined, f32 (*format)(u32), int bytes,
                     MatrixGroup& group);
  void release(const MatrixGroup& done);
  void wait_matrices(size_t keep);
  bool makes_pair() const;
  void check_pending();

  // tensor.h
  void allocate_columns();
  Cell* cell_at(u32 lane, u32 column);
  void tensor_access(bool load);
  void wait_tensor(bool loads);
  void tensor_mma();
  f64 tensor_element(u32 lane, u32 column, int k, f32 (*format)(u32), int bytes, bool& undefined);
  void commit_tensor();
  void finish_commits(MBarrier& barrier);

  // arithmetic.h
  void alu();
  template <class T>
  void alu_integer(int function);
  template <class T>
  void alu_float(int function);
  void alu_pair(int function);
  void alu_half(int function, bool packed, bool bf16);
  template <class T>
  void compare(int comparison);
  void convert();
  void convert_pair(u16 (*round)(f32));
  void select_bits();
  void add_carry();

  // lanes.h
  void shuffle();
  void reduce();

  // engine.cpp
  bool step();
  u32 next_lanes();
  bool execute();
  bool branch(u32 lanes, s32 next);
  bool advance(s32 next, u32 lanes);
  void moves();
  void start_cta(s64 linear, u32 nth);
  void run_cta();
};

// -- reports and operands -------------------------------------------------------------------------

// Once for each kind and pair of instructions.
inline void Machine::report(int kind, int pc2, int lane, u64 address, u64 info) {
  int pc = w ? w->pc : 0;
  auto key = std::make_tuple(kind, pc, pc2);
  if (auto it = seen.find(key); it != seen.end()) {
    if (it->second >= 0) launch.reports[it->second].count++;
    return;
  }
  int n = launch.num_reports < launch.max_reports ? launch.num_reports++ : -1;
  seen[key] = n;
  if (n >= 0)
    launch.reports[n] = {kind, pc, pc2, s32(cta), w ? w->index : -1, lane, address, info, 1};
}

inline const u8* Machine::raw(int k) const {
  const Operand& o = of(k);
  return o.kind == CONSTANT ? launch.constants + o.offset : w->arena.data() + o.offset;
}
inline u64 Machine::wide_source(int k, int lane) const {
  return of(k).width == 8 ? source<u64>(k)[lane] : source<u32>(k)[lane];
}
inline u32 Machine::half_defined(int k, bool high) const {
  if (of(k).kind == CONSTANT) return ALL;
  return high && of(k).width == 8 ? w->high[of(k).id] : w->defined[of(k).id];
}
inline u32 Machine::all_defined() const {
  u32 d = ALL;
  for (int k = 0; k < I->sources; ++k) d &= defined(k);
  return d;
}
inline void Machine::check_defined(int k, u32 lanes, int pc2) {
  u32 missing = lanes & ~defined(k);
  if (launch.check && missing) report(UNINITIALISED, pc2, __builtin_ctz(missing), k);
}
inline void Machine::set_defined(const Operand& o, u32 lanes, u32 low, u32 high) {
  if (o.kind != REGISTER) return;
  w->defined[o.id] = (w->defined[o.id] & ~lanes) | (low & lanes);
  w->high[o.id] = (w->high[o.id] & ~lanes) | (high & lanes);
}
template <class T>
inline void Machine::put(int k, const T* values, u32 d) {
  const Operand& o = to(k);
  if (o.kind != REGISTER) return;
  u8* p = w->arena.data() + o.offset;
  for (int i = 0; i < LANES; ++i)
    if (active(i)) set_lane<T>(p, i, values[i]);
  set_defined(o, m, d, d);
}
// r[i] = of_lane(i) of all sources.
template <class T, class F>
inline void Machine::map(int sources, F of_lane) {
  T r[LANES];
  for (int i = 0; i < LANES; ++i) r[i] = T(of_lane(i));
  u32 d = ALL;
  for (int k = 0; k < sources; ++k) d &= defined(k);
  put<T>(0, r, d);
}
inline void Machine::put_lanes(int k, const u64* values, u32 low, u32 high) {
  if (to(k).width == 8) {
    put<u64>(k, values, low);
    return set_defined(to(k), m, low, high);
  }
  u32 narrow[LANES];
  for (int i = 0; i < LANES; ++i) narrow[i] = u32(values[i]);
  put<u32>(k, narrow, low);
}
inline void Machine::put_predicate(int k, u32 value, u32 d) {
  const Operand& o = to(k);
  if (o.kind != REGISTER) return;
  u32* p = (u32*)(w->arena.data() + o.offset);
  *p = (*p & ~m) | (value & m);
  set_defined(o, m, d, d);
}
