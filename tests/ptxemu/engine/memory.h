// Shared, global and local memory: bounds, alignment, races, uninitialised bytes, counts.
#pragma once
#include "machine.h"

// -- shared ---------------------------------------------------------------------------------------

inline bool Machine::shared_ok(u32 a, u32 n, int lane) {
  if (a < SHARED_BASE || a + n > SHARED_BASE + u32(launch.shared_bytes)) {
    report(SHARED_OUT_OF_BOUNDS, -1, lane, a, n);
    return false;
  }
  if (n && (n & (n - 1)) == 0 && a % n) {
    report(MISALIGNED, -1, lane, a, n);
    return false;
  }
  return true;
}

inline void Machine::note_read(u32 a, u32 n, int lane, bool by_wgmma) {
  if (!launch.check) return;
  u16 me = tid(lane);
  for (u32 k = a - SHARED_BASE; k < a - SHARED_BASE + n; ++k) {
    Shadow& s = shadow[k];
    int writer = s.w_tid / LANES;
    if (s.in_flight) report(IN_FLIGHT, s.w_pc, lane, k, 1);
    if (s.w_epoch == epoch && s.w_tid != me) {
      if (s.proxy == 1) {  // seen by whoever has waited for its barrier
        auto it = w->waited.find(s.barrier);
        if (it == w->waited.end() || it->second <= s.phase)
          report(RACE_SHARED, s.w_pc, lane, k, writer);
      } else if (writer != w->index) {
        report(RACE_SHARED, s.w_pc, lane, k, writer);
      } else if (s.w_sync == w->sync) {
        report(RACE_WARP, s.w_pc, lane, k, s.w_tid % LANES);
      }
    }
    // A fence on either side of the barrier between write and read will do.
    bool unfenced = warps[writer].fence == s.w_fence && w->fence_epoch <= s.w_epoch;
    if (by_wgmma && s.w_epoch && s.proxy != 1 && unfenced)
      report(s.proxy == 2 ? PROXY_COPY : PROXY, s.w_pc, lane, k, s.w_tid);
    if (s.r_epoch != epoch) {
      s.r_epoch = epoch, s.r_tid = me, s.r_sync = w->sync, s.r_pc = w->pc, s.readers = 0;
    } else if (s.r_tid / LANES != w->index) {
      s.readers = 2;
    } else {
      if (s.r_tid != me && s.readers < 2) s.readers = 1;
      s.r_sync = w->sync, s.r_pc = w->pc;
    }
  }
}

inline void Machine::note_write(u32 a, u32 n, int lane, const u8* data, int proxy) {
  if (!launch.check) return;
  u16 me = tid(lane);
  for (u32 k = a - SHARED_BASE, j = 0; k < a - SHARED_BASE + n; ++k, ++j) {
    Shadow& s = shadow[k];
    if (s.in_flight) report(IN_FLIGHT, s.w_pc, lane, k, 2);
    if (s.reading) report(IN_FLIGHT, s.r_pc, lane, k, 3);
    if (s.w_epoch == epoch && s.w_tid != me && s.proxy != 1) {
      bool same = data && s.defined && shared[k] == data[j];
      bool one_store = s.w_pc == u32(w->pc);  // which lane of one store comes last is undefined
      bool threads = proxy == 0 && s.proxy == 0 && s.r_epoch != epoch;
      if (s.w_tid / LANES != w->index)
        report(same ? SAME_VALUE : RACE_SHARED, s.w_pc, lane, k, s.w_tid / LANES);
      else if (s.w_sync == w->sync && !same && (!one_store || threads))
        report(RACE_WARP, s.w_pc, lane, k, s.w_tid % LANES);
    }
    if (s.r_epoch == epoch) {
      if (s.readers == 2 || s.r_tid / LANES != w->index)
        report(RACE_SHARED, s.r_pc, lane, k, 1000 + s.r_tid / LANES);
      else if ((s.readers == 1 || s.r_tid != me) && s.r_sync == w->sync)
        report(RACE_WARP, s.r_pc, lane, k, 1000 + s.r_tid % LANES);
    }
    s.w_epoch = epoch, s.w_tid = me, s.w_sync = w->sync, s.w_pc = w->pc, s.w_fence = w->fence;
    s.proxy = proxy, s.defined = 1;
  }
}

// Lanes go in groups, so that each moves at most 128 bytes; a bank gives one word at a time.
inline void Machine::bank_waves(const u32* address, u32 lanes, int width) {
  int group = width <= 4 ? 32 : width == 8 ? 16 : 8;
  for (int g = 0; g < LANES; g += group) {
    u32 words[32][32];
    int count[32] = {}, most = 0;
    for (int i = g; i < g + group; ++i) {
      if (!(lanes >> i & 1)) continue;
      for (int b = 0; b < std::max(width, 4); b += 4) {
        u32 word = (address[i] + b) >> 2, bank = word & 31;
        u32* end = words[bank] + count[bank];
        if (std::find(words[bank], end, word) == end) {
          words[bank][count[bank]++] = word;
          most = std::max(most, count[bank]);
        }
      }
    }
    st->waves += most;
    st->conflict_free += most > 0;
  }
}

