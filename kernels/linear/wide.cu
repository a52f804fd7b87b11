// Gated products of 193 to 1,024 rows: out[M, N / 2] = silu(x gate^T) * (x up^T), gate and up in turn the rows of w[N, K], for Hopper.
//
// A block computes tiles of 128 rows of x by BN rows of w: one thread loads 64 columns of both at a time into a ring of stages; two groups
// of 128 threads multiply, 64 rows each, and finish their part. A cluster has CM blocks below each other, each of which loads a part of
// the weight's rows for all.
//
// Weights are on their way before the kernel that makes x is over; x and all else is read behind the wait.
//
// Set by the compiler's options: BN (a multiple of 16 CM, at most 256), CM (1 to 3), STAGES, TYPE, and of the matrix instruction:
// SUM_REGISTERS, SUM_OPERANDS, X_OPERAND, W_OPERAND, ADDS_OPERAND.

struct Arguments {
  uint16_t* out;
  int M, N, K;
};

constexpr int BM = 128, BK = 64, GROUPS = 2;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CHUNK_BYTES = 64 * 64 * 2;  // 64 rows, 64 columns of a result
constexpr int OUT_COLUMNS = BN / 2, RESULT_BYTES = (OUT_COLUMNS + 63) / 64 * CHUNK_BYTES;  // of one group of threads

// d[64 rows, BN] (+)= a[64, 16] w[BN, 16]^T, both in shared memory.
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
__device__ __forceinline__ void multiply(float (&d)[BN / 2], uint64_t a, uint64_t w, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADDS_OPERAND ", 0; wgmma.mma_async.sync.aligned.m64n" TEXT(BN) "k16.f32." TYPE "." TYPE
               " {" SUM_REGISTERS "}, " X_OPERAND ", " W_OPERAND ", p, 1, 1, 0, 0; }"
               : SUM_OPERANDS
               : "l"(a), "l"(w), "r"(adds));
}

__device__ __forceinline__ float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// 8 gates, the 8 values to which they belong, the next 8 gates.
__device__ __forceinline__ void load_weight(uint32_t to, const TensorMap* map, int k, int first, uint32_t full) {
  if (CM > 1) load_4d_to(to, map, k, 0, 0, first / 16, full, (1 << CM) - 1);
  else load_4d(to, map, k, 0, 0, first / 16, full);
}

// A group's part of a tile: through shared memory, so that a thread stores 16 bytes.
__device__ __forceinline__ void store_gated(const Arguments& a, const float (&d)[BN / 2], int first, int column, uint32_t result, int group) {
  int thread = threadIdx.x % 128, lane = thread % 32, num_columns = a.N / 2;
  // Of the 8 x 8 matrices that this lane addresses: row of the group's 64, and which of two neighbouring blocks of 8 columns.
  int matrix_row = thread / 32 * 16 + (lane / 8 % 2) * 8 + lane % 8, matrix_block = lane / 16;
  named_sync(group, 128);  // the tile before has been stored
#pragma unroll
  for (int block = 0; block < OUT_COLUMNS / 8; block += 2) {
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* x = d + (block + i / 2) * 8 + i % 2 * 2;
      y[i] = block + i / 2 < OUT_COLUMNS / 8 ? pack(silu_times(x[0], x[4]), silu_times(x[1], x[5])) : 0;
    }
    store_matrices(result + block / 8 * CHUNK_BYTES + matrix_row * 128 + (((block % 8 + matrix_block) ^ (lane % 8)) << 4), y[0], y[1], y[2], y[3]);
  }
  named_sync(group, 128);
  for (int i = thread; i < 64 * (OUT_COLUMNS / 8); i += 128) {
    int row = i / (OUT_COLUMNS / 8), piece = i % (OUT_COLUMNS / 8);
    if (first + row >= a.M || column + piece * 8 >= num_columns) continue;
    uint4 y;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                 : "r"(result + piece / 8 * CHUNK_BYTES + row * 128 + ((piece % 8 ^ row % 8) << 4))
                 : "memory");
    *(uint4*)(a.out + (size_t)(first + row) * num_columns + column + piece * 8) = y;
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CM > 1
    __cluster_dims__(CM, 1, 1)
#endif
        wide(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t raw[];
  uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  uint32_t results = shared + STAGES * STAGE_BYTES, full = results + GROUPS * RESULT_BYTES, empty = full + STAGES * 8;
  uint32_t rank = CM > 1 ? cluster_rank() : 0;
  int tiles_m = (a.M + CM * BM - 1) / (CM * BM), tiles = tiles_m * ((a.N + BN - 1) / BN);
  int clusters = gridDim.x / CM, steps = (a.K + BK - 1) / BK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, GROUPS * CM);  // the groups of each block that this one loads for
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (CM > 1) cluster_sync();
  int group = threadIdx.x / 128;
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      auto load_w = [&](int s, int tile, int k) {
        barrier_expect(full + s * 8, STAGE_BYTES);
        uint32_t to = shared + s * STAGE_BYTES + X_BYTES + rank * (W_BYTES / CM);
        load_weight(to, &w_map, k * BK, tile / tiles_m * BN + rank * (BN / CM), full + s * 8);
      };
      int s = 0, phase = 0, ahead = min(steps, STAGES);
      // Weights of the first stages, then the wait, then what they are multiplied with.
      for (int i = 0; i < ahead; i++) load_w(i, blockIdx.x / CM, i);
      wait_for_predecessor();
      start_successor();
      for (int tile = blockIdx.x / CM; tile < tiles; tile += clusters) {
        for (int k = 0; k < steps; k++) {
          if (ahead > 0) {
            ahead--;
          } else {
            barrier_wait(empty + s * 8, phase ^ 1);
            load_w(s, tile, k);
          }
          load_2d(shared + s * STAGE_BYTES, &x_map, k * BK, (tile % tiles_m * CM + rank) * BM, full + s * 8);
          if (++s == STAGES) s = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    more_registers<232>();
    wait_for_predecessor();
    int part = group - 1, thread = threadIdx.x % 128, s = 0, phase = 0;
    float d[BN / 2];
    auto release = [&](int stage) {  // of the blocks that load for this one
      if (CM == 1 && thread == 0) barrier_arrive(empty + stage * 8);
      if (CM > 1 && thread < CM) barrier_arrive_in(empty + stage * 8, thread);
    };
    for (int tile = blockIdx.x / CM; tile < tiles; tile += clusters) {
      int first = (tile % tiles_m * CM + rank) * BM + part * 64;
      int last = 0;
      for (int k = 0; k < steps; k++) {
        barrier_wait(full + s * 8, phase);
        uint32_t from = shared + s * STAGE_BYTES;
        uint64_t x = rows_descriptor(from + part * (X_BYTES / GROUPS)), w = rows_descriptor(from + X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BK / 16; i++) multiply(d, x + i * 2, w + i * 2, i > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (k > 0) release(last);
        last = s;
        if (++s == STAGES) s = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      release(last);
      store_gated(a, d, first, tile / tiles_m * OUT_COLUMNS, results + part * RESULT_BYTES, group);
    }
  }
  if (CM > 1) cluster_sync();  // no block ends while the other may write into its shared memory
}
