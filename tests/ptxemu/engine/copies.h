// Asynchronous copies: cp.async, TMA and the barriers in shared memory that it reports to.
//
// Data are not there before somebody waits for them: until then their place is poisoned, and whoever
// touches it is reported.
#pragma once
#include "memory.h"

// -- cp.async -------------------------------------------------------------------------------------

inline void Machine::copy_async() {
  const u32 *to = source<u32>(0), *size = I->sources > 2 ? source<u32>(2) : nullptr;
  u32 n = I->flags & 31, at[LANES], reads = 0;
  u64 address[LANES];
  for (int i = 0; i < LANES; ++i) {
    at[i] = to[i] + u32(I->imm);
    address[i] = source<u64>(1)[i] + I->imm2;
    if (active(i) && (!size || size[i])) reads |= 1u << i;
  }
  for (int k = 0; k < I->sources; ++k) check_defined(k, k == 1 ? reads : m, -2);
  count_sectors(address, reads, n);
  bank_waves(at, m, n);
  for (int i = 0; i < LANES; ++i) {
    if (!active(i) || !shared_ok(at[i], n, i)) continue;
    Copy copy{at[i], n, {}, tid(i), u32(w->pc)};
    u32 have = size ? std::min(size[i], n) : n;  // the rest is 0
    int which = 0;
    const u8* p = have ? global_at(address[i], n, i, false, which) : nullptr;
    if (p) {
      memcpy(copy.data, p, have);
      note_global_read(address[i], have, i, which);
    }
    note_write(at[i], n, i, nullptr, 2);
    for (u32 b = at[i] - SHARED_BASE; b < at[i] - SHARED_BASE + n; ++b)
      shared[b] = 0xff, shadow[b].in_flight = 1;
    w->open_copies.push_back(copy);
  }
}

inline void Machine::wait_copies(size_t keep) {
  while (w->copies.size() > keep) {
    for (const Copy& c : w->copies.front()) {
      memcpy(&shared[c.to - SHARED_BASE], c.data, c.size);
      for (u32 b = c.to - SHARED_BASE; b < c.to - SHARED_BASE + c.size; ++b) {
        Shadow& s = shadow[b];
        s.in_flight = 0, s.defined = 1, s.proxy = 2, s.w_epoch = epoch, s.w_tid = c.tid;
        s.w_sync = w->sync, s.w_pc = c.pc, s.w_fence = w->fence;
      }
    }
    w->copies.erase(w->copies.begin());
  }
}

// -- mbarrier -------------------------------------------------------------------------------------

inline MBarrier* Machine::barrier_at(u32 address, int lane, int info) {
  auto it = barriers.find(address);
  if (it != barriers.end()) return &it->second;
  report(MBARRIER, -1, lane, info);
  return nullptr;
}

inline void Machine::init_barrier() {
  int lead = __builtin_ctz(m);
  u32 a = source<u32>(0)[lead] + u32(I->imm);
  if (__builtin_popcount(m) != 1) report(MBARRIER, -1, 0, 1);
  if (!shared_ok(a, 8, 0)) return;
  MBarrier b;
  b.count = b.pending = source<u32>(1)[lead];
  b.index = ++barrier_count;
  barriers[a] = b;
  note_write(a, 8, lead, nullptr);
}

inline void Machine::end_barrier() {
  u32 a = source<u32>(0)[__builtin_ctz(m)] + u32(I->imm);
  MBarrier* b = barrier_at(a, 0, 2);
  if (!b) return;
  if (!b->idle()) report(MBARRIER, -1, 0, 3);
  barriers.erase(a);
}

inline void Machine::settle(MBarrier& b) {
  if (b.pending || b.expected) return;
  b.phase++, b.pending = b.count, b.asked = 0, events++;
}

inline void Machine::arrive() {
  for (int i = 0; i < LANES; ++i) {
    if (!active(i)) continue;
    u32 a = source<u32>(0)[i] + u32(I->imm);
    MBarrier* b = barrier_at(a, i, 4);
    if (!b) continue;
    const Shadow& s = shadow[a - SHARED_BASE];
    if (s.w_epoch == epoch && s.w_tid / LANES != w->index)
      report(RACE_SHARED, s.w_pc, i, a - SHARED_BASE);  // nobody made sure that it is there
    if (I->op == OP_mbexpect) b->expected += source<u32>(1)[i];
    if (--b->pending < 0) report(MBARRIER, -1, i, 5);
    settle(*b);
  }
}

