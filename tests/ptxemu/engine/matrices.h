// Matrix cores: ldmatrix, stmatrix, mma.sync and wgmma. Products are exact and sums fp64; what an
// instruction adds to an accumulator is truncated once.
#pragma once
#include "copies.h"

// Element (row, column) of an 8x8 matrix of 16-bit elements: lane 4 row + column / 2, halfword
// column % 2.

inline void Machine::load_matrix() {
  bool turned = I->flags & 1;
  if (m != ALL) return fail(DIVERGED);
  check_defined(0, (1ull << 8 * I->destinations) - 1, -2);
  u32 address[LANES];  // a copy: its register may be a destination
  memcpy(address, raw(0), sizeof address);
  for (int k = 0; k < I->destinations; ++k) {
    u16 a[8][8];
    bool known[8][8];
    u32 rows[LANES] = {}, r[LANES], d = 0;
    for (int row = 0; row < 8; ++row) {
      u32 at = rows[row] = address[k * 8 + row] + u32(I->imm);
      memset(a[row], 0xff, 16), memset(known[row], 0, 8);
      if (!shared_ok(at, 16, k * 8 + row)) continue;
      note_read(at, 16, k * 8 + row);
      memcpy(a[row], &shared[at - SHARED_BASE], 16);
      for (int c = 0; c < 8; ++c) known[row][c] = shadow[at - SHARED_BASE + 2 * c].defined;
    }
    bank_waves(rows, 0xff, 16), st->bytes += 128;
    for (int i = 0; i < LANES; ++i) {
      int row = i >> 2, c = (i & 3) * 2;
      u16 low = turned ? a[c][row] : a[row][c], high = turned ? a[c + 1][row] : a[row][c + 1];
      bool ok = turned ? known[c][row] && known[c + 1][row] : known[row][c] && known[row][c + 1];
      r[i] = low | u32(high) << 16;
      d |= u32(ok) << i;
    }
    put<u32>(k, r, d);
  }
}

inline void Machine::store_matrix() {
  bool turned = I->flags & 1;
  if (m != ALL) return fail(DIVERGED);
  const u32* address = source<u32>(0);
  for (int k = 0; k < I->sources - 1; ++k) {
    const u32* v = source<u32>(k + 1);
    u16 a[8][8];
    bool known[8][8];
    u32 rows[LANES] = {};
    for (int i = 0; i < LANES; ++i) {
      int row = i >> 2, c = (i & 3) * 2;
      for (int h = 0; h < 2; ++h) {
        int y = turned ? c + h : row, x = turned ? row : c + h;
        a[y][x] = u16(v[i] >> 16 * h), known[y][x] = defined(k + 1) >> i & 1;
      }
    }
    for (int row = 0; row < 8; ++row) {
      u32 at = rows[row] = address[k * 8 + row] + u32(I->imm);
      if (!shared_ok(at, 16, k * 8 + row)) continue;
      note_write(at, 16, k * 8 + row, (const u8*)a[row]);
      memcpy(&shared[at - SHARED_BASE], a[row], 16);
      for (int b = 0; b < 16; ++b) shadow[at - SHARED_BASE + b].defined = known[row][b / 2];
    }
    bank_waves(rows, 0xff, 16), st->bytes += 128;
  }
}

// -- mma.sync -------------------------------------------------------------------------------------

static inline f64 low_float(int format, u16 v) {
  return format == BF16 ? from_bf16(v) : from_f16(v);
}

