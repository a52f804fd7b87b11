// KV blocks copied from one pool into another, which may have other heads, with a digest of what was copied: of each
// block, layer and head, as `digest.py` has it. The source may be another GPU's memory, mapped here.
//
// A unit is HEADS heads of one layer of one block: RUN bytes of keys, then as many of values. It passes through a ring in
// shared memory in pieces. Warp 8 loads the pieces, warp 9 stores them, warps 0 to 7 digest what lies in the ring.
//
// PLANE  bytes of one head's keys, or values, of a block    HEADS  of a unit    SLOT, STAGES  bytes of a piece, pieces
constexpr int RUN = HEADS * PLANE, PIECES = (RUN + SLOT - 1) / SLOT, MOST_BLOCKS = 256;
constexpr int ROW = 256 * 16;                                            // what 8 warps read at once
constexpr int ROWS = (RUN + ROW - 1) / ROW, SLOT_ROWS = (SLOT + ROW - 1) / ROW;
constexpr int PLANE_ROWS = PLANE > ROW ? PLANE / ROW : 1;                // rows of a plane
constexpr int ROW_PLANES = PLANE < ROW ? ROW / PLANE : 1;                // planes of a row
constexpr int SUMS = PLANE > ROW ? HEADS : ROWS;                         // of a thread: one for each plane or row
constexpr int WIDTH = SUMS > 4 ? 8 : SUMS > 2 ? 4 : SUMS;                // SUMS, or the next power of two
static_assert(SUMS <= 8 && PLANE % 512 == 0 && (PLANE % ROW == 0 || ROW % PLANE == 0), "planes of these sizes");
static_assert(SLOT % 512 == 0 && (SLOT % ROW == 0 || RUN <= SLOT), "pieces are whole rows, or all");

struct Arguments {
  const char* source;
  char* target;
  const uint64_t* constants;  // [2, PLANE / 8]
  uint64_t* digests;          // [blocks, layers, all heads], may be in host memory
  long long source_layer, source_block, source_half, target_layer, target_block, target_half;  // strides in bytes
  int blocks, layers, groups;  // groups of HEADS heads
  int source_ids[MOST_BLOCKS], target_ids[MOST_BLOCKS], valid[MOST_BLOCKS];  // valid: bytes of a plane that count
};

struct Unit {
  int block, layer, group;
};
__device__ __forceinline__ Unit unit_at(const Arguments& a, int number) {
  const int rest = number / a.groups;
  return {rest / a.layers, rest % a.layers, number % a.groups};
}
__device__ __forceinline__ uint64_t term(uint32_t low, uint32_t high, uint64_t constant) {
  const uint64_t word = (uint64_t)high << 32 | low;
  return (word ^ (word >> 33)) * constant;
}
__device__ __forceinline__ uint64_t from_lane(uint64_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ constexpr int piece_bytes(int piece) { return piece + 1 < PIECES ? SLOT : RUN - (PIECES - 1) * SLOT; }

__device__ __forceinline__ void load_pieces(const Arguments& a, int units, uint32_t ring, uint32_t full, uint32_t empty) {
  int at = 0, turn = 0;
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    const Unit unit = unit_at(a, number);
    const char* run = a.source + unit.layer * a.source_layer + a.source_ids[unit.block] * a.source_block + (long long)unit.group * RUN;
    for (int piece = 0; piece < 2 * PIECES; ++piece) {
      const int place = piece % PIECES, bytes = piece_bytes(place);
      const char* from = run + piece / PIECES * a.source_half + place * SLOT;
      if (turn) barrier_wait(empty + 8 * at, (turn + 1) & 1);
      barrier_expect(full + 8 * at, bytes);
      load_bytes(ring + at * SLOT, from, bytes, full + 8 * at);
      if (++at == STAGES) at = 0, ++turn;
    }
  }
}

__device__ __forceinline__ void store_pieces(const Arguments& a, int units, uint32_t ring, uint32_t full, uint32_t empty) {
  constexpr int LAG = 2;  // stores that may still read the ring
  int at = 0, turn = 0, done = 0;
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    const Unit unit = unit_at(a, number);
    char* run = a.target + unit.layer * a.target_layer + a.target_ids[unit.block] * a.target_block + (long long)unit.group * RUN;
    for (int piece = 0; piece < 2 * PIECES; ++piece) {
      const int place = piece % PIECES;
      char* to = run + piece / PIECES * a.target_half + place * SLOT;
      barrier_wait(full + 8 * at, turn & 1);
      store_bytes(to, ring + at * SLOT, piece_bytes(place));
      store_commit();
      if (done >= LAG) {
        store_wait_read_but<LAG>();
        barrier_arrive(empty + 8 * ((done - LAG) % STAGES));
      }
      ++done;
      if (++at == STAGES) at = 0, ++turn;
    }
  }
  store_wait();
}

