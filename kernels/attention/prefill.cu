// Causal attention of prompt chunks over a paged KV cache, for Hopper: tiles of 128 queries of one head, 128 keys at a time.
//
// One warp fetches queries, and keys and values block by block of the cache, into shared memory. Two groups of 128 threads have 64
// queries each; they take turns: the matrix unit multiplies for one while the other computes its softmax. Within a group, the
// products of one step run beside the softmax of the next (FlashAttention-3, arXiv 2407.08608). With CLUSTER 2, two neighbouring
// heads that read the same keys are attended by two blocks, each of which loads half of the keys and values for both.
//
// Set by the compiler's options: H (head dim, 64 or 128), CLUSTER (1 or 2), TYPE.

struct Arguments {
  const int* table;   // block ids, a row per sequence
  const int* tiles;   // [num_tiles, 4]: first row, its position, rows (0: none), sequence
  uint16_t* out;      // [T, N, H]
  float scale;        // with log2(e)
  int table_stride;
  int num_tiles;
  int N, K;           // heads, KV heads
  int block_shift;    // log2 of the tokens per block
  int box_rows;       // rows of a box of the cache's map: at most 64
  int cache_rows;     // rows of the whole cache
  int window;         // newest keys that a query sees
};

constexpr int BM = 128, BN = 128, HALVES = H / 64;
constexpr int Q_BYTES = BM * H * 2, KV_BYTES = BN * H * 2, PART_BYTES = BN * 128;  // a part: 64 columns
constexpr int STAGES = 2;

// d[64, 128] (+)= q[64, 16] keys[128, 16]^T, both in shared memory.
__device__ __forceinline__ void scores_of(float (&d)[64], uint64_t a, uint64_t b, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, p, 1, 1, 0, 0; }"
      :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "r"(adds));
}
#if H == 128
// d[64, H] (+)= weights[64, 16] values[16, H]: the left operand in registers.
__device__ __forceinline__ void add_values(float (&d)[64], const uint32_t* a, uint64_t b, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
      :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}
#else
// d[64, H] (+)= weights[64, 16] values[16, H]: the left operand in registers.
__device__ __forceinline__ void add_values(float (&d)[32], const uint32_t* a, uint64_t b, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31 "
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
      :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}
#endif

struct Tile {
  int row, position, rows, sequence, head, first_block, last_block, stop, begin;
};

__device__ __forceinline__ Tile tile_at(const Arguments& a, int item, uint32_t rank) {
  Tile t;
  int heads = a.N / CLUSTER, z = item / heads;
  const int* at = a.tiles + z * 4;  // perhaps within a larger buffer, not at 16 bytes
  t.row = at[0], t.position = at[1], t.rows = at[2], t.sequence = at[3];
  t.head = item % heads * CLUSTER + rank;
  t.stop = t.position + t.rows;
  t.begin = max(t.position - a.window + 1, 0);
  t.first_block = t.begin / BN;
  t.last_block = (t.stop - 1) / BN;
  return t;
}

// Items are sorted by length; every other round is dealt backwards, so that no block gets all the longest of their rounds.
__device__ __forceinline__ int item_of(int round, int cluster, int clusters) {
  return round * clusters + (round % 2 ? clusters - 1 - cluster : cluster);
}