// D = A B + C; flags: registers of A, B and C, then M and K. Lane 4 g + t holds rows g and g + 8.
inline void Machine::mma(int format) {
  int na = I->flags & 15, nb = I->flags >> 4 & 15, nc = I->flags >> 8 & 15;
  int M = I->flags >> 12 & 31, K = I->flags >> 17 & 31;
  bool half = format == F16 || format == BF16, tall = M == 16;
  static thread_local f64 A[16][32], B[32][8];
  bool unknown_row[16] = {}, unknown_column[8] = {};
  for (int k = 0; k < na + nb; ++k) {
    bool is_a = k < na;
    int j = is_a ? k : k - na;
    // Registers of A go down by 8 rows first, then along K; those of B along K.
    int down = is_a && tall ? (j & 1) * 8 : 0, along = is_a && tall ? j >> 1 : j;
    for (int i = 0; i < LANES; ++i) {
      int g = i >> 2, t = i & 3;
      bool known = defined(k) >> i & 1;
      (is_a ? unknown_row[g + down] : unknown_column[g]) |= !known;
      auto set = [&](int depth, f64 v) { (is_a ? A[g + down][depth] : B[depth][g]) = v; };
      if (half) {
        u32 v = source<u32>(k)[i];
        set(2 * t + 8 * along, low_float(format, u16(v)));
        set(2 * t + 8 * along + 1, low_float(format, u16(v >> 16)));
      } else {
        set(t + 4 * along, format == TF32 ? from_tf32(source<u32>(k)[i]) : source<f64>(k)[i]);
      }
    }
  }
  f64 C[16][8] = {};
  for (int r = 0; r < M; ++r)
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < 8; ++c) C[r][c] += A[r][k] * B[k][c];
  for (int k = 0; k < nc; ++k) {
    int from = na + nb + k;
    f64 wide[LANES];
    f32 narrow[LANES];
    u32 ok = 0;
    for (int i = 0; i < LANES; ++i) {
      int row = (i >> 2) + (k >> 1) * 8, column = (i & 3) * 2 + (k & 1);
      bool known = !unknown_row[row] && !unknown_column[column];
      ok |= (defined(from) >> i & 1 & u32(known)) << i;
      if (format == F64)
        wide[i] = source<f64>(from)[i] + C[row][column];
      else
        narrow[i] = toward_zero(f64(source<f32>(from)[i]) + C[row][column]);
    }
    if (format == F64)
      put<f64>(k, wide, ok);
    else
      put<f32>(k, narrow, ok);
  }
}

// -- wgmma ----------------------------------------------------------------------------------------

// Address of element (mn, k), of ``bytes`` bytes, by a matrix descriptor (PTX ISA, "Matrix
// Descriptor Format" and the canonical layouts of its section).
static inline u32 in_descriptor(u64 descriptor, int mn, int k, bool mn_major, int bytes) {
  auto field = [&](int at) { return u32(descriptor >> at & 0x3fff) << 4; };
  u32 start = field(0), lead = field(16), stride = field(32), mode = descriptor >> 62;
  if (mode == 0) {  // rows of 16 bytes
    if (mn_major) return start + mn / 8 * lead + k / 8 * stride + k % 8 * 16 + mn % 8 * 2;
    int along = k * bytes;
    return start + mn / 8 * stride + along / 16 * lead + mn % 8 * 16 + along % 16;
  }
  int span = 256 >> mode, per = span / 2;  // bytes and halfwords of a swizzled row
  u32 a = mn_major ? start + mn / per * lead + k / 8 * stride + k % 8 * span + mn % per * 2
                   : start + mn / 8 * stride + mn % 8 * span + k * bytes;
  return a ^ (a >> 7 & ((8u >> (mode - 1)) - 1)) << 4;
}

static inline f32 element_bf16(u32 v) { return from_bf16(u16(v)); }
static inline f32 element_f16(u32 v) { return from_f16(u16(v)); }

// An element of an operand in shared memory, which nobody may overwrite until the wait.
inline f64 Machine::shared_element(u32 a, bool& undefined, f32 (*format)(u32), int bytes,
                                   MatrixGroup& group) {
  if (!shared_ok(a, bytes, 0)) return 0;
  u32 v = 0, at = a - SHARED_BASE;
  note_read(a, bytes, 0, true);
  if (launch.check) {
    for (int b = 0; b < bytes; ++b) shadow[at + b].reading++;
    group.reads.push_back({a, u32(bytes)});
  }
  undefined |= !shadow[at].defined;
  memcpy(&v, &shared[at], bytes);
  return format(v);
}

