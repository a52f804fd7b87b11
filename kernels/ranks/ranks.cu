// What the ranks of a gang exchange in a step, by stores into each other's memory: kernels/ranks/cuda_ranks.py.
//
// add_norm_pushed: few rows. A block per row sends its part to all ranks, and every rank sums the row. Each 8 bytes travel with their own
//     flag, so that no fence and no second trip is needed. Messages of successive calls lie in two inboxes by turns: a rank sends those of
//     call n + 2 after it has all of call n + 1, which their senders sent after they had read call n. So nothing is overwritten unread.
// add_norm_flagged: the same with one flag per row, for which its sender waits until the row is there, so that half as many bytes travel.
// add_norm_shared: many rows. Each rank sums its share of them, reading the others' parts, and writes the normed rows to all. Blocks of the
//     same number on all ranks meet twice: when the parts are there, and when the rows are.
// choose: each rank's best token per row, as the first one.
//
// Sums are in rank order, so that all ranks have the same bits. No rank waits longer than `limit_ns`: then a fault is left for the host, the
// results are wrong, and the waits of later calls end at once.
//
// Constants: RANKS; D numbers per row; THREADS; BLOCKS of the largest grid of add_norm_shared; IS_FLOAT32, else two bytes of TYPE.

#define WARPS (THREADS / 32)
#define ALL 0xffffffffu
#define NO_PLACE -1
#define NOTHING_LEFT -2
#define SPINS_BETWEEN_LOOKS 1024
#if IS_FLOAT32
#define PER_WORD 2  // numbers in 8 bytes
#else
#define PER_WORD 4
#endif
#define WORDS (D / PER_WORD)
#define WORDS_PER_THREAD ((WORDS + THREADS - 1) / THREADS)
#define PIECES (WORDS / 2)  // of 16 bytes
#define PIECES_PER_THREAD ((PIECES + THREADS - 1) / THREADS)
#define INFINITE __int_as_float(0x7f800000)

struct Peers {
  char* memories[8];      // of RANKS, the own among them
  uint32_t* fault;        // 1 + the rank that was not waited for any longer
  uint32_t* host_fault;
  uint64_t limit_ns;
  int rank;
};

struct SumArguments {
  Peers peers;
  const void* part;
  const void* before;  // the residual before; null: there is none
  void* residual;
  const void* gain;
  void* out;
  uint32_t* calls;  // until now, per block
  uint64_t inbox_at, part_at, residual_at, out_at, flags_at, row_flags_at;  // in each memory
  int num_rows, max_rows, is_whole;
  float epsilon;
};

struct ChoiceArguments {
  Peers peers;
  const float* scores;  // [num_rows, chunks]
  const int* places;
  uint32_t* calls;  // per row
  long long* tokens;
  const int* slots;
  int* newest;
  uint64_t inbox_at;
  int chunks, max_rows, first;
};

// ---- between ranks
__device__ __forceinline__ void send(char* to, uint32_t low, uint32_t high, uint32_t call) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(low), "r"(call), "r"(high), "r"(call) : "memory");
}
__device__ __forceinline__ uint4 look(const char* at) {
  uint4 message;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(message.x), "=r"(message.y), "=r"(message.z), "=r"(message.w)
               : "l"(at)
               : "memory");
  return message;
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
template <typename IsThere>
__device__ __forceinline__ void await(const Peers& peers, int peer, IsThere is_there) {
  uint64_t since = 0;
  for (uint32_t spins = 1; !is_there(); spins++) {
    if (spins % SPINS_BETWEEN_LOOKS) continue;
    if (*(volatile uint32_t*)peers.fault) return;
    const uint64_t now = now_ns();
    if (!since) since = now;
    if (now - since <= peers.limit_ns) continue;
    *(volatile uint32_t*)peers.fault = 1 + peer;
    *(volatile uint32_t*)peers.host_fault = 1 + peer;
    __threadfence_system();
    return;
  }
}
__device__ __forceinline__ uint4 receive(const Peers& peers, int peer, const char* at, uint4 message, uint32_t call) {
  await(peers, peer, [&] {
    if (message.y == call && message.w == call) return true;
    message = look(at);
    return false;
  });
  return message;
}
// Blocks of the same number on all ranks have come here. What each wrote before, to any memory, the others may read. Flags are [RANKS, count].
__device__ __forceinline__ void meet_at(const SumArguments& a, uint64_t flags_at, int count, int block, uint32_t call) {
  __syncthreads();
  const int peer = threadIdx.x, rank = a.peers.rank;
  if (peer < RANKS) {
    char* theirs = a.peers.memories[peer] + flags_at + (rank * count + block) * 4;
    const char* mine = a.peers.memories[rank] + flags_at + (peer * count + block) * 4;
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(call) : "memory");
    await(a.peers, peer, [&] {
      uint32_t seen;
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
      return seen == call;
    });
  }
  __syncthreads();
}

