// Products of many rows with what follows them: out[M, N] = x[M, K] w[N, K]^T, tiles of 128 x 256, for Hopper.
//
// A cluster of two blocks computes two tiles below each other; each loads half of the weight's rows for both. In a block, one thread
// loads 64 columns of x and w at a time into a ring of stages; two groups of 128 threads multiply, 64 rows each, and finish their part.
//
// Set by the compiler's options: EPILOGUE (0 plain, 1 gated, 2 residual, 3 heads), SCALED, TYPE, and for heads H (head dim, 64 or 128).

struct Arguments {
  const float* squares;  // [M, num_squares], whose sum over a row, divided by K, is the mean square of the row
  const uint16_t* gain;  // [N]
  float* squares_out;    // [M, tiles of N]
  float epsilon;
  int num_squares;
  int M, N, K;      // N: rows of the weight
  int group_pairs;  // pairs of tiles below each other that share what they read of the weight
  // Of heads: queries leave through `out`, keys and values go into the cache.
  const float* rope;      // a row per position: cosines of H / 2 angles, then their sines
  const int* positions;   // [M]
  const int* slots;       // [M], block * tokens per block + offset; -1: not stored
  uint16_t* cache;        // [blocks, 2 * kv_heads, tokens per block, H]
  int query_heads, kv_heads, block_shift;
};

constexpr int BM = 128, BN = 256, BK = 64;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CHUNK_BYTES = 64 * 64 * 2;  // 64 rows, 64 columns of a result
constexpr int CHUNKS = EPILOGUE == 1 ? 2 : 4;
constexpr int RESULT_BYTES = (CHUNKS + (EPILOGUE == 2 ? 1 : 0)) * CHUNK_BYTES;  // of one group of threads
constexpr int STAGES = EPILOGUE == 1 ? 4 : 3;

// acc[64 rows, 256] (+)= a[64, 16] w[256, 16]^T, both in shared memory, 128 bytes per row, swizzled.
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t w, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "
      "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
      "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
      "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
      "}, %128, %129, p, 1, 1, 0, 0; }"
      :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
        "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),
        "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),
        "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),
        "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]),
        "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]),
        "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]),
        "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),
        "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(w), "r"(adds));
}

struct Tile {
  int m, n;
};
__device__ __forceinline__ Tile tile_at(int at, int tiles_m, int tiles_n, int group) {
  int first = at / (group * tiles_n) * group;
  int rows = min(tiles_m - first, group);
  int within = at % (group * tiles_n);
  return {first + within % rows, within / rows};
}

