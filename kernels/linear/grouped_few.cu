// Products of 1 to 16 rows with a weight of 4-bit or 8-bit codes in groups, with what follows them, for Hopper: out[M, N] = x[M, K] w[N, K]^T,
// w = scale * (value + offset), where codes become values without rounding. A read of the codes.
//
// The weight comes in records of 16 outputs x 128 inputs, in the order in which the lanes of a warp need it as left operands of mma.sync
// (see `packed_codes.py`). A block streams tiles of 16 RT outputs through a ring in shared memory: one warp starts bulk copies of eight
// records, eight warps multiply, each one record of each 16 outputs. Sums of a group are scaled in float32.
//
// A row's sums are in the same order whatever M is.
//
// Set by the compiler's options: EPILOGUE (0 plain, 1 gated: rows alternate gate and up, 2 residual), SCALED, BIAS, WIDE_OUT (float32),
// NT (8 rows of x each), RT, STAGES, TYPE; BITS (4, 8), FLOATS (codes are e2m1 or e4m3), GROUP (32, 64 or 128 inputs), NUMBERS (type of
// scales and offsets: 0 float32, 1 float16, 2 bfloat16), OFFSETS.

struct Arguments {
  const uint8_t* w;      // [ceil(N / 16), K / 128] records
  const uint16_t* x;     // [M, K]
  const float* squares;  // [M, num_squares], whose sum over a row, divided by K, is the mean square of the row
  const uint16_t* bias;  // [N]
  void* out;             // [M, N], or [M, N / 2] if gated
  uint16_t *residual, *gained;  // [M, N]
  const uint16_t* gain;  // [N]
  float* squares_out;    // [M, ceil(N / 16)]
  float epsilon;
  int num_squares;
  int M, N, K;  // K: inputs of x; a multiple of 8
  int blocks;   // of 128 inputs in the weight
  uint32_t zero;  // integers: that of the codes, twice in TYPE, with what unpacking adds
};

constexpr int NUMBER_BYTES = NUMBERS == 0 ? 4 : 2, GROUPS = 128 / GROUP, CODE_BYTES = 16 * 128 * BITS / 8;
constexpr int SCALE_BYTES = GROUPS * 16 * NUMBER_BYTES, RECORD = CODE_BYTES + SCALE_BYTES * (1 + OFFSETS);

// Bits of TYPE whose value is MAGIC + a nibble. Of floats: that of the code, in other units.
#define IS_BF16 (TYPE[0] == 'b')
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn." TYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

#if BITS == 4 && !FLOATS
// Nibbles i and i + 4 of a word are neighbours: 128 + n has n in the last bits of a bfloat16, 1,024 + n in those of a float16.
__device__ __forceinline__ void unpack(uint32_t (&a)[4], const uint32_t* w, uint32_t zero) {
  constexpr uint32_t magic = IS_BF16 ? 0x43004300u : 0x64006400u;
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = subtract(w[0] >> 4 * i & 0x000f000fu | magic, zero);
}
#elif BITS == 4
__device__ __forceinline__ void unpack(uint32_t (&a)[4], const uint32_t* w, uint32_t zero) {  // e2m1
  constexpr uint32_t unit = IS_BF16 ? 0x7e807e80u : 0x74007400u;  // 2^126, 2^14
  constexpr int shift = IS_BF16 ? 6 : 9;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t n = w[0] >> 4 * i;
    a[i] = multiply_pair((n & 0x00080008u) << 12 | (n & 0x00070007u) << shift, unit);
  }
}
#elif !FLOATS
// Bytes i and i + 2 of a word are neighbours; a code is 16 * high + low, and its zero 128.
__device__ __forceinline__ void unpack(uint32_t (&a)[4], const uint32_t* w, uint32_t zero) {
  constexpr uint32_t magic = IS_BF16 ? 0x43004300u : 0x64006400u, low_zero = magic;
  constexpr uint32_t high_zero = IS_BF16 ? 0x43084308u : 0x64086408u, sixteen = IS_BF16 ? 0x41804180u : 0x4c004c00u;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t both = w[i / 2] >> 8 * (i % 2);
    uint32_t low = subtract(both & 0x000f000fu | magic, low_zero), high = subtract(both >> 4 & 0x000f000fu | magic, high_zero);
    a[i] = multiply_add(high, sixteen, low);
  }
}
#else
__device__ __forceinline__ void unpack(uint32_t (&a)[4], const uint32_t* w, uint32_t zero) {  // e4m3
  constexpr uint32_t unit = IS_BF16 ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
  constexpr int shift = IS_BF16 ? 4 : 7;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t both = w[i / 2] >> 8 * (i % 2);
    a[i] = multiply_pair((both & 0x00800080u) << 8 | (both & 0x007f007fu) << shift, unit);
  }
}
#endif