// A warp's quarter, 16 rows, of a warp group's product. flags: N, then bits: A in registers, bf16,
// A and B transposed, A and B negated, tf32.
inline void Machine::wgmma() {
  auto flag = [&](int bit) { return bool(I->flags >> bit & 1); };
  int N = I->flags & 511, bytes = flag(15) ? 4 : 2, K = 32 / bytes, next = 0;
  f32 (*format)(u32) = flag(15) ? from_tf32 : flag(10) ? element_bf16 : element_f16;
  f64 sign = flag(13) != flag(14) ? -1 : 1;
  static thread_local f64 A[16][16], B[16][256];
  bool unknown_row[16] = {}, unknown_column[256] = {};
  MatrixGroup& group = w->open_matrices;
  if (flag(9)) {
    for (; next < 4; ++next) {
      const u32* v = source<u32>(next);
      for (int i = 0; i < LANES; ++i) {
        int row = (i >> 2) + (next & 1) * 8, t = i & 3, along = next >> 1;
        if (bytes == 4)
          A[row][t + along * 4] = format(v[i]);
        else
          A[row][2 * t + along * 8] = format(v[i] & 0xffff),
                                 A[row][2 * t + along * 8 + 1] = format(v[i] >> 16);
        unknown_row[row] |= !(defined(next) >> i & 1);
      }
      if (of(next).kind != REGISTER) continue;
      u8& pending = w->pending[of(next).id];
      pending = pending == ACCUMULATES ? ACCUMULATES : FEEDS;
      group.operands.push_back(of(next).id);
    }
  } else {
    u64 descriptor = source<u64>(next++)[0];
    int first = (w->index & 3) * 16;
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < K; ++k)
        A[r][k] = shared_element(in_descriptor(descriptor, first + r, k, flag(11), bytes),
                                 unknown_row[r], format, bytes, group);
  }
  check_defined(next, 1, -2);
  u64 descriptor = source<u64>(next)[0];
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k)
      B[k][n] = shared_element(in_descriptor(descriptor, n, k, flag(12), bytes), unknown_column[n],
                               format, bytes, group);
  bool accumulate = source<u32>(next + 1)[0] & 1;
  static thread_local f64 C[16][256];
  for (int r = 0; r < 16; ++r) {
    std::fill(C[r], C[r] + N, 0.0);
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < N; ++n) C[r][n] += sign * A[r][k] * B[k][n];
  }
  for (int k = 0; k < I->destinations; ++k) {
    const Operand& o = to(k);
    f32* p = (f32*)(w->arena.data() + o.offset);
    u32 known = accumulate ? w->defined[o.id] : ALL, ok = 0;
    for (int i = 0; i < LANES; ++i) {
      int row = (i >> 2) + (k >> 1 & 1) * 8, column = (k >> 2) * 8 + (i & 3) * 2 + (k & 1);
      p[i] = toward_zero((accumulate ? f64(p[i]) : 0.0) + C[row][column]);
      ok |= (known >> i & 1 & u32(!unknown_row[row] && !unknown_column[column])) << i;
    }
    w->defined[o.id] = ok, w->pending[o.id] = ACCUMULATES;
    group.accumulators.push_back(o.id);
  }
}

inline void Machine::release(const MatrixGroup& done) {
  for (auto [a, n] : done.reads)
    for (u32 b = a - SHARED_BASE; b < a - SHARED_BASE + n; ++b)
      shadow[b].reading -= shadow[b].reading > 0;
}

inline void Machine::wait_matrices(size_t keep) {
  while (w->matrices.size() > keep) {
    MatrixGroup& done = w->matrices.front();
    release(done);
    for (s32 id : done.accumulators) w->pending[id] = FREE;
    for (s32 id : done.operands)
      if (w->pending[id] == FEEDS) w->pending[id] = FREE;
    w->matrices.erase(w->matrices.begin());
    for (const MatrixGroup& left : w->matrices) {
      for (s32 id : left.accumulators) w->pending[id] = ACCUMULATES;
      for (s32 id : left.operands)
        if (w->pending[id] == FREE) w->pending[id] = FEEDS;
    }
  }
}

// Two registers become one of 64 bits: ptxas gives them neighbouring numbers and makes no instruction
// of it, so LLVM may put these above the wait of a tcgen05.ld.
inline bool Machine::makes_pair() const {
  if (I->op == OP_cvt) return (I->flags & 31) == U64 && (I->flags >> 5 & 31) == U32;
  bool joins = I->flags / 32 == SHL || I->flags / 32 == OR;
  return I->op == OP_pack || (I->op == OP_alu && joins && to(0).width == 8);
}

// Accumulators of a wgmma in flight and what is being loaded from tensor memory are nobody's; operand
// registers may be read.
inline void Machine::check_pending() {
  bool none = w->matrices.empty() && w->open_matrices.accumulators.empty() && w->loading.empty();
  if (I->op == OP_wgmma || none) return;
  bool loads = false, pair = !w->loading.empty() && makes_pair();
  for (int k = 0; k < I->sources; ++k)
    if (of(k).kind == REGISTER && w->pending[of(k).id] == ACCUMULATES) {
      loads = true;
      if (!pair) report(ACCUMULATOR, -1, 0, of(k).id);
    }
  for (int k = 0; k < I->destinations; ++k) {
    if (to(k).kind != REGISTER) continue;
    u8& pending = w->pending[to(k).id];
    if (pending) report(pending == FEEDS ? OPERAND : ACCUMULATOR, -2, 0, to(k).id);
    if (pair && loads) {
      pending = ACCUMULATES;
      w->loading.push_back(to(k).id);
    }
  }
}