// ---- rows
__device__ __forceinline__ void widen(uint32_t low, uint32_t high, float* x) {
#if IS_FLOAT32
  x[0] = __uint_as_float(low), x[1] = __uint_as_float(high);
#else
  x[0] = unpack_low(low), x[1] = unpack_high(low), x[2] = unpack_low(high), x[3] = unpack_high(high);
#endif
}
__device__ __forceinline__ uint2 narrow(const float* x) {
#if IS_FLOAT32
  return make_uint2(__float_as_uint(x[0]), __float_as_uint(x[1]));
#else
  return make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
#endif
}
// x += the next rank's part.
__device__ __forceinline__ void add(float* sum, uint32_t low, uint32_t high, bool is_first) {
  float x[PER_WORD];
  widen(low, high, x);
#pragma unroll
  for (int k = 0; k < PER_WORD; k++) sum[k] = is_first ? x[k] : sum[k] + x[k];
}
// The residual in its own type, and the sum of its squares.
__device__ __forceinline__ uint2 add_residual(float* sum, uint2 before, bool has_residual, float& squares) {
  if (has_residual) {
    float x[PER_WORD];
    widen(before.x, before.y, x);
#pragma unroll
    for (int k = 0; k < PER_WORD; k++) sum[k] = x[k] + sum[k];
  }
  const uint2 rounded = narrow(sum);
  widen(rounded.x, rounded.y, sum);
#pragma unroll
  for (int k = 0; k < PER_WORD; k++) squares += sum[k] * sum[k];
  return rounded;
}
__device__ __forceinline__ uint2 normed(const float* x, uint32_t gain_low, uint32_t gain_high, float factor) {
  float gain[PER_WORD], y[PER_WORD];
  widen(gain_low, gain_high, gain);
#pragma unroll
  for (int k = 0; k < PER_WORD; k++) y[k] = x[k] * factor * gain[k];
  return narrow(y);
}
__device__ __forceinline__ float norm_factor(float squares, float epsilon, float* warp_squares) {
  for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(ALL, squares, step);
  if (threadIdx.x % 32 == 0) warp_squares[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) squares += warp_squares[w];
  return rsqrtf(squares / D + epsilon);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_norm_pushed(const __grid_constant__ SumArguments a) {
  __shared__ float warp_squares[WARPS];
  const int row = blockIdx.x, rank = a.peers.rank;
  const uint64_t row_at = (uint64_t)row * WORDS;
  uint2 gain[WORDS_PER_THREAD], mine[WORDS_PER_THREAD], before[WORDS_PER_THREAD];
  constexpr bool LOOKS_AHEAD = RANKS * WORDS_PER_THREAD * THREADS <= 4096;  // all of a thread's messages are in registers at once
  uint4 got[RANKS][LOOKS_AHEAD ? WORDS_PER_THREAD : 1];
#define EACH_WORD(i, at)                                                                                 \
  _Pragma("unroll") for (int i = 0, at = threadIdx.x; i < WORDS_PER_THREAD; i++, at += THREADS) if (WORDS % THREADS == 0 || at < WORDS)
  EACH_WORD(i, at) gain[i] = ((const uint2*)a.gain)[at];
  wait_for_predecessor();
  start_successor();
  const uint32_t call = a.calls[row] + 1;
  const uint64_t turn_at = a.inbox_at + (uint64_t)(call & 1) * RANKS * a.max_rows * WORDS * 16;
#define INBOX(memory, source, at) ((memory) + turn_at + (((uint64_t)(source) * a.max_rows + row) * WORDS + (at)) * 16)
  EACH_WORD(i, at) mine[i] = ((const uint2*)a.part)[row_at + at];
#pragma unroll
  for (int step = 1; step < RANKS; step++) {
    char* memory = a.peers.memories[(rank + step) % RANKS];
    EACH_WORD(i, at) send(INBOX(memory, rank, at), mine[i].x, mine[i].y, call);
  }
  if (a.before) EACH_WORD(i, at) before[i] = ((const uint2*)a.before)[row_at + at];
  const char* own = a.peers.memories[rank];
  if (LOOKS_AHEAD)
#pragma unroll
    for (int r = 0; r < RANKS; r++)
      if (r != rank) EACH_WORD(i, at) got[r][LOOKS_AHEAD ? i : 0] = look(INBOX(own, r, at));
  float x[WORDS_PER_THREAD][PER_WORD], squares = 0;
  EACH_WORD(i, at) {
    const int g = LOOKS_AHEAD ? i : 0;
    if (!LOOKS_AHEAD)
#pragma unroll
      for (int r = 0; r < RANKS; r++)
        if (r != rank) got[r][g] = look(INBOX(own, r, at));
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      if (r != rank) got[r][g] = receive(a.peers, r, INBOX(own, r, at), got[r][g], call);
      add(x[i], r == rank ? mine[i].x : got[r][g].x, r == rank ? mine[i].y : got[r][g].z, r == 0);
    }
    ((uint2*)a.residual)[row_at + at] = add_residual(x[i], before[i], a.before, squares);
  }
  const float factor = norm_factor(squares, a.epsilon, warp_squares);
  EACH_WORD(i, at) ((uint2*)a.out)[row_at + at] = normed(x[i], gain[i].x, gain[i].y, factor);
  if (threadIdx.x == 0) a.calls[row] = call;
}