__device__ __forceinline__ float widen(uint16_t x) { return unpack_low(x); }
__device__ __forceinline__ uint16_t narrow(float x) { return (uint16_t)pack(x, 0.0f); }
__device__ __forceinline__ float number_of(uint16_t bits, int kind) {
  float x;
  if (kind == 1) asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "h"(bits));
  else x = __uint_as_float((uint32_t)bits << 16);
  return x;
}
__device__ __forceinline__ float load_number(uint32_t at) {
  if (NUMBERS == 0) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
  }
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at) : "memory");
  return number_of(bits, NUMBERS);
}
#ifndef DEQUANTIZE
constexpr int WARPS = 8, THREADS = WARPS * 32, STAGE_BYTES = RT * WARPS * RECORD, COLUMNS = NT * 8 + 1;


extern "C" __global__ void __launch_bounds__(THREADS + 32, 2) grouped_few(const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t raw[];
  uint32_t ring = (shared_address(raw) + 127) & ~127u;
  float* sums = (float*)(raw + (ring - shared_address(raw)) + STAGES * STAGE_BYTES);  // [2][WARPS][16 RT][COLUMNS], by parity of the tile
  float* factors = sums + 2 * WARPS * 16 * RT * COLUMNS;                              // [NT * 8]
  uint32_t full = shared_address(factors + NT * 8), empty = full + STAGES * 8;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int small_tiles = (a.N + 15) / 16, tiles = (small_tiles + RT - 1) / RT, chunks = (a.blocks + WARPS - 1) / WARPS;
  int passes = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  if (thread == 0)
    for (int s = 0; s < STAGES; s++) barrier_init(full + s * 8, 1), barrier_init(empty + s * 8, WARPS);
  barrier_init_fence();
  __syncthreads();
  if (warp == WARPS) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    for (int u = 0, s = 0, phase = 1, c = 0, tile = blockIdx.x; u < passes * chunks; u++) {
      uint32_t bytes = min(a.blocks - c * WARPS, WARPS) * RECORD;
      barrier_wait(empty + s * 8, phase);
      if (lane == 0) barrier_expect(full + s * 8, RT * bytes);
      __syncwarp();
      if (lane < RT) {
        const uint8_t* from = a.w + ((size_t)min(tile * RT + lane, small_tiles - 1) * a.blocks + c * WARPS) * RECORD;
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                         ring + s * STAGE_BYTES + lane * WARPS * RECORD),
                     "l"(from), "r"(bytes), "r"(full + s * 8), "l"(policy)
                     : "memory");
      }
      if (++s == STAGES) s = 0, phase ^= 1;
      if (++c == chunks) c = 0, tile += gridDim.x;
    }
    return;
  }
  int row = thread % 16, column = thread / 16;  // of this thread's results, plain and residual
  wait_for_predecessor();
  start_successor();  // at once: the successor's blocks take each place that falls free
  if (SCALED) {
    for (int m = warp; m < a.M; m += WARPS) {
      float sum = 0.0f;
      for (int i = lane; i < a.num_squares; i += 32) sum += a.squares[m * a.num_squares + i];
      sum = sum_over<32>(sum);
      if (lane == 0) factors[m] = rsqrtf(sum / a.K + a.epsilon);
    }
  }
  float old[RT];
