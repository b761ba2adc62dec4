// sm_100: tensor memory, 128 lanes of 512 columns of 32 bits, and tcgen05 of one CTA. An address has
// the lane in its upper half, the column in its lower one.
#pragma once
#include "matrices.h"

// One allocation a CTA, from column 0 on; its address goes to shared memory.
inline void Machine::allocate_columns() {
  u32 a = source<u32>(0)[__builtin_ctz(m)] + u32(I->imm), zero = 0;
  if (columns) return fail(UNSUPPORTED, I->op);
  columns = I->flags;
  tensor.assign(TENSOR_LANES * TENSOR_COLUMNS, Cell());
  if (!shared_ok(a, 4, 0)) return;
  note_write(a, 4, __builtin_ctz(m), (const u8*)&zero);
  memcpy(&shared[a - SHARED_BASE], &zero, 4);
  for (int b = 0; b < 4; ++b) shadow[a - SHARED_BASE + b].defined = 1;
}

inline Cell* Machine::cell_at(u32 lane, u32 column) {
  if (lane < TENSOR_LANES && column < columns) return &tensor[lane * TENSOR_COLUMNS + column];
  report(SHARED_OUT_OF_BOUNDS, -1, 0, lane << 16 | column);
  return nullptr;
}

// Lane and column of register k of lane i. Shapes, in flags: 0 32x32b, a lane's columns; 1 16x32bx2,
// lanes 16 to 31 have those of lanes 0 to 15, ``split`` columns on; 2 16x128b and 3 16x256b, a row is
// four lanes, with one column or two.
static inline std::pair<u32, u32> tensor_place(int shape, int i, int k, u32 split) {
  if (shape == 0) return {i, k};
  if (shape == 1) return {i & 15, k + (i >= 16 ? split : 0)};
  if (shape == 2) return {i / 4 + (k & 1) * 8, k / 2 * 4 + i % 4};
  return {i / 4 + (k >> 1 & 1) * 8, k / 4 * 8 + i % 4 * 2 + (k & 1)};
}

// A warp reaches the quarter of its number.
inline void Machine::tensor_access(bool load) {
  int n = load ? I->destinations : I->sources - 1, first = load ? 0 : 1;
  check_defined(0, m, -2);
  u32 address = source<u32>(0)[0] + u32(I->imm), quarter = (w->index & 3) * 32;
  std::vector<u64> values(LANES);
  for (int k = 0; k < n; ++k) {
    u32 known = 0;
    for (int i = 0; i < LANES; ++i) {
      auto [row, along] = tensor_place(I->flags, i, k, u32(I->imm2));
      u32 lane = (address >> 16) + row, column = (address & 0xffff) + along;
      if (lane / 32 * 32 != quarter) report(SHARED_OUT_OF_BOUNDS, -1, i, lane << 16 | column);
      Cell* cell = cell_at(lane, column);
      if (!cell) continue;
      if (cell->busy) report(IN_FLIGHT, -1, i, lane << 16 | column);
      if (load) {
        if (cell->storing && cell->storing != w->index + 1)
          report(IN_FLIGHT, -1, i, lane << 16 | column, 4);
        values[i] = cell->value;
        known |= u32(cell->defined) << i;
      } else {
        cell->value = u32(wide_source(first + k, i));
        cell->defined = defined(first + k) >> i & 1;
        cell->storing = u8(w->index + 1);
      }
    }
    if (!load) continue;
    put_lanes(k, values.data(), known);
    if (to(k).kind == REGISTER) {
      w->pending[to(k).id] = ACCUMULATES;
      w->loading.push_back(to(k).id);
    }
  }
}

inline void Machine::wait_tensor(bool loads) {
  if (loads) {
    for (s32 id : w->loading) w->pending[id] = FREE;
    w->loading.clear();
    return;
  }
  for (Cell& cell : tensor)
    if (cell.storing == w->index + 1) cell.storing = 0;
}

// Row of a matrix of M rows to its lane: 64 rows leave every other 16 lanes free.
static inline u32 tensor_lane(int row, int M) { return M == 64 ? row / 16 * 32 + row % 16 : row; }