__device__ __forceinline__ void load_box(uint32_t to, const TensorMap* map, int x, int y, uint32_t barrier) {
  if (CLUSTER == 2) load_2d_to(to, map, x, y, barrier, 3);
  else load_2d(to, map, x, y, barrier);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER == 2
    __cluster_dims__(2, 1, 1)
#endif
        prefill(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap cache_map,
                const __grid_constant__ TensorMap out_map, const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t raw[];
  uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  uint32_t queries = shared, keys = queries + 2 * Q_BYTES, values = keys + STAGES * KV_BYTES;
  uint32_t barriers = values + STAGES * KV_BYTES;
  uint32_t q_full = barriers, q_empty = barriers + 16, k_full = barriers + 32, k_empty = barriers + 48;
  uint32_t v_full = barriers + 64, v_empty = barriers + 80;
  uint32_t rank = CLUSTER == 2 ? cluster_rank() : 0;
  int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, items = a.num_tiles * (a.N / CLUSTER);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      barrier_init(q_full + s * 8, 1);
      barrier_init(q_empty + s * 8, 2);
      barrier_init(k_full + s * 8, 1);
      barrier_init(v_full + s * 8, 1);
      barrier_init(k_empty + s * 8, 2 * CLUSTER);
      barrier_init(v_empty + s * 8, 2 * CLUSTER);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (CLUSTER == 2) cluster_sync();
  int group = threadIdx.x / 128;
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x < 32) {
      int lane = threadIdx.x, boxes = BN / a.box_rows * HALVES, s = 0, phase = 0, b = 0, q_phase = 0;
      for (int round = 0;; round++) {
        int item = item_of(round, cluster, clusters);
        if (round * clusters >= items) break;
        if (item >= items) continue;
        Tile t = tile_at(a, item, rank);
        if (t.rows == 0) continue;
        barrier_wait(q_empty + b * 8, q_phase ^ 1);
        if (lane == 0) barrier_expect(q_full + b * 8, Q_BYTES);
        __syncwarp();
        if (lane < 2 * HALVES) {  // 64 rows, 64 columns each
          load_2d(queries + b * Q_BYTES + lane / 2 * PART_BYTES + lane % 2 * (PART_BYTES / 2), &q_map, t.head * H + lane / 2 * 64,
                  t.row + lane % 2 * 64, q_full + b * 8);
        }
        if (++b == 2) b = 0, q_phase ^= 1;
        // A box per lane; where its keys are is looked up a step ahead.
        int box = lane * CLUSTER + rank, half = box % HALVES, first = box / HALVES * a.box_rows;
        int kv_head = t.head / (a.N / a.K), mask = (1 << a.block_shift) - 1;
        const int* row_table = a.table + (size_t)t.sequence * a.table_stride;
        auto find = [&](int n) {
          int key = n * BN + first;
          if (box >= boxes || n < t.first_block || key >= t.stop || key + a.box_rows <= t.begin) return a.cache_rows;  // zeros
          return ((row_table[key >> a.block_shift] * 2 * a.K + kv_head) << a.block_shift) + (key & mask);
        };
        int found = find(t.last_block);
        for (int n = t.last_block; n >= t.first_block; n--) {
          int at = found;
          found = find(n - 1);
          for (int is_value = 0; is_value < 2; is_value++) {
            uint32_t full = (is_value ? v_full : k_full) + s * 8, to = (is_value ? values : keys) + s * KV_BYTES;
            barrier_wait((is_value ? v_empty : k_empty) + s * 8, phase ^ 1);
            if (lane == 0) barrier_expect(full, KV_BYTES);
            __syncwarp();
            int y = at + (is_value && at < a.cache_rows ? a.K << a.block_shift : 0);
            if (box < boxes) load_box(to + half * PART_BYTES + first * 128, &cache_map, half * 64, y, full);
          }
          if (++s == STAGES) s = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    more_registers<232>();
    int part = group - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    int matrix_row = warp * 16 + (lane / 8 % 2) * 8 + lane % 8, matrix_block = lane / 16;
    int s = 0, phase = 0, b = 0, q_phase = 0;
    bool is_stored = false;  // a result leaves from the other buffer of queries
    if (part == 1) asm volatile("bar.arrive 4, 256;" ::: "memory");  // the first group is first
    for (int round = 0;; round++) {
      int item = item_of(round, cluster, clusters);
      if (round * clusters >= items) break;
      if (item >= items) continue;
      Tile t = tile_at(a, item, rank);
      if (t.rows == 0) continue;
      int first = t.position + part * 64, low = first + warp * 16 + lane / 4;  // positions of queries; the other: low + 8
      uint32_t mine = queries + b * Q_BYTES + part * (PART_BYTES / 2);
      float scores[64], acc[H / 2], high[2] = {-1e30f, -1e30f}, total[2] = {0.0f, 0.0f};
      uint32_t weights[32];

      auto multiply_keys = [&](int stage) {
#pragma unroll
        for (int i = 0; i < H / 16; i++) {
          scores_of(scores, rows_descriptor(mine + i / 4 * PART_BYTES) + i % 4 * 2,
                    rows_descriptor(keys + stage * KV_BYTES + i / 4 * PART_BYTES) + i % 4 * 2, i > 0);
        }
        wgmma_commit();
      };
      auto multiply_values = [&](int stage, int adds) {
#pragma unroll
        for (int i = 0; i < BN / 16; i++) {
          add_values(acc, weights + i * 4, columns_descriptor(values + stage * KV_BYTES, PART_BYTES) + i * 128, i > 0 ? 1 : adds);
        }
        wgmma_commit();
      };
      // Scores become weights; `shrink` is what earlier sums are multiplied by.
      auto soften = [&](int n, float (&shrink)[2]) {
        int key = n * BN + lane % 4 * 2;
        if (n * BN + BN - 1 > first || n * BN < first + 63 - a.window + 1) {
#pragma unroll
          for (int i = 0; i < 64; i++) {
            int distance = low + (i % 4 / 2) * 8 - (key + i / 4 * 8 + i % 2);
            if (distance < 0 || distance >= a.window) scores[i] = -__int_as_float(0x7f800000);
          }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float top = high[r];
#pragma unroll
          for (int i = 0; i < 16; i++) top = fmaxf(top, fmaxf(scores[i * 4 + r * 2], scores[i * 4 + r * 2 + 1]));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          shrink[r] = exp2_fast((high[r] - top) * a.scale);
          high[r] = top;
          float offset = top * a.scale, sum = 0.0f;
#pragma unroll
          for (int i = 0; i < 16; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
              float& x = scores[i * 4 + r * 2 + j];
              x = exp2_fast(fmaf(x, a.scale, -offset));
              sum += x;
            }
          }
          total[r] = total[r] * shrink[r] + sum;
        }
      };
      auto pack_weights = [&]() {
#pragma unroll
        for (int i = 0; i < 32; i++) weights[i] = pack(scores[i * 2], scores[i * 2 + 1]);
      };
      auto release = [&](uint32_t barrier) {
        if (CLUSTER == 2) {
          if (thread < 2) barrier_arrive_in(barrier, thread);
        } else {
          if (thread == 0) barrier_arrive(barrier);
        }
      };

      barrier_wait(q_full + b * 8, q_phase);
      barrier_wait(k_full + s * 8, phase);
      wgmma_fence();
      multiply_keys(s);
      wgmma_wait<0>();
      release(k_empty + s * 8);
      float shrink[2];
      soften(t.last_block, shrink);
      pack_weights();
      if (is_stored && thread == 0) {
        store_wait_read();
        barrier_arrive(q_empty + (b ^ 1) * 8);
      }
      int end = t.stop - t.last_block * BN;  // values past the last key: anything, NaN perhaps, and a weight of 0
      if (end < BN) {
        barrier_wait(v_full + s * 8, phase);
        int filled = min(BN, (end + a.box_rows - 1) / a.box_rows * a.box_rows);
        for (int i = threadIdx.x - 128; i < (filled - end) * (H / 8); i += 256) {
          uint32_t at = values + s * KV_BYTES + i % (H / 8) / 8 * PART_BYTES + (end + i / (H / 8)) * 128 + i % 8 * 16;
          asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
        }
        fence_async();
        named_sync(3, 256);
      }
      int adds = 0;
      for (int n = t.last_block - 1; n >= t.first_block; n--) {
        int next = s ^ 1, next_phase = next ? phase : phase ^ 1;
        barrier_wait(k_full + next * 8, next_phase);
        asm volatile("bar.sync %0, 256;" ::"r"(4 + part) : "memory");
        wgmma_fence();
        multiply_keys(next);
        barrier_wait(v_full + s * 8, phase);
        multiply_values(s, adds);
        asm volatile("bar.arrive %0, 256;" ::"r"(5 - part) : "memory");
        wgmma_wait<1>();
        release(k_empty + next * 8);
        soften(n, shrink);
        wgmma_wait<0>();
        release(v_empty + s * 8);
#pragma unroll
        for (int i = 0; i < H / 2; i++) acc[i] *= shrink[i % 4 / 2];
        pack_weights();
        adds = 1;
        s = next, phase = next_phase;
      }
      barrier_wait(v_full + s * 8, phase);
      wgmma_fence();
      multiply_values(s, adds);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        factor[r] = 1.0f / total[r];
      }
      wgmma_wait<0>();
      release(v_empty + s * 8);
      if (s) phase ^= 1;
      s ^= 1;

      named_sync(1 + part, 128);  // the queries have been read
#pragma unroll
      for (int p = 0; p < H / 16; p++) {
        uint32_t y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int g = (p * 2 + i / 2) * 4 + i % 2 * 2;
          y[i] = pack(acc[g] * factor[i % 2], acc[g + 1] * factor[i % 2]);
        }
        store_matrices(mine + p / 4 * PART_BYTES + matrix_row * 128 + (((p % 4 * 2 + matrix_block) ^ (lane % 8)) << 4), y[0], y[1], y[2],
                       y[3]);
      }
      fence_async();
      named_sync(1 + part, 128);
      int rows = t.rows - part * 64;
      if (rows >= 64) {
        if (thread == 0) {
          for (int half = 0; half < HALVES; half++)
            store_2d(&out_map, mine + half * PART_BYTES, t.head * H + half * 64, t.row + part * 64);
          store_commit();
        }
      } else {  // the rows that follow are another tile's
        for (int i = thread; i < rows * (H / 8); i += 128) {
          int row = i / (H / 8), column = i % (H / 8);
          uint4 y;
          asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                       : "r"(mine + column / 8 * PART_BYTES + row * 128 + ((column % 8 ^ row % 8) << 4))
                       : "memory");
          *(uint4*)(a.out + ((size_t)(t.row + part * 64 + row) * a.N + t.head) * H + column * 8) = y;
        }
        named_sync(1 + part, 128);
      }
      is_stored = true;
      if (++b == 2) b = 0, q_phase ^= 1;
    }
    if (thread == 0) store_wait();
  }
  if (CLUSTER == 2) cluster_sync();  // no block ends while the other may write into its shared memory
}