#pragma unroll
  for (int r = 0; r < RT; r++) {
    int n = (blockIdx.x * RT + r) * 16 + row;
    old[r] = EPILOGUE == 2 && column < a.M && n < a.N ? widen(a.residual[(size_t)column * a.N + n]) : 0.0f;
  }
  const uint16_t* mine = a.x + (size_t)g * a.K + warp * 128 + t * 8;
  auto load_x = [&](uint4 (&x)[NT][2], int chunk, int half) {  // this lane's right operand of 64 inputs
    int k = chunk * WARPS * 128 + half * 64;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint16_t* at = mine + (size_t)n * 8 * a.K + k;
      bool is_row = n * 8 + g < a.M;
#pragma unroll
      for (int h = 0; h < 2; h++)
        x[n][h] = is_row && warp * 128 + t * 8 + k + h * 32 < a.K ? load_behind_the_wait(at + h * 32) : make_uint4(0, 0, 0, 0);
    }
  };
  uint4 x[2][NT][2];
  load_x(x[0], 0, 0);
  load_x(x[1], 0, 1);
  constexpr uint32_t ones = IS_BF16 ? 0x3f803f80u : 0x3c003c00u;
  for (int pass = 0, s = 0, phase = 0; pass < passes; pass++) {
    int tile = blockIdx.x + pass * gridDim.x;
    float* parts = sums + pass % 2 * WARPS * 16 * RT * COLUMNS;
    float acc[RT][NT][4] = {};
#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
      int next = c + 1 == chunks ? 0 : c + 1;
      bool has_record = c * WARPS + warp < a.blocks;
      uint32_t record = ring + s * STAGE_BYTES + warp * RECORD;
      barrier_wait(full + s * 8, phase);
      float group[RT][NT][4], total[NT][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (has_record) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            int k = half * 64 + h * 32;
            if (k % GROUP == 0) {
#pragma unroll
              for (int n = 0; n < NT; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                  total[n][j] = 0.0f;
#pragma unroll
                  for (int r = 0; r < RT; r++) group[r][n][j] = 0.0f;
                }
            }
            if (OFFSETS) {
#pragma unroll
              for (int n = 0; n < NT; n++) {
                multiply_tile(total[n], ones, ones, ones, ones, x[half][n][h].x, x[half][n][h].y);
                multiply_tile(total[n], ones, ones, ones, ones, x[half][n][h].z, x[half][n][h].w);
              }
            }
#pragma unroll
            for (int r = 0; r < RT; r++) {
              uint32_t low[4], high[4], at = record + r * WARPS * RECORD;
#if BITS == 4
              uint32_t words[2];
              asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(at + (half * 2 + h) * 256 + lane * 8) : "memory");
              unpack(low, words, a.zero);
              unpack(high, words + 1, a.zero);
#else
              uint4 v = load_shared(at + (half * 2 + h) * 512 + lane * 16);
              uint32_t words[4] = {v.x, v.y, v.z, v.w};
              unpack(low, words, a.zero);
              unpack(high, words + 2, a.zero);
#endif
#pragma unroll
              for (int n = 0; n < NT; n++) {
                multiply_tile(group[r][n], low[0], high[0], low[1], high[1], x[half][n][h].x, x[half][n][h].y);
                multiply_tile(group[r][n], low[2], high[2], low[3], high[3], x[half][n][h].z, x[half][n][h].w);
              }
              if ((k + 32) % GROUP == 0) {
                uint32_t numbers = at + CODE_BYTES + (k / GROUP * 16 + g) * NUMBER_BYTES;
                float scale[2] = {load_number(numbers), load_number(numbers + 8 * NUMBER_BYTES)}, offset[2] = {};
                if (OFFSETS) offset[0] = load_number(numbers + SCALE_BYTES), offset[1] = load_number(numbers + SCALE_BYTES + 8 * NUMBER_BYTES);
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                  for (int j = 0; j < 4; j++) {
                    float sum = OFFSETS ? group[r][n][j] + offset[j / 2] * total[n][j] : group[r][n][j];
                    acc[r][n][j] += scale[j / 2] * sum;
                  }
              }
            }
          }
        }
        load_x(x[half], next, half);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + s * 8);
      if (++s == STAGES) s = 0, phase ^= 1;
    }
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) parts[(warp * 16 * RT + r * 16 + g + j / 2 * 8) * COLUMNS + n * 8 + 2 * t + j % 2] = acc[r][n][j];
    named_sync(1, THREADS);
    auto sum = [&](int r, int m) {
      float y = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) y += parts[(w * 16 * RT + r) * COLUMNS + m];
      return SCALED ? y * factors[m] : y;
    };
    if (EPILOGUE == 1) {
      for (int e = thread; e < 8 * RT * a.M; e += THREADS) {
        int m = e / (8 * RT), i = e % (8 * RT), n = tile * 8 * RT + i;
        float gate = sum(2 * i, m), up = sum(2 * i + 1, m);
        if (n * 2 < a.N) ((uint16_t*)a.out)[(size_t)m * (a.N / 2) + n] = narrow(gate / (1.0f + __expf(-gate)) * up);
      }
    } else {
#pragma unroll
      for (int r = 0; r < RT; r++) {
        int small = tile * RT + r, n = small * 16 + row;
        bool is_result = column < a.M && n < a.N;
        size_t at = (size_t)column * a.N + n;
        float y = column < a.M ? sum(r * 16 + row, column) : 0.0f;
        if (EPILOGUE == 2) {
          float before = pass == 0 || !is_result ? old[r] : widen(a.residual[at]);
          y = is_result ? widen(narrow(before + y)) : 0.0f;
          if (is_result) a.residual[at] = narrow(y), a.gained[at] = narrow(y * widen(a.gain[n]));
          float squares = sum_over<16>(y * y);
          if (row == 0 && column < a.M && small < small_tiles) a.squares_out[column * small_tiles + small] = squares;
        } else if (is_result) {
          if (BIAS) y += widen(a.bias[n]);
          if (WIDE_OUT) ((float*)a.out)[at] = y;
          else ((uint16_t*)a.out)[at] = narrow(y);
        }
      }
    }
  }
}
#else
// The weight in TYPE, [N, K]: a record a warp.
extern "C" __global__ void __launch_bounds__(256) dequantize(const uint8_t* w, uint16_t* out, int N, int K, int blocks, uint32_t zero) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int number = blockIdx.x * 8 + warp, tile = number / blocks, block = number % blocks;
  if (tile * 16 >= N) return;
  const uint8_t* record = w + (size_t)number * RECORD;
  auto load = [&](int at) {
    if (NUMBERS == 0) return *(const float*)(record + at);
    return number_of(*(const uint16_t*)(record + at), NUMBERS);
  };
#pragma unroll
  for (int part = 0; part < 4; part++) {  // of 32 inputs
    uint32_t words[BITS / 2];
#if BITS == 4
    uint2 v = *(const uint2*)(record + part * 256 + lane * 8);
    words[0] = v.x, words[1] = v.y;
#else
    uint4 v = *(const uint4*)(record + part * 512 + lane * 16);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
#endif
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint32_t a[4], result[4];
      unpack(a, words + r * (BITS / 4), zero);
      int n = tile * 16 + g + 8 * r, k = block * 128 + part * 32 + t * 8, numbers = CODE_BYTES + (part * 32 / GROUP * 16 + g + 8 * r) * NUMBER_BYTES;
      float scale = load(numbers), offset = OFFSETS ? load(numbers + SCALE_BYTES) : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; i++)
        result[i] = pack(scale * (unpack_low(a[i]) + offset), scale * (unpack_high(a[i]) + offset));
      if (n < N && k < K) *(uint4*)(out + (size_t)n * K + k) = make_uint4(result[0], result[1], result[2], result[3]);
    }
  }
}
#endif
