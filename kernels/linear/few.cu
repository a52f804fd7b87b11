// Products of 1 to 16 rows with what follows them: out[M, N] = x[M, K] w[N, K]^T, for Hopper. A read of the weight.
//
// A block streams tiles of 16 rows of the weight through a ring in shared memory: one warp starts bulk copies of 1 KB per row, eight
// warps multiply, each 64 of the 512 columns that a stage has, with mma.sync: the weight is the left operand, rows of x, padded to 8 or
// 16, the right one. The order of k within a dot product is free: 16 contiguous bytes of a lane serve as parts of two fragments.
// Weights are on their way before the kernel that makes x is over; x is read behind the wait.
//
// A row's sums are in the same order whatever M is.
//
// Set by the compiler's options: EPILOGUE (0 plain, 1 gated, 2 residual), SCALED, BIAS, WIDE_OUT (float32), NT (8 rows of x each),
// STAGES, TYPE.

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
  if (warp == WARPS) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    int row = EPILOGUE == 1 ? lane % 8 * 2 + lane / 8 : lane;  // gated: 8 gates, then their 8 values
    for (int u = 0, s = 0, phase = 1, c = 0, tile = blockIdx.x; u < passes * chunks; u++) {
      uint32_t bytes = min(a.K - c * 512, 512) * 2;
      barrier_wait(empty + s * 8, phase);
      if (lane == 0) barrier_expect(full + s * 8, 16 * bytes);
      __syncwarp();
      if (lane < 16) {
        const uint16_t* from = a.w + (size_t)min(tile * 16 + row, a.N - 1) * a.K + c * 512;
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                         ring + s * STAGE_BYTES + lane * PITCH),
                     "l"(from), "r"(bytes), "r"(full + s * 8), "l"(policy)
                     : "memory");
      }
      if (++s == STAGES) s = 0, phase ^= 1;
      if (++c == chunks) c = 0, tile += gridDim.x;
    }
    return;
  }
  int row = thread % 16, column = thread / 16;  // of this thread's result, plain and residual
  float first_gain = EPILOGUE == 2 ? widen(a.gain[min((int)blockIdx.x * 16 + row, a.N - 1)]) : 0.0f;
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
