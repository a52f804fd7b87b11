// What adapters make of the rows of a decode step before their second matrices: low[T, P, R] = A x, each row by the adapter at its own
// place, for Hopper.
//
// A block has 16 rows of the A of one part and place, and 1,024 columns; each of its warps has 128 of them, all of which are on their way
// before x is there. The rows of x that have the place, 8 at a time, are the right operand of mma.sync. Blocks of one tile leave each
// other their sums; the one that comes last adds them in their order. So a row's bits depend on nothing but the row and its adapter.
//
// The kernel behind this one is launched once every block is past its wait, or has nothing to do, and the first block always waits: what
// was written before this kernel is there when the kernel behind it starts. It need not wait for what this kernel writes before it reads
// that.
//
// Set by the compiler's options: TYPE.

struct Arguments {
  const uint16_t* a;  // [P, L, R, K]
  const uint16_t* x;  // [T, K]
  const int* places;  // [T]; -1: no adapter
  const int* ranks;   // [L]
  float* parts;       // [splits, T, P, R]
  uint32_t* arrived;  // [P L R / 16], zeros before and after
  uint16_t* low;      // [T, P, R]
  int T, K, P, L, R;  // T: 128 at most; K: a multiple of 64; R: of 16
};

constexpr int WARPS = 8, THREADS = WARPS * 32, MOST_ROWS = 128, GROUPS = 2, PER_WARP = 128, PER_BLOCK = WARPS * PER_WARP;

__device__ __forceinline__ uint4 load_weights(const uint16_t* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) shrink(const __grid_constant__ Arguments a) {
  __shared__ float sums[WARPS][GROUPS * 8][17];
  __shared__ int rows[MOST_ROWS];
  __shared__ uint32_t arrivals;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y, tiles = a.R / 16;
  int first_rank = tile % tiles * 16, place = tile / tiles % a.L, part = tile / tiles / a.L, count = 0;
#pragma unroll
  for (int i = 0; i < MOST_ROWS / 32; i++) {
    int row = i * 32 + lane;
    bool is_mine = row < a.T && load_current(a.places + row) == place;
    uint32_t votes = __ballot_sync(~0u, is_mine);
    if (is_mine && warp == 0) rows[count + __popc(votes & ((1u << lane) - 1))] = row;
    count += __popc(votes);
  }
  if (count == 0 && (tile > 0 || split > 0)) return;
  bool is_read = count > 0 && first_rank < a.ranks[place];
  int begin = split * PER_BLOCK + warp * PER_WARP;
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  uint4 w[2][4];
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const uint16_t* at = a.a + ((size_t)(part * a.L + place) * a.R + first_rank + g) * a.K + begin + c * 64 + t * 8;
    bool is_there = is_read && begin + c * 64 < a.K;
#pragma unroll
    for (int i = 0; i < 4; i++) w[c][i] = is_there ? load_weights(at + (size_t)(i / 2 * 8) * a.K + i % 2 * 32) : zeros;
  }
  wait_for_predecessor();
  start_successor();
  if (count == 0) return;
  __syncthreads();
  auto low_of = [&](int e) { return a.low + ((size_t)rows[e / 16] * a.P + part) * a.R + first_rank + e % 16; };
  if (!is_read) {  // beyond the adapter's rank
    for (int e = thread; split == 0 && e < count * 16; e += THREADS) *low_of(e) = 0;
    return;
  }
  auto part_of = [&](int s, int e) { return a.parts + (((size_t)s * a.T + rows[e / 16]) * a.P + part) * a.R + first_rank + e % 16; };
  for (int first = 0; first < count; first += GROUPS * 8) {
    float acc[GROUPS][4] = {};
    uint4 x[GROUPS][2][2];
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
      int at = first + n * 8 + g;
      const uint16_t* from = a.x + (size_t)rows[min(at, count - 1)] * a.K + begin + t * 8;
#pragma unroll
      for (int c = 0; c < 2; c++) {
        bool is_there = at < count && begin + c * 64 < a.K;
        x[n][c][0] = is_there ? load_behind_the_wait(from + c * 64) : zeros;
        x[n][c][1] = is_there ? load_behind_the_wait(from + c * 64 + 32) : zeros;
      }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int n = 0; n < GROUPS; n++) {
        multiply_tile(acc[n], w[c][0].x, w[c][2].x, w[c][0].y, w[c][2].y, x[n][c][0].x, x[n][c][0].y);
        multiply_tile(acc[n], w[c][0].z, w[c][2].z, w[c][0].w, w[c][2].w, x[n][c][0].z, x[n][c][0].w);
        multiply_tile(acc[n], w[c][1].x, w[c][3].x, w[c][1].y, w[c][3].y, x[n][c][1].x, x[n][c][1].y);
        multiply_tile(acc[n], w[c][1].z, w[c][3].z, w[c][1].w, w[c][3].w, x[n][c][1].z, x[n][c][1].w);
      }
    }
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) sums[warp][n * 8 + 2 * t + j % 2][g + j / 2 * 8] = acc[n][j];
    }
    __syncthreads();
    int e = first * 16 + thread;  // a sum for each thread
    if (e < count * 16) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < WARPS; i++) sum += sums[i][thread / 16][thread % 16];
      if (splits == 1) *low_of(e) = (uint16_t)pack(sum, 0.0f);
      else *part_of(split, e) = sum;
    }
    __syncthreads();
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) arrivals = atomicAdd(a.arrived + tile, 1);
  __syncthreads();
  if (arrivals != splits - 1) return;
  __threadfence();
  for (int e = thread; e < count * 16; e += THREADS) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) sum += __ldcg(part_of(s, e));
    *low_of(e) = (uint16_t)pack(sum, 0.0f);
  }
  if (thread == 0) a.arrived[tile] = 0;
}