inline void Machine::load_shared() {
  int n = I->destinations, e = I->flags & 15;
  u32 width = n * e, address[LANES], low[8] = {}, high[8] = {};
  u64 v[8][LANES];
  memset(v, 0xff, sizeof v);
  check_defined(0, m, -2);
  for (int i = 0; i < LANES; ++i) address[i] = source<u32>(0)[i] + u32(I->imm);
  bank_waves(address, m, width);
  st->bytes += u64(__builtin_popcount(m)) * width;
  for (int i = 0; i < LANES; ++i) {
    if (!active(i) || !shared_ok(address[i], width, i)) continue;
    note_read(address[i], width, i);
    for (int k = 0; k < n; ++k) {
      u32 at = address[i] - SHARED_BASE + k * e;
      u64 x = 0;
      bool ok[2] = {true, true};
      memcpy(&x, &shared[at], e);
      for (int b = 0; b < e; ++b) ok[b / 4] &= bool(shadow[at + b].defined);
      if (I->flags & 16) x = e == 1 ? u64(s64(int8_t(x))) : e == 2 ? u64(s64(s16(x))) : x;
      v[k][i] = x;
      low[k] |= u32(ok[0]) << i, high[k] |= u32(ok[1]) << i;
    }
  }
  for (int k = 0; k < n; ++k) put_lanes(k, v[k], low[k], high[k]);
}

// The values of one lane, from source ``first`` on, side by side; a bit for each byte that is defined.
inline u64 Machine::gather(int first, int count, int element, int lane, u8* buffer) {
  u64 known = 0;
  for (int k = 0; k < count; ++k) {
    u64 x = wide_source(first + k, lane);
    memcpy(buffer + k * element, &x, element);
    for (int b = 0; b < element; ++b)
      known |= u64(half_defined(first + k, b >= 4) >> lane & 1) << (k * element + b);
  }
  return known;
}

inline void Machine::store_shared() {
  int n = I->sources - 1, e = I->flags & 15;
  u32 width = n * e, address[LANES];
  check_defined(0, m, -2);
  for (int i = 0; i < LANES; ++i) address[i] = source<u32>(0)[i] + u32(I->imm);
  bank_waves(address, m, width);
  st->bytes += u64(__builtin_popcount(m)) * width;
  for (int i = 0; i < LANES; ++i) {
    if (!active(i) || !shared_ok(address[i], width, i)) continue;
    u8 buffer[64];
    u64 known = gather(1, n, e, i, buffer);
    u32 at = address[i] - SHARED_BASE;
    note_write(address[i], width, i, buffer);
    for (u32 b = 0; b < width; ++b) shadow[at + b].defined = known >> b & 1;
    memcpy(&shared[at], buffer, width);
  }
}

// -- global ---------------------------------------------------------------------------------------

inline u8* Machine::global_at(u64 a, u32 n, int lane, bool write, int& which) {
  if (a % n) {
    report(MISALIGNED, -1, lane, a, n);
    return nullptr;
  }
  auto inside = [&](int k) {
    const Allocation& at = launch.allocations[k];
    return a >= at.base && a + n <= at.base + at.size;
  };
  if (last_allocation >= launch.num_allocations || !inside(last_allocation)) {
    int k = 0;
    while (k < launch.num_allocations && !inside(k)) ++k;
    if (k == launch.num_allocations) {
      report(OUT_OF_BOUNDS, -1, lane, a, n | (write ? 1u << 31 : 0));
      return nullptr;
    }
    last_allocation = k;
  }
  which = last_allocation;
  const Allocation& at = launch.allocations[which];
  bool viewed = false;
  for (u32 v = at.first_view; v < at.first_view + at.num_views; ++v)
    viewed |= a >= launch.views[v].base && a + n <= launch.views[v].base + launch.views[v].size;
  if (!viewed) report(OUTSIDE_VIEW, -1, lane, a, write);
  return (u8*)a;
}

inline void Machine::note_global_read(u64 a, u32 n, int lane, int which) {
  if (!launch.check) return;
  const Allocation& at = launch.allocations[which];
  u32 me = order + 1;
  for (u64 k = (a - at.base) >> at.grain; k <= (a - at.base + n - 1) >> at.grain; ++k) {
    GlobalShadow& s = global[which][k];
    if (s.w_cta && s.w_cta != me) report(RACE_GRID, s.w_pc, lane, a, s.w_cta - 1);
    if (s.w_cta == me && s.w_epoch == epoch && s.w_tid / LANES != w->index)
      report(RACE_CTA, s.w_pc, lane, a, s.w_tid);
    if (!s.r_cta && !s.w_cta) launch.touched[2 * which] += 1u << at.grain;
    s.r_cta = !s.r_cta || s.r_cta == me ? me : SEVERAL;
    s.r_epoch = epoch, s.r_tid = tid(lane), s.r_pc = w->pc;
  }
}

