// Executes decoded PTX for a grid: warps in lockstep, one CTA after another, the warps of a CTA in a
// shuffled order from barrier to barrier. README.md says what is modelled and what is not.
#include "lanes.h"
#include "tensor.h"

Machine::Machine(Launch& l) : launch(l), random(l.seed) {
  warps.resize(l.num_warps);
  shared.resize(l.shared_bytes + 16);
  shadow.resize(l.shared_bytes + 16);
  for (int k = 0; l.check && k < l.num_allocations; ++k) {
    const Allocation& a = l.allocations[k];
    global.push_back((GlobalShadow*)calloc((a.size >> a.grain) + 2, sizeof(GlobalShadow)));
  }
}
Machine::~Machine() {
  for (GlobalShadow* g : global) free(g);
}

// -- one instruction ------------------------------------------------------------------------------

bool Machine::advance(s32 next, u32 lanes) {
  if (w->diverged)
    for (int i = 0; i < LANES; ++i)
      if (lanes >> i & 1) w->lane_pc[i] = next;
  w->pc = next;
  return true;
}

bool Machine::branch(u32 lanes, s32 next) {
  if (m == lanes) return advance(I->target, lanes);
  if (!m) return advance(next, lanes);
  if (!w->diverged) std::fill(w->lane_pc, w->lane_pc + LANES, w->pc);
  w->diverged = true;
  for (int i = 0; i < LANES; ++i)
    if (lanes >> i & 1) w->lane_pc[i] = active(i) ? I->target : next;
  w->pc = std::min(I->target, next);
  return true;
}

// What all lanes of a warp do together.
static bool convergent(s32 op) {
  return op == OP_barsync || op == OP_warpsync || op == OP_elect || op == OP_ldmatrix ||
         op == OP_stmatrix || (op >= OP_shfl_bfly && op <= OP_redux) ||
         (op >= OP_mma_f16 && op <= OP_wgwait) || (op >= OP_tmalloc && op <= OP_tmwaitst);
}

// Of lanes that diverged those with the lowest program counter, but for those that wait for the
// others: at what a warp does together, which may stand before the code of the others.
u32 Machine::next_lanes() {
  s32 low = INT32_MAX, waiting = INT32_MAX;
  for (int i = 0; i < LANES; ++i) {
    if (!(w->live >> i & 1)) continue;
    s32 pc = w->lane_pc[i];
    if (convergent(launch.code[pc].op))
      waiting = std::min(waiting, pc);
    else
      low = std::min(low, pc);
  }
  w->pc = low < INT32_MAX ? low : waiting;
  u32 lanes = 0;
  for (int i = 0; i < LANES; ++i)
    if ((w->live >> i & 1) && w->lane_pc[i] == w->pc) lanes |= 1u << i;
  w->diverged = lanes != w->live;
  if (w->diverged && low == INT32_MAX) fail(DIVERGED);
  return lanes;
}

// False when the warp must give way.
bool Machine::step() {
  u32 lanes = w->diverged ? next_lanes() : w->live;
  if (stop) return false;
  I = &launch.code[w->pc], st = &launch.statistics[w->pc], m = lanes;
  if (I->guard_offset >= 0) {
    u32 guard = *(const u32*)(w->arena.data() + I->guard_offset);
    u32 missing = m & ~w->defined[I->guard_id];
    if (launch.check && missing) report(UNINITIALISED, -3, __builtin_ctz(missing), I->guard_id);
    m &= I->guard_negated ? ~guard : guard;
  }
  st->issued++, st->lanes += __builtin_popcount(m), st->masked += __builtin_popcount(lanes & ~m);
  s32 next = w->pc + 1;
  if (I->op == OP_bra) return branch(lanes, next);
  if (I->op == OP_ret) {
    w->live &= ~m;
    if (w->live) return advance(next, lanes);
    w->state = DONE;
    return false;
  }
  if (I->op == OP_barsync) {
    w->state = AT_BARRIER, w->pc = next;
    return false;
  }
  if (!m) return advance(next, lanes);
  check_pending();
  bool go_on = execute();
  if (stop) return false;
  advance(next, lanes);
  return go_on;
}

