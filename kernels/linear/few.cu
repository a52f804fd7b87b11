// Products of 1 to 16 rows with what follows them: out[M, N] = x[M, K] w[N, K]^T, for Hopper. A read of the weight.
//
// A block streams tiles of 16 rows of the weight through a ring in shared memory: one warp starts bulk copies of 1 KB per row, eight
// warps multiply, each 64 of the 512 columns that a stage has, with mma.sync: the weight is the left operand, rows of x, padded to 8 or
// 16, the right one. The order of k within a dot product is free: 16 contiguous bytes of a lane serve as parts of two fragments.
// Weights are on their way before the kernel that makes x is over; x is read behind the wait.
//
// A row's sums are in the same order whatever M is.
//
// ADAPTED: what adapters add is more columns. B of all adapters, [N, L R], comes behind the weight; the right operand has `low` at the
// columns of a row's own adapter, and zeros at others. Columns of which no row has an adapter are left out, 512 at a time.
//
// Set by the compiler's options: EPILOGUE (0 plain, 1 gated, 2 residual), SCALED, BIAS, WIDE_OUT (float32), NT (8 rows of x each),
// STAGES, ADAPTED, TYPE.

struct Arguments {
  const uint16_t* w;     // [N, K]; gated: rows alternate gate and up
  const uint16_t* x;     // [M, K]
  const float* squares;  // [M, num_squares], whose sum over a row, divided by K, is the mean square of the row
  const uint16_t* bias;  // [N]
  void* out;             // [M, N], or [M, N / 2] if gated
  uint16_t *residual, *gained;  // [M, N]
  const uint16_t* gain;  // [N]
  float* squares_out;    // [M, N / 16]
  float epsilon;
  int num_squares;
  int M, N, K;  // K: a multiple of 64
  // If ADAPTED:
  const uint16_t *b, *low;  // [N, L R], [M, P, R]
  const int* places;        // [M]; -1: no adapter
  int LR, R, P, first, second;  // where the second and third part of the outputs begin, at tiles; gated: parts alternate
  int reads_early;  // x is there when this kernel starts; only `low` is not
};

constexpr int WARPS = 8, THREADS = WARPS * 32, PITCH = 1024 + 64, STAGE_BYTES = 16 * PITCH;  // the 64 keep rows off each other's banks
constexpr int COLUMNS = NT * 8 + 1;

__device__ __forceinline__ float widen(uint16_t x) { return unpack_low(x); }
__device__ __forceinline__ uint16_t narrow(float x) { return (uint16_t)pack(x, 0.0f); }