inline void Machine::note_global_write(u64 a, u32 n, int lane, int which, const u8* data) {
  if (!launch.check) return;
  const Allocation& at = launch.allocations[which];
  u32 me = order + 1, size = 1u << at.grain;
  u16 mine = tid(lane);
  u64 first = (a - at.base) >> at.grain, last = (a - at.base + n - 1) >> at.grain;
  for (u64 k = first; k <= last; ++k) {
    GlobalShadow& s = global[which][k];
    const u8* there = (const u8*)at.base + (k << at.grain);
    bool same = !memcmp(there, data + ((k - first) << at.grain), size);
    if (s.w_cta && s.w_cta != me)
      report(same ? SAME_VALUE : RACE_GRID, s.w_pc, lane, a, s.w_cta - 1);
    if (s.r_cta && s.r_cta != me) report(RACE_GRID, s.r_pc, lane, a, s.r_cta - 1);
    if (s.w_cta == me && s.w_epoch == epoch && s.w_tid != mine)
      report(same ? SAME_VALUE : RACE_CTA, s.w_pc, lane, a, s.w_tid);
    if (s.r_cta == me && s.r_epoch == epoch && s.r_tid / LANES != w->index)
      report(RACE_CTA, s.r_pc, lane, a, s.r_tid);
    if (!s.w_cta) launch.touched[2 * which + 1] += size;
    s.w_cta = me, s.w_epoch = epoch, s.w_tid = mine, s.w_pc = w->pc;
  }
}

inline void Machine::count_sectors(const u64* address, u32 lanes, u32 n) {
  u64 sectors[2 * LANES];
  int count = 0;
  for (int i = 0; i < LANES; ++i)
    if (lanes >> i & 1)
      sectors[count++] = address[i] >> 5, sectors[count++] = (address[i] + n - 1) >> 5;
  std::sort(sectors, sectors + count);
  st->sectors += std::unique(sectors, sectors + count) - sectors;
  st->bytes += u64(__builtin_popcount(lanes)) * n;
}

inline void Machine::load_global() {
  int n = I->destinations, e = I->flags & 15;
  u32 width = n * e, good = 0;
  u64 address[LANES], v[8][LANES];
  memset(v, 0xff, sizeof v);
  check_defined(0, m, -2);
  for (int i = 0; i < LANES; ++i) address[i] = source<u64>(0)[i] + I->imm;
  count_sectors(address, m, width);
  for (int i = 0; i < LANES; ++i) {
    int which = 0;
    if (!active(i)) continue;
    const u8* p = global_at(address[i], width, i, false, which);
    if (!p) continue;
    note_global_read(address[i], width, i, which);
    for (int k = 0; k < n; ++k) {
      u64 x = 0;
      memcpy(&x, p + k * e, e);
      if (I->flags & 16)
        x = e == 1   ? u64(s64(int8_t(x)))
            : e == 2 ? u64(s64(s16(x)))
            : e == 4 ? u64(s64(s32(x)))
                     : x;
      v[k][i] = x;
    }
    good |= 1u << i;
  }
  for (int k = 0; k < n; ++k) put_lanes(k, v[k], good);
}

inline void Machine::store_global() {
  int n = I->sources - 1, e = I->flags & 15;
  u32 width = n * e;
  u64 address[LANES];
  check_defined(0, m, -2);
  for (int k = 1; k <= n; ++k) check_defined(k, m, -1);
  for (int i = 0; i < LANES; ++i) address[i] = source<u64>(0)[i] + I->imm;
  count_sectors(address, m, width);
  for (int i = 0; i < LANES; ++i) {
    int which = 0;
    if (!active(i)) continue;
    u8 buffer[64], *p = global_at(address[i], width, i, true, which);
    if (!p) continue;
    gather(1, n, e, i, buffer);
    note_global_write(address[i], width, i, which, buffer);
    memcpy(p, buffer, width);
  }
}

// -- local ----------------------------------------------------------------------------------------

inline void Machine::local_memory(bool load) {
  int n = load ? I->destinations : I->sources - 1, e = I->flags & 15;
  u64 v[8][LANES] = {};
  for (int i = 0; i < LANES; ++i) {
    if (!active(i)) continue;
    u64 at = wide_source(0, i) + I->imm;
    if (at + n * e > u64(launch.local_bytes)) {
      report(SHARED_OUT_OF_BOUNDS, -2, i, at);
      continue;
    }
    u8* p = w->local.data() + u64(i) * launch.local_bytes + at;
    if (load)
      for (int k = 0; k < n; ++k) memcpy(&v[k][i], p + k * e, e);
    else
      gather(1, n, e, i, p);
  }
  if (load)
    for (int k = 0; k < n; ++k) put_lanes(k, v[k], ALL);
}