// False when the warp waits for a barrier in shared memory.
bool Machine::execute() {
  switch (I->op) {
    case OP_nop:
    case OP_wgfence: break;
    case OP_trap: fail(UNSUPPORTED, 9999); break;
    case OP_warpsync: w->sync++; break;
    case OP_ldg: load_global(); break;
    case OP_stg: store_global(); break;
    case OP_lds: load_shared(); break;
    case OP_sts: store_shared(); break;
    case OP_ldl: local_memory(true); break;
    case OP_stl: local_memory(false); break;
    case OP_cpasync: copy_async(); break;
    case OP_cpwaitall:
    case OP_cpcommit:
      w->copies.push_back(std::move(w->open_copies));
      w->open_copies.clear();
      if (I->op == OP_cpwaitall) wait_copies(0);
      break;
    case OP_cpwait: wait_copies(size_t(I->imm)); break;
    case OP_ldmatrix: load_matrix(); break;
    case OP_stmatrix: store_matrix(); break;
    case OP_mma_f16: mma(F16); break;
    case OP_mma_bf16: mma(BF16); break;
    case OP_mma_tf32: mma(TF32); break;
    case OP_mma_f64: mma(F64); break;
    case OP_wgmma: wgmma(); break;
    case OP_wgcommit:
      w->matrices.push_back(std::move(w->open_matrices));
      w->open_matrices = {};
      break;
    case OP_wgwait: wait_matrices(size_t(I->imm)); break;
    case OP_tmalloc: allocate_columns(); break;
    case OP_tmfree: columns = 0; break;
    case OP_tmld: tensor_access(true); break;
    case OP_tmst: tensor_access(false); break;
    case OP_tmwaitld: wait_tensor(true); break;
    case OP_tmwaitst: wait_tensor(false); break;
    case OP_tmmma: tensor_mma(); break;
    case OP_tmcommit: commit_tensor(); break;
    case OP_mbinit: init_barrier(); break;
    case OP_mbinval: end_barrier(); break;
    case OP_mbexpect:
    case OP_mbarrive: arrive(); break;
    case OP_mbtry:
      if (try_wait()) break;
      w->state = AT_MBARRIER;
      return false;
    case OP_tma: bulk_copy(); break;
    case OP_proxyfence: w->fence++, w->fence_epoch = epoch; break;
    case OP_shfl_bfly:
    case OP_shfl_idx:
    case OP_shfl_up:
    case OP_shfl_down: shuffle(); break;
    case OP_redux: reduce(); break;
    case OP_cvt: convert(); break;
    case OP_cvt_bf16x2_f32: convert_pair(to_bf16); break;
    case OP_cvt_f16x2_f32: convert_pair(to_f16); break;
    case OP_prmt:
    case OP_lop3:
    case OP_shf_l:
    case OP_shf_r:
    case OP_bfe_u32:
    case OP_bfe_s32:
    case OP_bfi_b32:
    case OP_popc_b32:
    case OP_clz_b32:
    case OP_brev_b32: select_bits(); break;
    case OP_carry: add_carry(); break;
    case OP_alu: alu(); break;
    case OP_setp:
      switch (int comparison = I->flags >> 5; I->flags & 31) {
        case U16: compare<u16>(comparison); break;
        case S16: compare<s16>(comparison); break;
        case U32: compare<u32>(comparison); break;
        case S32: compare<s32>(comparison); break;
        case U64: compare<u64>(comparison); break;
        case S64: compare<s64>(comparison); break;
        case F16: compare<f16>(comparison); break;
        case F32: compare<f32>(comparison); break;
        case F64: compare<f64>(comparison); break;
        default: fail(UNSUPPORTED, I->flags & 31);
      }
      break;
    default: moves();
  }
  return true;
}