extern "C" __global__ void __launch_bounds__(THREADS + 32, 2) few(const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t raw[];
  uint32_t ring = (shared_address(raw) + 127) & ~127u;
  float* sums = (float*)(raw + (ring - shared_address(raw)) + STAGES * STAGE_BYTES);  // [2][WARPS][16][COLUMNS], by parity of the tile
  float* factors = sums + 2 * WARPS * 16 * COLUMNS;                                   // [NT * 8]
  uint32_t full = shared_address(factors + NT * 8), empty = full + STAGES * 8;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int tiles = (a.N + 15) / 16, passes = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x, chunks = (a.K + 511) / 512;
  if (thread == 0)
    for (int s = 0; s < STAGES; s++) barrier_init(full + s * 8, 1), barrier_init(empty + s * 8, WARPS);
  barrier_init_fence();
  __syncthreads();
  uint32_t active = 0;  // of every 512 columns of B, whether a row needs them
  if (ADAPTED) {
    int place = lane < a.M ? load_current(a.places + lane) : -1;
    active = __reduce_or_sync(~0u, place < 0 ? 0u : 1u << (place * a.R / 512));
  }
  int parts_of_pass = chunks + __popc(active);
  if (warp == WARPS) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    int row = EPILOGUE == 1 ? lane % 8 * 2 + lane / 8 : lane;  // gated: 8 gates, then their 8 values
    uint32_t left = active;
    for (int u = 0, s = 0, phase = 1, c = 0, tile = blockIdx.x; u < passes * parts_of_pass; u++) {
      bool is_b = ADAPTED && c >= chunks;
      int begin = (is_b ? __ffs(left) - 1 : c) * 512, width = is_b ? a.LR : a.K;
      if (is_b) left &= left - 1;
      uint32_t bytes = min(width - begin, 512) * 2;
      barrier_wait(empty + s * 8, phase);
      if (lane == 0) barrier_expect(full + s * 8, 16 * bytes);
      __syncwarp();
      if (lane < 16) {
        const uint16_t* from = (is_b ? a.b : a.w) + (size_t)min(tile * 16 + row, a.N - 1) * width + begin;
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                         ring + s * STAGE_BYTES + lane * PITCH),
                     "l"(from), "r"(bytes), "r"(full + s * 8), "l"(policy)
                     : "memory");
      }
      if (++s == STAGES) s = 0, phase ^= 1;
      if (++c == parts_of_pass) c = 0, tile += gridDim.x, left = active;
    }
    return;
  }
  int row = thread % 16, column = thread / 16;  // of this thread's result, plain and residual
  float first_gain = EPILOGUE == 2 ? widen(a.gain[min((int)blockIdx.x * 16 + row, a.N - 1)]) : 0.0f;
  if (ADAPTED && a.reads_early) forget_cached();
  else wait_for_predecessor();
  start_successor();  // at once: the successor's blocks take each place that falls free
  if (SCALED) {
    for (int m = warp; m < a.M; m += WARPS) {
      float sum = 0.0f;
      for (int i = lane; i < a.num_squares; i += 32) sum += a.squares[m * a.num_squares + i];
      sum = sum_over<32>(sum);
      if (lane == 0) factors[m] = rsqrtf(sum / a.K + a.epsilon);
    }
  }
  int first = blockIdx.x * 16 + row;
  float first_residual = EPILOGUE == 2 && column < a.M && first < a.N ? widen(a.residual[(size_t)column * a.N + first]) : 0.0f;
  const uint16_t* mine = a.x + (size_t)g * a.K + warp * 64 + t * 8;
  auto has_columns = [&](int chunk) { return chunk * 512 + warp * 64 < a.K; };
  auto load_x = [&](uint4 (&x)[NT][2], int chunk) {  // this lane's right operand
    bool is_there = has_columns(chunk);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint16_t* at = mine + (size_t)n * 8 * a.K + chunk * 512;
      bool is_row = is_there && n * 8 + g < a.M;
      x[n][0] = is_row ? load_behind_the_wait(at) : make_uint4(0, 0, 0, 0);
      x[n][1] = is_row ? load_behind_the_wait(at + 32) : make_uint4(0, 0, 0, 0);
    }
  };
  uint4 x[NT][2], next[NT][2];
  load_x(x, 0);
  uint32_t place = ring + warp * 128 + g * PITCH + t * 16;
  int adapters[NT];  // of this lane's rows