__device__ __forceinline__ uint4 load_peer(const char* at) {
  uint4 piece;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "l"(at)
               : "memory");
  return piece;
}

#define EACH_PIECE(i, at)                                                                                   \
  _Pragma("unroll") for (int i = 0, at = threadIdx.x; i < PIECES_PER_THREAD; i++, at += THREADS) if (PIECES % THREADS == 0 || at < PIECES)

// A row of D numbers: its parts to the residual, which is returned, and the sums before it is rounded to `x`.
__device__ __forceinline__ uint4 sum_piece(const uint4 (&parts)[RANKS], uint4 before, bool has_residual, float (&x)[2][PER_WORD], float& squares) {
#pragma unroll
  for (int r = 0; r < RANKS; r++) add(x[0], parts[r].x, parts[r].y, r == 0), add(x[1], parts[r].z, parts[r].w, r == 0);
  const uint2 low = add_residual(x[0], make_uint2(before.x, before.y), has_residual, squares);
  const uint2 high = add_residual(x[1], make_uint2(before.z, before.w), has_residual, squares);
  return make_uint4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ uint4 normed_piece(const float (&x)[2][PER_WORD], uint4 gain, float factor) {
  const uint2 low = normed(x[0], gain.x, gain.y, factor), high = normed(x[1], gain.z, gain.w, factor);
  return make_uint4(low.x, low.y, high.x, high.y);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_norm_flagged(const __grid_constant__ SumArguments a) {
  __shared__ float warp_squares[WARPS];
  const int row = blockIdx.x, rank = a.peers.rank;
  uint4 gain[PIECES_PER_THREAD], before[PIECES_PER_THREAD], parts[PIECES_PER_THREAD][RANKS];
  EACH_PIECE(i, at) gain[i] = ((const uint4*)a.gain)[at];
  wait_for_predecessor();
  start_successor();
  const uint32_t call = a.calls[row] + 1;
  const uint64_t row_at = (uint64_t)row * PIECES, turn_at = a.inbox_at + (uint64_t)(call & 1) * RANKS * a.max_rows * PIECES * 16;
#define ROW_OF(memory, source, at) ((memory) + turn_at + (((uint64_t)(source) * a.max_rows + row) * PIECES + (at)) * 16)
  uint4 mine[PIECES_PER_THREAD];
  EACH_PIECE(i, at) mine[i] = ((const uint4*)a.part)[row_at + at];
#pragma unroll
  for (int step = 1; step < RANKS; step++) {
    char* memory = a.peers.memories[(rank + step) % RANKS];
    EACH_PIECE(i, at) *(uint4*)ROW_OF(memory, rank, at) = mine[i];
  }
  if (a.before) EACH_PIECE(i, at) before[i] = ((const uint4*)a.before)[row_at + at];
  meet_at(a, a.row_flags_at, a.max_rows, row, call);
  const char* own = a.peers.memories[rank];
  EACH_PIECE(i, at)
#pragma unroll
  for (int r = 0; r < RANKS; r++) parts[i][r] = r == rank ? mine[i] : load_peer(ROW_OF(own, r, at));
  float x[PIECES_PER_THREAD][2][PER_WORD], squares = 0;
  EACH_PIECE(i, at) ((uint4*)a.residual)[row_at + at] = sum_piece(parts[i], before[i], a.before, x[i], squares);
  const float factor = norm_factor(squares, a.epsilon, warp_squares);
  EACH_PIECE(i, at) ((uint4*)a.out)[row_at + at] = normed_piece(x[i], gain[i], factor);
  if (threadIdx.x == 0) a.calls[row] = call;
}

extern "C" __global__ void __launch_bounds__(THREADS) add_norm_shared(const __grid_constant__ SumArguments a) {
  __shared__ float warp_squares[2][WARPS];
  const int rank = a.peers.rank, share = (a.num_rows + RANKS - 1) / RANKS;
  const int first = rank * share + blockIdx.x, last = min(rank * share + share, a.num_rows);
  uint4 gain[PIECES_PER_THREAD], before[PIECES_PER_THREAD], parts[PIECES_PER_THREAD][RANKS];
  EACH_PIECE(i, at) gain[i] = ((const uint4*)a.gain)[at];
  wait_for_predecessor();
  start_successor();
  const uint32_t call = a.calls[blockIdx.x] + 1;
  meet_at(a, a.flags_at, BLOCKS, blockIdx.x, call);
#define LOAD_ROW(row)                                                                                                                   \
  EACH_PIECE(i, at) {                                                                                                                   \
    const uint64_t place = ((uint64_t)(row) * PIECES + at) * 16;                                                                        \
    _Pragma("unroll") for (int r = 0; r < RANKS; r++) parts[i][r] = load_peer(a.peers.memories[r] + a.part_at + place);                 \
    if (a.before) before[i] = *(const uint4*)((const char*)a.before + place);                                                           \
  }
  if (first < last) LOAD_ROW(first)
  for (int row = first, turn = 0; row < last; row += gridDim.x, turn ^= 1) {
    float x[PIECES_PER_THREAD][2][PER_WORD], squares = 0;
    uint4 residual[PIECES_PER_THREAD];
    EACH_PIECE(i, at) residual[i] = sum_piece(parts[i], before[i], a.before, x[i], squares);
    if (row + gridDim.x < last) LOAD_ROW(row + gridDim.x)
    const float factor = norm_factor(squares, a.epsilon, warp_squares[turn]);
    EACH_PIECE(i, at) {
      const uint64_t place = ((uint64_t)row * PIECES + at) * 16;
      const uint4 piece = normed_piece(x[i], gain[i], factor);
      if (!a.is_whole) *(uint4*)((char*)a.residual + place) = residual[i];
#pragma unroll
      for (int step = 0; step < RANKS; step++) {
        char* memory = a.peers.memories[(rank + step) % RANKS];
        *(uint4*)(memory + a.out_at + place) = piece;
        if (a.is_whole) *(uint4*)(memory + a.residual_at + place) = residual[i];
      }
    }
  }
  meet_at(a, a.flags_at + (uint64_t)RANKS * BLOCKS * 4, BLOCKS, blockIdx.x, call);
  if (threadIdx.x == 0) a.calls[blockIdx.x] = call;
}

// One warp per row. Of equal scores the first token counts.
extern "C" __global__ void __launch_bounds__(32) choose(const __grid_constant__ ChoiceArguments a) {
  const int row = blockIdx.x, lane = threadIdx.x, rank = a.peers.rank;
  wait_for_predecessor();
  start_successor();
  const uint32_t call = a.calls[row] + 1;
  float score = -INFINITE;
  int token = 0x7fffffff;
  for (int i = lane; i < a.chunks; i += 32) {
    const float other = a.scores[row * a.chunks + i];
    if (other > score) score = other, token = a.places[row * a.chunks + i];
  }
#define TAKE_BETTER(from)                                                                               \
  {                                                                                                     \
    const float other = __shfl_xor_sync(ALL, score, from);                                              \
    const int place = __shfl_xor_sync(ALL, token, from);                                                \
    if (other > score || (other == score && place < token)) score = other, token = place;               \
  }
  for (int step = 16; step; step /= 2) TAKE_BETTER(step)
  if (token != 0x7fffffff) token += a.first;
  const uint64_t turn_at = a.inbox_at + (uint64_t)(call & 1) * RANKS * a.max_rows * 16;
  if (lane < RANKS && lane != rank) {
    send(a.peers.memories[lane] + turn_at + ((uint64_t)rank * a.max_rows + row) * 16, __float_as_uint(score), token, call);
    const char* at = a.peers.memories[rank] + turn_at + ((uint64_t)lane * a.max_rows + row) * 16;
    const uint4 message = receive(a.peers, lane, at, look(at), call);
    score = __uint_as_float(message.x), token = message.z;
  } else if (lane >= RANKS) {
    score = -INFINITE, token = 0x7fffffff;
  }
  __syncwarp();
  for (int step = 16; step; step /= 2) TAKE_BETTER(step)
  if (lane == 0) {
    token = score == INFINITE ? NO_PLACE : score == -INFINITE ? NOTHING_LEFT : token;
    a.tokens[row] = token;
    if (a.slots) a.newest[a.slots[row]] = max(token, 0);
    a.calls[row] = call;
  }
}