__device__ __forceinline__ float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// Of rows `low` and `low` + 8 of a tile: its heads, whose blocks of 8 columns are left, right, left, right.
__device__ __forceinline__ void rotate(
    const Arguments& a, float (&d)[128], int column, int low, float low_factor, float high_factor, int lane) {
  const float* low_rope = a.rope + (size_t)(low < a.M ? a.positions[low] : 0) * H + lane * 2;
  const float* high_rope = a.rope + (size_t)(low + 8 < a.M ? a.positions[low + 8] : 0) * H + lane * 2;
  int rotated = (a.query_heads + a.kv_heads) * H;
#pragma unroll
  for (int g = 0; g < H / 16; g++) {
    float2 low_cos = *(const float2*)(low_rope + g * 8), low_sin = *(const float2*)(low_rope + H / 2 + g * 8);
    float2 high_cos = *(const float2*)(high_rope + g * 8), high_sin = *(const float2*)(high_rope + H / 2 + g * 8);
#pragma unroll
    for (int head = 0; head < BN / H; head++) {
      float* x = d + (head * (H / 8) + g * 2) * 4;
      bool is_rotated = column + head * H < rotated;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float factor = i < 2 ? low_factor : high_factor, left = x[i] * factor, right = x[i + 4] * factor;
        float cos = i < 2 ? (i % 2 ? low_cos.y : low_cos.x) : (i % 2 ? high_cos.y : high_cos.x);
        float sin = i < 2 ? (i % 2 ? low_sin.y : low_sin.x) : (i % 2 ? high_sin.y : high_sin.x);
        x[i] = is_rotated ? left * cos - right * sin : left;
        x[i + 4] = is_rotated ? right * cos + left * sin : right;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    wide(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap out_map,
         const __grid_constant__ TensorMap gained_map, const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t raw[];
  uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  uint32_t results = shared + STAGES * STAGE_BYTES;
  uint32_t full = results + 2 * RESULT_BYTES, empty = full + STAGES * 8, residual_full = empty + STAGES * 8;
  uint32_t rank = cluster_rank();
  int tiles_m = (a.M + 2 * BM - 1) / (2 * BM), tiles_n = (a.N + BN - 1) / BN;
  int tiles = tiles_m * tiles_n, clusters = gridDim.x / 2, steps = (a.K + BK - 1) / BK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, 4);  // two groups of threads of two blocks
    }
    barrier_init(residual_full, 1);
    barrier_init(residual_full + 8, 1);
    barrier_init_fence();
  }
  __syncthreads();
  cluster_sync();
  int group = threadIdx.x / 128;
  if (group == 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      int s = 0, phase = 0;
      for (int at = blockIdx.x / 2; at < tiles; at += clusters) {
        Tile tile = tile_at(at, tiles_m, tiles_n, a.group_pairs);
        int row = (tile.m * 2 + rank) * BM;
        for (int k = 0; k < steps; k++) {
          barrier_wait(empty + s * 8, phase ^ 1);
          barrier_expect(full + s * 8, STAGE_BYTES);
          uint32_t to = shared + s * STAGE_BYTES, half = to + X_BYTES + rank * (W_BYTES / 2);
          load_2d(to, &x_map, k * BK, row, full + s * 8);
          if (EPILOGUE == 1) {  // 8 gates, the 8 values to which they belong, the next 8 gates
            load_4d_both(half, &w_map, k * BK, 0, 0, tile.n * 16 + rank * 8, full + s * 8);
          } else if (EPILOGUE == 3) {  // of each head: 8 rows of its left half, the 8 of the right half that they are rotated with
            load_5d_both(half, &w_map, k * BK, 0, 0, 0, (tile.n * BN + rank * (BN / 2)) / H, full + s * 8);
          } else {
            load_2d_both(half, &w_map, k * BK, tile.n * BN + rank * (BN / 2), full + s * 8);
          }
          if (++s == STAGES) s = 0, phase ^= 1;
        }
      }
    }
  } else {
    more_registers<240>();
    int part = group - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    uint32_t result = results + part * RESULT_BYTES;
    // Of the 8 x 8 matrices that this lane addresses: row of the group's 64, and which of two neighbouring blocks of 8 columns.
    int matrix_row = warp * 16 + (lane / 8 % 2) * 8 + lane % 8, matrix_block = lane / 16;
    uint32_t matrix_at = matrix_row * 128;
    int s = 0, phase = 0, residual_phase = 0;
    float d[128];
    for (int at = blockIdx.x / 2; at < tiles; at += clusters) {
      Tile tile = tile_at(at, tiles_m, tiles_n, a.group_pairs);
      int first = (tile.m * 2 + rank) * BM + part * 64, low = first + warp * 16 + lane / 4, high = low + 8;
      if (EPILOGUE == 2 && thread == 0) {
        store_wait_read();
        barrier_expect(residual_full + part * 8, 4 * CHUNK_BYTES);
        for (int c = 0; c < 4; c++) load_2d(result + c * CHUNK_BYTES, &out_map, tile.n * BN + c * 64, first, residual_full + part * 8);
      }
      float low_factor = 1.0f, high_factor = 1.0f;
      if (SCALED) {
        float low_sum = 0.0f, high_sum = 0.0f;
        for (int q = lane % 4; q < a.num_squares; q += 4) {
          if (low < a.M) low_sum += a.squares[(size_t)low * a.num_squares + q];
          if (high < a.M) high_sum += a.squares[(size_t)high * a.num_squares + q];
        }
        for (int i = 1; i < 4; i *= 2) {
          low_sum += __shfl_xor_sync(~0u, low_sum, i);
          high_sum += __shfl_xor_sync(~0u, high_sum, i);
        }
        low_factor = rsqrtf(low_sum / a.K + a.epsilon);
        high_factor = rsqrtf(high_sum / a.K + a.epsilon);
      }
      int last = 0;
      for (int k = 0; k < steps; k++) {
        barrier_wait(full + s * 8, phase);
        uint32_t from = shared + s * STAGE_BYTES;
        uint64_t x = rows_descriptor(from + part * (X_BYTES / 2)), w = rows_descriptor(from + X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BK / 16; i++) multiply(d, x + i * 2, w + i * 2, k + i > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (k > 0 && thread < 2) barrier_arrive_in(empty + last * 8, thread);
        last = s;
        if (++s == STAGES) s = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      if (thread < 2) barrier_arrive_in(empty + last * 8, thread);

      if (EPILOGUE == 2) {
        barrier_wait(residual_full + part * 8, residual_phase);
        residual_phase ^= 1;
        float low_squares = 0.0f, high_squares = 0.0f;
        uint32_t gained = result + 4 * CHUNK_BYTES;
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (c > 0) {  // the last chunk times gain has left
            if (thread == 0) store_wait_read();
            named_sync(1 + part, 128);
          }
#pragma unroll
          for (int p = 0; p < 4; p++) {
            int j = c * 8 + p * 2;
            uint32_t swizzled = matrix_at + (((p * 2 + matrix_block) ^ (lane % 8)) << 4);
            uint32_t x[4], y[4];
            load_matrices(result + c * CHUNK_BYTES + swizzled, x[0], x[1], x[2], x[3]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              int column = tile.n * BN + (j + i / 2) * 8 + lane % 4 * 2;
              uint32_t both = column < a.N ? *(const uint32_t*)(a.gain + column) : 0;
              x[i] = pack(d[(j + i / 2) * 4 + i % 2 * 2] + unpack_low(x[i]), d[(j + i / 2) * 4 + i % 2 * 2 + 1] + unpack_high(x[i]));
              float left = unpack_low(x[i]), right = unpack_high(x[i]);
              (i % 2 ? high_squares : low_squares) += left * left + right * right;
              y[i] = pack(left * unpack_low(both), right * unpack_high(both));
            }
            store_matrices(result + c * CHUNK_BYTES + swizzled, x[0], x[1], x[2], x[3]);
            store_matrices(gained + swizzled, y[0], y[1], y[2], y[3]);
          }
          fence_async();
          named_sync(1 + part, 128);
          if (thread == 0) {
            store_2d(&out_map, result + c * CHUNK_BYTES, tile.n * BN + c * 64, first);
            store_2d(&gained_map, gained, tile.n * BN + c * 64, first);
            store_commit();
          }
        }
        for (int i = 1; i < 4; i *= 2) {
          low_squares += __shfl_xor_sync(~0u, low_squares, i);
          high_squares += __shfl_xor_sync(~0u, high_squares, i);
        }
        if (lane % 4 == 0) {
          if (low < a.M) a.squares_out[(size_t)low * tiles_n + tile.n] = low_squares;
          if (high < a.M) a.squares_out[(size_t)high * tiles_n + tile.n] = high_squares;
        }
      } else if (EPILOGUE == 3) {
        if (thread == 0) store_wait_read();
        named_sync(1 + part, 128);
        rotate(a, d, tile.n * BN, low, low_factor, high_factor, lane % 4);
#pragma unroll
        for (int j = 0; j < 32; j += 4) {  // blocks of 8: left, right, left, right
#pragma unroll
          for (int half = 0; half < 2; half++) {
            int block = j / (H / 8) * (H / 8) + half * (H / 16) + j % (H / 8) / 2;  // as they lie in memory; the next one, too
            const float *x = d + (j + half) * 4, *y = x + 8;
            store_matrices(result + block / 8 * CHUNK_BYTES + matrix_at + (((block % 8 + matrix_block) ^ (lane % 8)) << 4), pack(x[0], x[1]),
                           pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3]));
          }
        }
        fence_async();
        named_sync(1 + part, 128);
        for (int c = 0; c < CHUNKS; c++) {
          int column = tile.n * BN + c * 64, head = column / H - a.query_heads;
          if (column >= a.N) break;
          if (head < 0) {
            if (thread == 0) store_2d(&out_map, result + c * CHUNK_BYTES, column, first);
            continue;
          }
          for (int i = thread; i < 64 * 8; i += 128) {
            int row = i / 8, piece = i % 8;
            int slot = first + row < a.M ? a.slots[first + row] : -1;
            if (slot < 0) continue;
            uint4 y;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                         : "r"(result + c * CHUNK_BYTES + row * 128 + ((piece ^ row % 8) << 4))
                         : "memory");
            size_t plane = (size_t)(slot >> a.block_shift) * (2 * a.kv_heads) + head;
            size_t place = (plane << a.block_shift) + (slot & ((1 << a.block_shift) - 1));
            *(uint4*)(a.cache + place * H + column % H + piece * 8) = y;
          }
        }
        if (thread == 0) store_commit();
      } else {
        if (thread == 0) store_wait_read();
        named_sync(1 + part, 128);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
          for (int p = 0; p < 4; p++) {
            uint32_t to = result + c * CHUNK_BYTES + matrix_at + (((p * 2 + matrix_block) ^ (lane % 8)) << 4);
            uint32_t y[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float factor = i % 2 ? high_factor : low_factor;
              if (EPILOGUE == 1) {
                int g = ((c * 4 + p) * 2 + i / 2) * 8 + i % 2 * 2;
                y[i] = pack(silu_times(d[g] * factor, d[g + 4] * factor), silu_times(d[g + 1] * factor, d[g + 5] * factor));
              } else {
                int g = (c * 8 + p * 2 + i / 2) * 4 + i % 2 * 2;
                y[i] = pack(d[g] * factor, d[g + 1] * factor);
              }
            }
            store_matrices(to, y[0], y[1], y[2], y[3]);
          }
        }
        fence_async();
        named_sync(1 + part, 128);
        if (thread == 0) {
          for (int c = 0; c < CHUNKS; c++) store_2d(&out_map, result + c * CHUNK_BYTES, tile.n * (CHUNKS * 64) + c * 64, first);
          store_commit();
        }
      }
    }
    if (thread == 0) store_wait();
  }
  cluster_sync();  // no block ends while the other may write into its shared memory
}