// True when the warp may go on. A warp's first question is always too early: who does not ask again
// uses what is in flight.
inline bool Machine::try_wait() {
  int lead = __builtin_ctz(m);
  MBarrier* b = barrier_at(source<u32>(0)[lead] + u32(I->imm), 0, 6);
  if (!b) {
    stop = true;
    return false;
  }
  u32 parity = source<u32>(1)[lead] & 1;
  bool moving = (b->phase & 1) == parity && !b->idle();
  if (moving && (b->asked >> w->index & 1)) {
    if (!b->queue.empty()) finish_bulk(*b);
    finish_commits(*b);
  }
  b->asked |= 1u << w->index;
  bool done = (b->phase & 1) != parity;
  put_predicate(0, done ? ALL : 0, ALL);
  if (done) w->waited[b->index] = b->phase;
  return done || moving;
}

// -- TMA ------------------------------------------------------------------------------------------

inline void Machine::bulk_copy() {
  int rank = I->flags;
  for (int i = 0; i < LANES; ++i) {
    if (!active(i)) continue;
    BulkCopy copy;
    memcpy(&copy.map, (const void*)source<u64>(1)[i], sizeof(TensorMap));
    if (copy.map.magic != MAGIC || int(copy.map.rank) != rank) return fail(UNSUPPORTED, 777);
    copy.to = source<u32>(0)[i], copy.pc = w->pc, copy.warp = w->index;
    copy.bytes = copy.map.element;
    for (int k = 0; k < rank; ++k) {
      copy.at[k] = source<s32>(2 + k)[i];
      copy.bytes *= copy.map.box[k];
    }
    u32 first = copy.to - SHARED_BASE;
    if (copy.to % 128) report(MISALIGNED, -1, i, copy.to, 128);
    if (!shared_ok(copy.to, 0, i) || !shared_ok(copy.to + copy.bytes - 1, 0, i)) continue;
    MBarrier* b = barrier_at(source<u32>(2 + rank)[i], i, 7);
    if (!b) continue;
    note_write(copy.to, copy.bytes, i, nullptr, 1);
    for (u32 k = first; k < first + copy.bytes; ++k) shared[k] = 0xff, shadow[k].in_flight = 1;
    st->bytes += copy.bytes;
    b->queue.push_back(copy);
  }
}

inline void Machine::finish_bulk(MBarrier& b) {
  Warp* waiting = w;
  for (const BulkCopy& copy : b.queue) {
    w = &warps[copy.warp];
    s32 pc = w->pc;
    w->pc = copy.pc;  // reports are of the copy
    u64 rows = copy.bytes / (copy.map.box[0] * copy.map.element);
    for (u64 row = 0; row < rows; ++row)
      for (u32 column = 0; column < copy.map.box[0]; ++column)
        finish_bulk_element(copy, b, row, column);
    w->pc = pc;
    b.expected -= copy.bytes;
  }
  w = waiting;
  b.queue.clear();
  settle(b);
}

// Beyond the extents it reads 0.
inline void Machine::finish_bulk_element(const BulkCopy& copy, const MBarrier& b, u64 row,
                                         u32 column) {
  const TensorMap& map = copy.map;
  u32 size = map.element, to = copy.to + u32(row) * map.box[0] * size + column * size;
  s64 c = s64(column) + copy.at[0];
  u64 address = map.base + c * s64(size);
  bool inside = c >= 0 && u64(c) < map.extents[0];
  for (u32 k = 1; k < map.rank; ++k) {
    s64 at = s64(row % map.box[k]) + copy.at[k];
    row /= map.box[k];
    inside &= at >= 0 && u64(at) < map.extents[k];
    address += at * s64(map.strides[k - 1]);
  }
  constexpr u32 MASK[] = {0, 1, 3, 7};  // 16-byte units exchanged, by rows of 128 bytes
  to ^= (to >> 7 & MASK[map.swizzle]) << 4;
  u8 value[8] = {};
  int which = 0;
  if (const u8* p = inside ? global_at(address, size, 0, false, which) : nullptr) {
    memcpy(value, p, size);
    note_global_read(address, size, 0, which);
  }
  memcpy(&shared[to - SHARED_BASE], value, size);
  for (u32 k = to - SHARED_BASE; k < to - SHARED_BASE + size; ++k) {
    Shadow& s = shadow[k];
    s.in_flight = 0, s.defined = 1, s.proxy = 1, s.w_epoch = epoch;
    s.w_tid = u16(copy.warp * LANES), s.w_pc = copy.pc, s.barrier = b.index, s.phase = b.phase;
  }
}