void Machine::moves() {
  auto p = [&](int k) { return *source<u32>(k); };
  auto same = [&](u32 v) {
    u32 r[LANES];
    std::fill(r, r + LANES, v);
    put<u32>(0, r, ALL);
  };
  switch (I->op) {
    case OP_mov32: return put<u32>(0, source<u32>(0), defined(0));
    case OP_mov64:
      return put_lanes(0, source<u64>(0), half_defined(0, false), half_defined(0, true));
    case OP_movp: return put_predicate(0, p(0), defined(0));
    case OP_notp: return put_predicate(0, ~p(0), defined(0));
    case OP_xorp: return put_predicate(0, p(0) ^ p(1), all_defined());
    case OP_andp:  // one false operand decides
      return put_predicate(0, p(0) & p(1),
                           all_defined() | (defined(0) & ~p(0)) | (defined(1) & ~p(1)));
    case OP_orp:
      return put_predicate(0, p(0) | p(1),
                           all_defined() | (defined(0) & p(0)) | (defined(1) & p(1)));
    case OP_selp32:
    case OP_selp64: {
      u64 r[LANES];
      auto known = [&](bool half) {
        return defined(2) & ((p(2) & half_defined(0, half)) | (~p(2) & half_defined(1, half)));
      };
      for (int i = 0; i < LANES; ++i) r[i] = wide_source(p(2) >> i & 1 ? 0 : 1, i);
      return put_lanes(0, r, known(false), known(true));
    }
    case OP_pack: {  // flags: bits of each
      u64 r[LANES] = {};
      for (int k = 0; k < I->sources; ++k)
        for (int i = 0; i < LANES; ++i) {
          u64 v = source<u32>(k)[i];
          r[i] |= (I->flags == 16 ? u16(v) : v) << I->flags * k;
        }
      if (I->flags == 32) return put_lanes(0, r, defined(0), defined(1));
      return put_lanes(0, r, all_defined());
    }
    case OP_unpack: {
      u64 v[LANES];
      u32 r[LANES];
      for (int i = 0; i < LANES; ++i) v[i] = wide_source(0, i);
      for (int k = 0; k < I->destinations; ++k) {
        for (int i = 0; i < LANES; ++i) {
          u64 part = v[i] >> I->flags * k;
          r[i] = I->flags == 16 ? u16(part) : u32(part);
        }
        put<u32>(k, r, half_defined(0, I->flags * k >= 32));
      }
      return;
    }
    case OP_tid:
      return map<u32>(0, [&](int i) { return I->flags == 0 ? w->index * LANES + i : 0; });
    case OP_laneid: return map<u32>(0, [](int i) { return i; });
    case OP_warpid: return same(w->index);
    case OP_ctaid:  // or the size of the grid, or of a CTA
      return same(I->flags < 3    ? cta_at[I->flags]
                  : I->flags < 6  ? launch.grid[I->flags - 3]
                  : I->flags == 6 ? launch.num_warps * LANES
                                  : 1);
    case OP_ldparam:
    case OP_ldparam_s64:
    case OP_paramaddr: {
      u64 v = 0, r[LANES];
      if (I->op == OP_paramaddr)
        v = u64(launch.parameters) + I->imm;
      else
        memcpy(&v, launch.parameters + I->imm, I->op == OP_ldparam ? I->flags : 4);
      if (I->op == OP_ldparam_s64 && I->flags) v = u64(s64(s32(v)));
      std::fill(r, r + LANES, v);
      return put_lanes(0, r, ALL);
    }
    case OP_vote_any: return put_predicate(0, p(0) & m ? ALL : 0, ALL);
    case OP_vote_all: return put_predicate(0, (p(0) & m) == m ? ALL : 0, ALL);
    case OP_vote_ballot: return same(p(0) & m);
    case OP_activemask: return same(m);
    case OP_elect: {
      int lead = __builtin_ctz(m);
      same(lead);
      return put_predicate(1, 1u << lead, ALL);
    }
    default: fail(UNSUPPORTED, I->op);
  }
}