#pragma unroll
  for (int n = 0; n < NT; n++) adapters[n] = ADAPTED && n * 8 + g < a.M ? load_current(a.places + n * 8 + g) : -1;
  auto load_low = [&](int n, int part, int k) {
    bool is_mine = adapters[n] >= 0 && adapters[n] == k / a.R;
    return is_mine ? load_behind_the_wait(a.low + ((size_t)(n * 8 + g) * a.P + part) * a.R + k % a.R) : make_uint4(0, 0, 0, 0);
  };
  for (int pass = 0, s = 0, phase = 0; pass < passes; pass++) {
    int tile = blockIdx.x + pass * gridDim.x;
    float* parts = sums + pass % 2 * WARPS * 16 * COLUMNS;
    float acc[NT][4] = {};
#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
      load_x(next, c + 1 == chunks ? 0 : c + 1);
      barrier_wait(full + s * 8, phase);
      uint32_t at = place + s * STAGE_BYTES;
      if (has_columns(c)) {
        uint4 low0 = load_shared(at), low1 = load_shared(at + 64);
        uint4 high0 = load_shared(at + 8 * PITCH), high1 = load_shared(at + 8 * PITCH + 64);
#pragma unroll
        for (int n = 0; n < NT; n++) {
          multiply_tile(acc[n], low0.x, high0.x, low0.y, high0.y, x[n][0].x, x[n][0].y);
          multiply_tile(acc[n], low0.z, high0.z, low0.w, high0.w, x[n][0].z, x[n][0].w);
          multiply_tile(acc[n], low1.x, high1.x, low1.y, high1.y, x[n][1].x, x[n][1].y);
          multiply_tile(acc[n], low1.z, high1.z, low1.w, high1.w, x[n][1].z, x[n][1].w);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; n++) x[n][0] = next[n][0], x[n][1] = next[n][1];
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + s * 8);
      if (++s == STAGES) s = 0, phase ^= 1;
    }
    if (ADAPTED) {
      if (pass == 0) wait_for_predecessor();
      int n0 = tile * 16, part = EPILOGUE == 1 ? 0 : (n0 >= a.first) + (n0 >= a.second), other = EPILOGUE == 1 ? a.P - 1 : part;
      for (uint32_t left = active; left; left &= left - 1) {
        int k = (__ffs(left) - 1) * 512 + warp * 64 + t * 8;
        barrier_wait(full + s * 8, phase);
        uint32_t at = place + s * STAGE_BYTES;
        const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < 2; i++) {  // 32 columns each
          bool is_there = k + i * 32 < a.LR;
          uint4 low = is_there ? load_shared(at + i * 64) : zeros, high = is_there ? load_shared(at + 8 * PITCH + i * 64) : zeros;
#pragma unroll
          for (int n = 0; n < NT; n++) {  // rows of the weight 8 apart are a gate and its value, which may have parts of their own
            uint4 y = load_low(n, part, k + i * 32), z = EPILOGUE == 1 ? load_low(n, other, k + i * 32) : y;
            if (EPILOGUE == 1) {
              multiply_tile(acc[n], low.x, 0, low.y, 0, y.x, y.y), multiply_tile(acc[n], low.z, 0, low.w, 0, y.z, y.w);
              multiply_tile(acc[n], 0, high.x, 0, high.y, z.x, z.y), multiply_tile(acc[n], 0, high.z, 0, high.w, z.z, z.w);
            } else {
              multiply_tile(acc[n], low.x, high.x, low.y, high.y, y.x, y.y), multiply_tile(acc[n], low.z, high.z, low.w, high.w, y.z, y.w);
            }
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + s * 8);
        if (++s == STAGES) s = 0, phase ^= 1;
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) parts[(warp * 16 + g + j / 2 * 8) * COLUMNS + n * 8 + 2 * t + j % 2] = acc[n][j];
    }
    named_sync(1, THREADS);
    auto sum = [&](int r, int m) {
      float y = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) y += parts[(w * 16 + r) * COLUMNS + m];
      return SCALED ? y * factors[m] : y;
    };
    if (EPILOGUE == 1) {
      for (int e = thread; e < 8 * a.M; e += THREADS) {
        int m = e / 8, i = e % 8, n = tile * 8 + i;
        float gate = sum(i, m), up = sum(i + 8, m);
        if (n * 2 < a.N) ((uint16_t*)a.out)[(size_t)m * (a.N / 2) + n] = narrow(gate / (1.0f + __expf(-gate)) * up);
      }
    } else {
      int n = tile * 16 + row;
      bool is_result = column < a.M && n < a.N;
      size_t at = (size_t)column * a.N + n;
      float y = column < a.M ? sum(row, column) : 0.0f;
      if (EPILOGUE == 2) {
        float old = pass == 0 || !is_result ? first_residual : widen(a.residual[at]);
        float gain = pass == 0 || !is_result ? first_gain : widen(a.gain[n]);
        y = is_result ? widen(narrow(old + y)) : 0.0f;
        if (is_result) a.residual[at] = narrow(y), a.gained[at] = narrow(y * gain);
        float squares = sum_over<16>(y * y);
        if (row == 0 && column < a.M) a.squares_out[column * tiles + tile] = squares;
      } else if (is_result) {
        if (BIAS) y += widen(a.bias[n]);
        if (WIDE_OUT) ((float*)a.out)[at] = y;
        else ((uint16_t*)a.out)[at] = narrow(y);
      }
    }
  }
}