// Element k of a row that starts at a column: 16-bit elements in pairs.
inline f64 Machine::tensor_element(u32 lane, u32 column, int k, f32 (*format)(u32), int bytes,
                                   bool& undefined) {
  Cell* cell = cell_at(lane, column + k * bytes / 4);
  if (!cell) return 0;
  if (cell->storing) report(IN_FLIGHT, -1, 0, lane << 16 | column, 5);
  undefined |= !cell->defined;
  cell->busy++;
  open_tensor.operands.push_back(s32(cell - tensor.data()));
  return format(bytes == 4 ? cell->value : cell->value >> (k & 1) * 16 & 0xffff);
}

// D = A B (+ D). flags: A in tensor memory, tf32. The instruction descriptor: formats at bits 7 and
// 10, negation at 13 and 14, MN-major at 15 and 16, N / 8 at 17, M / 16 at 24 (PTX ISA, "Instruction
// descriptor"); D is fp32. Matrix descriptors are wgmma's but for the numbers of the swizzles.
inline void Machine::tensor_mma() {
  int lead = __builtin_ctz(m);
  for (int k = 0; k < I->sources; ++k) check_defined(k, 1u << lead, -2);
  u32 what = source<u32>(3)[lead], d = source<u32>(0)[lead] + u32(I->imm);
  int N = (what >> 17 & 63) * 8, M = (what >> 24 & 31) * 16, bytes = I->flags & 2 ? 4 : 2;
  int K = 32 / bytes;
  bool accumulate = *source<u32>(4) >> lead & 1;
  if ((what >> 4 & 3) != 1 || (M != 64 && M != 128)) return fail(UNSUPPORTED, what);
  auto format_at = [&](int bit) {
    return bytes == 4 ? from_tf32 : what >> bit & 7 ? element_bf16 : element_f16;
  };
  auto descriptor_of = [&](int k) {
    constexpr u64 MODE[8] = {0, 0, 1, 0, 2, 0, 3, 0};  // 128, 64 and 32 bytes
    u64 given = source<u64>(k)[lead];
    return (given & ((1ull << 61) - 1)) | MODE[given >> 61] << 62;
  };
  static thread_local f64 A[128][16], B[16][256];
  bool unknown_row[128] = {}, unknown_column[256] = {};
  for (int r = 0; r < M; ++r)
    for (int k = 0; k < K; ++k) {
      if (I->flags & 1) {
        u32 a = source<u32>(1)[lead] + u32(I->imm2);
        A[r][k] = tensor_element((a >> 16) + tensor_lane(r, M), a & 0xffff, k, format_at(7), bytes,
                                 unknown_row[r]);
      } else {
        u32 at = in_descriptor(descriptor_of(1), r, k, what >> 15 & 1, bytes);
        A[r][k] = shared_element(at, unknown_row[r], format_at(7), bytes, open_tensor);
      }
    }
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) {
      u32 at = in_descriptor(descriptor_of(2), n, k, what >> 16 & 1, bytes);
      B[k][n] = shared_element(at, unknown_column[n], format_at(10), bytes, open_tensor);
    }
  f64 sign = (what >> 13 & 1) != (what >> 14 & 1) ? -1 : 1;
  for (int r = 0; r < M; ++r)
    for (int n = 0; n < N; ++n) {
      Cell* cell = cell_at((d >> 16) + tensor_lane(r, M), (d & 0xffff) + n);
      if (!cell) continue;
      if (cell->storing && accumulate) report(IN_FLIGHT, -1, 0, d, 5);
      f64 sum = 0;
      for (int k = 0; k < K; ++k) sum += A[r][k] * B[k][n];
      cell->value =
          bits<u32>(toward_zero((accumulate ? f64(bits<f32>(cell->value)) : 0.0) + sign * sum));
      cell->defined = (!accumulate || cell->defined) && !unknown_row[r] && !unknown_column[n];
      cell->busy++;
      open_tensor.accumulators.push_back(s32(cell - tensor.data()));
    }
}

// The barrier is arrived at when what was issued before is done: when somebody waits for it.
inline void Machine::commit_tensor() {
  int lead = __builtin_ctz(m);
  MBarrier* b = barrier_at(u32(source<u64>(0)[lead]), lead, 9);
  if (!b) return;
  b->commits.push_back(std::move(open_tensor));
  open_tensor = {};
}

inline void Machine::finish_commits(MBarrier& b) {
  for (const MatrixGroup& done : b.commits) {
    release(done);
    for (s32 cell : done.accumulators) tensor[cell].busy--;
    for (s32 cell : done.operands) tensor[cell].busy--;
    if (--b.pending < 0) report(MBARRIER, -1, 0, 5);
  }
  b.commits.clear();
  settle(b);
}