// All sums of a warp side by side: one after the other takes four times as many exchanges. Afterwards lane i has the sum
// whose number the highest bits of i spell.
__device__ __forceinline__ uint64_t sum_of_lanes(uint64_t (&sums)[8]) {
  int mask = 16;
#pragma unroll
  for (int half = WIDTH / 2; half; half /= 2) {
    const bool upper = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const uint64_t given = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + from_lane(given, mask);
    }
    mask /= 2;
  }
  for (; mask; mask /= 2) sums[0] += from_lane(sums[0], mask);
  return sums[0];
}

__device__ __forceinline__ void digest_pieces(const Arguments& a, int units, const char* ring, uint32_t full, uint32_t empty) {
  __shared__ uint64_t parts[2][8][WIDTH];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int first = PLANE < ROW ? thread * 16 % PLANE : thread * 16;  // this thread's place in a plane, in its first row
  uint64_t constants[2][PLANE_ROWS][2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int row = 0; row < PLANE_ROWS; ++row)
#pragma unroll
      for (int word = 0; word < 2; ++word) constants[half][row][word] = a.constants[(half * PLANE + row * ROW + first) / 8 + word];
  int at = 0, turn = 0, side = 0;
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    const Unit unit = unit_at(a, number);
    const int valid = a.valid[unit.block];
    uint64_t sums[8] = {};
#pragma unroll
    for (int piece = 0; piece < 2 * PIECES; ++piece) {
      const int half = piece / PIECES, first_row = piece % PIECES * SLOT_ROWS;
      uint4 words[SLOT_ROWS];
      barrier_wait(full + 8 * at, turn & 1);
#pragma unroll
      for (int row = 0; row < SLOT_ROWS; ++row)
        if ((first_row + row) * ROW + thread * 16 < RUN)
          words[row] = *reinterpret_cast<const uint4*>(ring + at * SLOT + row * ROW + thread * 16);
        else
          words[row] = make_uint4(0, 0, 0, 0);
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * at);
      if (++at == STAGES) at = 0, ++turn;
#pragma unroll
      for (int row = 0; row < SLOT_ROWS; ++row) {
        if (first_row + row >= ROWS) continue;
        const int of_plane = (first_row + row) % PLANE_ROWS, place = of_plane * ROW + first;
        uint64_t sum = 0;
        if (place < valid) sum = term(words[row].x, words[row].y, constants[half][of_plane][0]);
        if (place + 8 < valid) sum += term(words[row].z, words[row].w, constants[half][of_plane][1]);
        sums[(first_row + row) / PLANE_ROWS] += sum;
      }
    }
    const uint64_t sum = sum_of_lanes(sums);
    if (lane % (32 / WIDTH) == 0) parts[side][warp][lane / (32 / WIDTH)] = sum;
    named_sync(1, 256);
    if (thread < HEADS) {
      constexpr int WARPS = 8 / ROW_PLANES;  // of a plane
      const int first_warp = thread % ROW_PLANES * WARPS;
      uint64_t digest = 0;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) digest += parts[side][first_warp + i][thread / ROW_PLANES];
      a.digests[((long long)(unit.block * a.layers + unit.layer) * a.groups + unit.group) * HEADS + thread] = digest;
    }
    side ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(320, 1) pull(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  const uint32_t at_ring = shared_address(ring), at_full = shared_address(full), at_empty = shared_address(empty);
  const int units = a.blocks * a.layers * a.groups, warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(at_full + 8 * i, 1), barrier_init(at_empty + 8 * i, 9);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp == 8) {
    if (threadIdx.x % 32 == 0) load_pieces(a, units, at_ring, at_full, at_empty);
  } else if (warp == 9) {
    if (threadIdx.x % 32 == 0) store_pieces(a, units, at_ring, at_full, at_empty);
  } else {
    digest_pieces(a, units, ring, at_full, at_empty);
  }
}