// -- a CTA, a grid --------------------------------------------------------------------------------

void Machine::start_cta(s64 linear, u32 nth) {
  cta = linear, order = nth;
  for (int k = 0; k < 3; ++k) cta_at[k] = s32(linear % launch.grid[k]), linear /= launch.grid[k];
  std::fill(shared.begin(), shared.end(), 0xff);
  std::fill(shadow.begin(), shadow.end(), Shadow{});
  barriers.clear();
  tensor.clear(), columns = 0, open_tensor = {};
  epoch++;
  for (int k = 0; k < launch.num_warps; ++k) {
    u32 sync = warps[k].sync + 1;
    Warp& fresh = warps[k];
    std::vector<u8> arena = std::move(fresh.arena), local = std::move(fresh.local);
    std::vector<u8> pending = std::move(fresh.pending);
    std::vector<u32> known = std::move(fresh.defined), high = std::move(fresh.high);
    fresh = Warp();
    arena.assign(launch.arena_bytes, 0xff), known.assign(launch.num_registers, 0);
    high.assign(launch.num_registers, 0);
    pending.assign(launch.num_registers, FREE);
    local.assign(size_t(launch.local_bytes) * LANES, 0xff);
    fresh.arena = std::move(arena), fresh.local = std::move(local);
    fresh.pending = std::move(pending), fresh.defined = std::move(known);
    fresh.high = std::move(high);
    fresh.index = k, fresh.sync = sync, fresh.fence = 1;
  }
}

void Machine::run_cta() {
  std::vector<int> turn(launch.num_warps);
  for (int k = 0; k < launch.num_warps; ++k) turn[k] = k;
  int stalled = 0, blocked = 0;
  u64 before = ~0ull;
  while (!stop) {
    if (launch.seed) std::shuffle(turn.begin(), turn.end(), random);
    for (int k : turn) {
      w = &warps[k];
      if (w->state == AT_MBARRIER) w->state = RUNNING;
      while (w->state == RUNNING && !stop && step()) {}
    }
    int done = 0, waiting = 0;
    for (const Warp& each : warps) done += each.state == DONE, waiting += each.state == AT_BARRIER;
    if (done == launch.num_warps) break;
    w = &warps[turn[0]];
    if (done + waiting == launch.num_warps) {
      if (done) report(DIVERGED, -4, 0, done);  // some warps left, others wait
      epoch++, events++;
      for (Warp& each : warps)
        if (each.state == AT_BARRIER) each.state = RUNNING, each.sync++;
      continue;
    }
    stalled = before == events && blocked == done + waiting ? stalled + 1 : 0;
    before = events, blocked = done + waiting;
    if (stalled > 64) fail(DEADLOCK, waiting);
  }
  for (auto& [address, b] : barriers)
    if (!b.idle()) {
      if (!b.queue.empty()) w = &warps[b.queue[0].warp], w->pc = b.queue[0].pc;
      report(MBARRIER, -1, 0, 8);  // a copy or a product that nobody waited for
    }
  for (Warp& each : warps)
    for (const CopyGroup& group : each.copies)
      if (!group.empty()) {
        w = &each, w->pc = group[0].pc;
        report(IN_FLIGHT, -9);
        break;
      }
}

void Machine::run() {
  for (s64 k = 0; k < launch.num_ctas && !stop; ++k) {
    start_cta(launch.ctas[k], u32(k));
    run_cta();
  }
}

extern "C" {
const char* emu_operation(int k) {
  return k >= 0 && k < int(std::size(OPERATION_NAMES)) ? OPERATION_NAMES[k] : nullptr;
}
int emu_launch_bytes() { return sizeof(Launch); }
void emu_run(Launch* launch) { Machine(*launch).run(); }
}
