// Tokens from logits by the rule of kernels/sample/rule.py: a row by a cluster of blocks, which keeps it in registers.
//
//     load, largest ─▶ limited rows: largest key that is kept ─▶ draw ─▶ token
//
// The limit of top-k, and then that of top-p, is sought in three steps: sums of count and mass below a few keys in registers; bins of the
// range where the limit lies; keys of its bin. Blocks gather bins in shared memory and add them to those of the cluster's first block,
// which searches them.
//
// Constants: V vocabulary, a multiple of 4; E numbers per thread; CLUSTER blocks of a row; IS_FLOAT32, else bfloat16; LIMITED: rows may
// have limits.
typedef long long int64_t;

#define THREADS 512
#define WARPS (THREADS / 32)
#define ALL 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)
#define NO_PLACE -1
#define NOTHING_LEFT -2
#define KEYS_PER_UNIT 131072.0f
#define MASS_OF_LARGEST 33554432.0f
#define LAST_KEY ((1 << 22) - 1)
#define RANGES 5  // of keys: four of 2^19, and the rest of 2^21, each of as many bins
#define BINS 512
#define MOST_KEYS 4096  // of a bin
#define LOG2_E 1.44269504f
#define LN_2 0.69314718f
#define TOKEN_FACTOR 0x9E3779B1u

struct Arguments {
  const void* logits;
  int64_t row_stride;
  const float* temperature;
  const int* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seed;
  const int* position;
  int64_t* tokens;
  const int* slots;
  int* newest;
};

struct Bins {  // a mass is low + 2^32 high
  uint32_t *counts, *lows, *highs;
};

struct Sums {
  uint64_t mass;
  uint32_t count;
};

struct Found {
  int bin;
  Sums before;
  uint64_t mass_inside;
};

struct Shared {
  float largest[CLUSTER], warp_largest[WARPS];
  uint32_t is_wrong[CLUSTER], warp_is_wrong[WARPS];
  uint64_t best[CLUSTER], warp_best[WARPS];
  Sums warp_sums[WARPS][RANGES], block_sums[CLUSTER][RANGES], sums[RANGES];
  Found found;
  int bin, limit;
  uint64_t total;
};

// ---- shared memory of other blocks
__device__ __forceinline__ uint32_t at_block(const void* at, uint32_t block) {
  uint32_t to;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(at)), "r"(block));
  return to;
}
__device__ __forceinline__ void put(const void* at, uint32_t block, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at_block(at, block)), "r"(value) : "memory");
}
__device__ __forceinline__ void put_64(const void* at, uint32_t block, uint64_t value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(at_block(at, block)), "l"(value) : "memory");
}
__device__ __forceinline__ uint32_t add_at_first(const void* at, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.cluster.shared::cluster.add.u32 %0, [%1], %2;" : "=r"(old) : "r"(at_block(at, 0)), "r"(value) : "memory");
  return old;
}

// ---- the rule
__device__ __forceinline__ uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
__device__ __forceinline__ uint32_t mix32(uint32_t h, uint32_t key) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13) ^ key) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}
__device__ __forceinline__ float uniform(uint64_t hash, uint32_t token) {
  uint32_t h = mix32(token * TOKEN_FACTOR + (uint32_t)hash, (uint32_t)(hash >> 32));
  return fminf(((float)h + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A token's key is the whole number in its distance, (largest - x) / temperature in units of 2^-17, or LAST_KEY. So keys are compared as
// distances: a key is below k where the distance is below k.
__device__ __forceinline__ int key_of(float distance) { return (int)fminf(distance, (float)LAST_KEY); }
// What distances of keys up to this are below; beyond the last key nothing is.
__device__ __forceinline__ float end_of(int key) { return key < LAST_KEY ? (float)(key + 1) : __int_as_float(0x7fc00000); }
__device__ __forceinline__ bool is_before(float distance, float end) { return !(distance >= end); }

// ---- numbers of a row
__device__ __forceinline__ uint32_t token_of(int e) {
  return ((e / 4 * CLUSTER + cluster_rank()) * THREADS + threadIdx.x) * 4 + e % 4;
}
__device__ __forceinline__ void load_four(const Arguments& a, int row, uint32_t token, float* x) {
#if IS_FLOAT32
  float4 four = *(const float4*)((const float*)a.logits + row * a.row_stride + token);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
#else
  uint2 four = *(const uint2*)((const uint16_t*)a.logits + row * a.row_stride + token);
  x[0] = __uint_as_float(four.x << 16), x[1] = __uint_as_float(four.x & 0xffff0000u);
  x[2] = __uint_as_float(four.y << 16), x[3] = __uint_as_float(four.y & 0xffff0000u);
#endif
}
__device__ __forceinline__ float load_one(const Arguments& a, int row, uint32_t token) {
#if IS_FLOAT32
  return ((const float*)a.logits)[row * a.row_stride + token];
#else
  return __uint_as_float((uint32_t)((const uint16_t*)a.logits)[row * a.row_stride + token] << 16);
#endif
}

// A score and its token, so that the largest is of the first of equal scores.
__device__ __forceinline__ uint32_t ordered(float x) {
  uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ uint64_t pack(float score, uint32_t token) { return (uint64_t)ordered(score) << 32 | (uint32_t)~token; }

// The largest of the row, to all threads; whether a number is NaN or plus infinity.
__device__ __forceinline__ float find_largest(const float (&x)[E], Shared& s, bool* is_wrong) {
  float largest = -INFINITE;
  bool wrong = false;
#pragma unroll
  for (int e = 0; e < E; e++) {
    largest = fmaxf(largest, x[e]);
    wrong |= !(x[e] < INFINITE);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
  wrong = __any_sync(ALL, wrong);
  if (lane == 0) s.warp_largest[warp] = largest, s.warp_is_wrong[warp] = wrong;
  __syncthreads();
  if (warp == 0) {
    largest = lane < WARPS ? s.warp_largest[lane] : -INFINITE;
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
    wrong = __any_sync(ALL, lane < WARPS && s.warp_is_wrong[lane]);
    if (lane < CLUSTER) {
      put(&s.largest[cluster_rank()], lane, __float_as_uint(largest));
      put(&s.is_wrong[cluster_rank()], lane, wrong);
    }
  }
  cluster_sync();
  largest = s.largest[0], wrong = s.is_wrong[0];
  for (int block = 1; block < CLUSTER; block++) largest = fmaxf(largest, s.largest[block]), wrong |= s.is_wrong[block];
  *is_wrong = wrong;
  return largest;
}

#if LIMITED
struct Search {
  float largest, scale;  // 2^17 / temperature
  int limit;             // of min-p
  uint32_t top_k;        // 0: off
  float top_p;           // 1: off
};

__device__ __forceinline__ uint32_t mass_of(float distance) {
  return (uint32_t)(exp2_fast(distance * (-LOG2_E / KEYS_PER_UNIT)) * MASS_OF_LARGEST + 0.5f);
}

// Count and mass of the row's tokens in all ranges up to each, to all threads in s.sums.
__device__ __forceinline__ void sum_ranges(float (&x)[E], const Search& search, Shared& s) {
  uint32_t counts[RANGES] = {}, masses[RANGES] = {};
  const float end = end_of(search.limit);
  if (search.top_k) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      asm volatile("" : "+f"(x[e]));  // so that nothing is computed ahead and kept
      float distance = (search.largest - x[e]) * search.scale;
      bool is_kept = is_before(distance, end);
#pragma unroll
      for (int r = 0; r < RANGES; r++) counts[r] += is_kept && (r == RANGES - 1 || distance < (float)((r + 1) << 19));
    }
  }
  if (search.top_p < 1) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      asm volatile("" : "+f"(x[e]));
      float distance = (search.largest - x[e]) * search.scale;
      uint32_t mass = is_before(distance, end) ? mass_of(distance) : 0;
#pragma unroll
      for (int r = 0; r < RANGES; r++) masses[r] += r == RANGES - 1 || distance < (float)((r + 1) << 19) ? mass : 0;
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < RANGES; r++) {
    uint32_t count = __reduce_add_sync(ALL, counts[r]);
    uint64_t mass = ((uint64_t)__reduce_add_sync(ALL, masses[r] >> 16) << 16) + __reduce_add_sync(ALL, masses[r] & 0xffff);
    if (lane == 0) s.warp_sums[warp][r] = {mass, count};
  }
  __syncthreads();
  if (threadIdx.x < RANGES * CLUSTER) {
    int r = threadIdx.x % RANGES, block = threadIdx.x / RANGES;
    Sums sum = {0, 0};
    for (int w = 0; w < WARPS; w++) sum.count += s.warp_sums[w][r].count, sum.mass += s.warp_sums[w][r].mass;
    put(&s.block_sums[cluster_rank()][r].count, block, sum.count);
    put_64(&s.block_sums[cluster_rank()][r].mass, block, sum.mass);
  }
  cluster_sync();
  if (threadIdx.x < RANGES) {
    Sums sum = {0, 0};
    for (int b = 0; b < CLUSTER; b++) sum.count += s.block_sums[b][threadIdx.x].count, sum.mass += s.block_sums[b][threadIdx.x].mass;
    s.sums[threadIdx.x] = sum;
  }
  __syncthreads();
}

// The first range with which `k` tokens, or, where k is 0, the mass `target` is reached.
__device__ __forceinline__ int find_range(const Shared& s, uint32_t k, double target) {
  int r = 0;
  while (r < RANGES - 1 && (k ? s.sums[r].count < k : (double)s.sums[r].mass < target)) r++;
  return r;
}

// Adds a block's tokens of keys from `first` to its own bins of 2^shift keys.
__device__ __forceinline__ void gather(float (&x)[E], const Search& search, const Bins bins, int first, int size, int shift) {
  const float begin = (float)first, end = end_of(min(search.limit, first + (size << shift) - 1));
#pragma unroll
  for (int e = 0; e < E; e++) {
    asm volatile("" : "+f"(x[e]));
    float distance = (search.largest - x[e]) * search.scale;
    if (distance < begin || !is_before(distance, end)) continue;
    int place = (key_of(distance) - first) >> shift;
    if (search.top_k) atomicAdd(&bins.counts[place], 1);
    if (search.top_p < 1) {
      uint32_t mass = mass_of(distance);
      if (mass && atomicAdd(&bins.lows[place], mass) > ~mass) atomicAdd(&bins.highs[place], 1);
    }
  }
  __syncthreads();
}

// Adds the bins to those of the first block, and clears them.
__device__ __forceinline__ void push(const Bins bins, int size) {
  if (cluster_rank() == 0) return;
  for (int i = threadIdx.x; i < size; i += THREADS) {
    uint32_t count = bins.counts[i], low = bins.lows[i], high = bins.highs[i];
    if (count) add_at_first(&bins.counts[i], count);
    if (low && add_at_first(&bins.lows[i], low) > ~low) high++;
    if (high) add_at_first(&bins.highs[i], high);
    bins.counts[i] = bins.lows[i] = bins.highs[i] = 0;
  }
}

__device__ __forceinline__ void clear(const Bins bins, int size) {
  for (int i = threadIdx.x; i < size; i += THREADS) bins.counts[i] = bins.lows[i] = bins.highs[i] = 0;
}

// The first bin with which `k` tokens, or the mass `target`, is reached. Of all threads of one block; `size` is a multiple of THREADS.
__device__ __forceinline__ Found find_bin(const Bins bins, int size, uint32_t k, double target, Sums before, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = size / WARPS * warp, end = first + size / WARPS;
  Sums sum = {0, 0};
  for (int i = first + lane; i < end; i += 32) sum.count += bins.counts[i], sum.mass += ((uint64_t)bins.highs[i] << 32) + bins.lows[i];
  sum.count = __reduce_add_sync(ALL, sum.count);
  for (int step = 16; step; step /= 2) sum.mass += __shfl_xor_sync(ALL, sum.mass, step);
  if (lane == 0) s.warp_sums[warp][0] = sum;
  __syncthreads();
  for (int w = 0; w < warp; w++) before.count += s.warp_sums[w][0].count, before.mass += s.warp_sums[w][0].mass;
  if (k ? before.count < k && before.count + sum.count >= k
        : (double)before.mass < target && (double)(before.mass + sum.mass) >= target) {  // it is in this warp's bins
    for (int i = first + lane; i < end; i += 32) {
      uint32_t count = bins.counts[i], counts = count;
      uint64_t mass = ((uint64_t)bins.highs[i] << 32) + bins.lows[i], masses = mass;
      for (int step = 1; step < 32; step *= 2) {
        uint32_t c = __shfl_up_sync(ALL, counts, step);
        uint64_t m = __shfl_up_sync(ALL, masses, step);
        if (lane >= step) counts += c, masses += m;
      }
      Sums here = {before.mass + masses - mass, before.count + counts - count};
      if (k ? here.count < k && here.count + count >= k : (double)here.mass < target && (double)(here.mass + mass) >= target)
        s.found = {i, here, mass};
      before.count += __shfl_sync(ALL, counts, 31), before.mass += __shfl_sync(ALL, masses, 31);
    }
  }
  __syncthreads();
  return s.found;
}

// The largest key that min-p, top-k and top-p keep.
__device__ __forceinline__ int find_limit(const Arguments& a, int row, float (&x)[E], float largest, float scale, uint32_t* memory,
                                          Shared& s) {
  const float min_p = a.min_p[row];
  const int top_k = a.top_k[row];
  Search search = {largest, scale, LAST_KEY, top_k > 0 && top_k < V ? (uint32_t)top_k : 0, a.top_p[row]};
  if (min_p > 0) search.limit = (int)fminf(-logf(min_p) * KEYS_PER_UNIT, (float)LAST_KEY);
  if (!search.top_k && !(search.top_p < 1)) return search.limit;
  const Bins bins = {memory, memory + BINS, memory + 2 * BINS};
  memory += 3 * BINS;
  const Bins keys = {memory, memory + MOST_KEYS, memory + 2 * MOST_KEYS};
  sum_ranges(x, search, s);
  int limit = search.limit, gathered = -1;
  uint64_t total = s.sums[RANGES - 1].mass;
  for (int stage = 0; stage < 2; stage++) {  // top-k, then top-p
    const uint32_t k = stage ? 0 : search.top_k;
    if (stage ? !(search.top_p < 1) : !k || s.sums[RANGES - 1].count <= k) continue;
    const double target = fmax((double)search.top_p * (double)total, 1e-300);  // of top_p 0: the likeliest token stays
    const int range = find_range(s, k, target), shift = range < RANGES - 1 ? 10 : 12;
    const Sums before = range ? s.sums[range - 1] : Sums{0, 0};
    if (range != gathered) {
      gather(x, search, bins, range << 19, BINS, shift);
      push(bins, BINS);
      cluster_sync();
    }
    Found found;
    if (cluster_rank() == 0) {
      found = find_bin(bins, BINS, k, target, before, s);
      if (threadIdx.x < CLUSTER) put(&s.bin, threadIdx.x, (uint32_t)found.bin);
    }
    cluster_sync();
    const int first = (range << 19) + (s.bin << shift);
    gather(x, search, keys, first, 1 << shift, 0);
    push(keys, 1 << shift);
    cluster_sync();
    if (cluster_rank() == 0) {
      found = find_bin(keys, 1 << shift, k, target, found.before, s);
      total = found.before.mass + found.mass_inside;
      if (threadIdx.x < CLUSTER) put(&s.limit, threadIdx.x, (uint32_t)(first + found.bin)), put_64(&s.total, threadIdx.x, total);
      if (!stage) clear(keys, 1 << shift);
      if (!stage && find_range(s, 0, fmax((double)search.top_p * (double)total, 1e-300)) != range) clear(bins, BINS);
    }
    cluster_sync();
    limit = min(limit, s.limit), total = s.total, gathered = range;
  }
  return limit;
}
#endif

// The best of this thread's tokens. A bound of each score spares nearly all exact logarithms: g = -log(-log(1 - w)) is at most -log(w).
// The bounds replace the logits.
__device__ __forceinline__ uint64_t draw(const Arguments& a, int row, float (&x)[E], float largest, float temperature, int limit) {
  const uint64_t hash = mix64(mix64((uint64_t)a.seed[row] * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull) +
                              ((uint64_t)(int64_t)a.position[row] + 1) * 0x9E3779B97F4A7C15ull);
  const float scale = KEYS_PER_UNIT / temperature, end = end_of(limit);
  float most = -INFINITE;
  int likely = -1;
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (LIMITED && !is_before((largest - x[e]) * scale, end)) {
      x[e] = -INFINITE;
      continue;
    }
    x[e] += temperature * (1e-4f - LN_2 * log2_fast(uniform(hash, token_of(e))));
    if (x[e] > most) most = x[e], likely = e;
  }
  uint64_t best = 0;
  uint64_t open = likely < 0 ? 0 : (uint64_t)1 << (likely % 64);
  for (int round = 0; round < 2; round++) {
    while (open) {
      int e = __ffsll(open) - 1;
      open &= open - 1;
      uint32_t token = token_of(e);
      float g = -logf(-log1pf(-uniform(hash, token)));
      uint64_t scored = pack(load_one(a, row, token) + temperature * g, token);
      best = scored > best ? scored : best;
    }
    if (round) break;
    __syncwarp();
    uint32_t sure = __reduce_max_sync(ALL, (uint32_t)(best >> 32));
    float score = sure ? from_ordered(sure) : INFINITE;
#pragma unroll
    for (int e = 0; e < E; e++)
      if (x[e] >= score && e != likely) open |= (uint64_t)1 << (e % 64);
  }
  return best;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, E <= 32 ? 2 : 1)
    choose(const __grid_constant__ Arguments a) {
  static_assert(E <= 64, "a bit for each number of a thread");
  __shared__ Shared s;
  const int row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float x[E];
#pragma unroll
  for (int e = 0; e < E; e += 4) {
    x[e] = x[e + 1] = x[e + 2] = x[e + 3] = -INFINITE;
    if (token_of(e) < V) load_four(a, row, token_of(e), x + e);
  }
#if LIMITED
  extern __shared__ uint4 zeros[];
  for (int i = threadIdx.x; i < 3 * (BINS + MOST_KEYS) / 4; i += THREADS) zeros[i] = make_uint4(0, 0, 0, 0);
#endif
  bool is_wrong;
  const float largest = find_largest(x, s, &is_wrong);
  int token = is_wrong ? NO_PLACE : NOTHING_LEFT;
  if (!is_wrong && largest > -INFINITE) {  // the same for the whole cluster
    uint64_t best = 0;
    const float temperature = a.temperature[row];
    if (temperature > 0) {
      int limit = LAST_KEY;
#if LIMITED
      limit = find_limit(a, row, x, largest, KEYS_PER_UNIT / temperature, (uint32_t*)zeros, s);
#endif
      best = draw(a, row, x, largest, temperature, limit);
    } else {
#pragma unroll
      for (int e = E - 1; e >= 0; e--)
        if (x[e] == largest) best = pack(largest, token_of(e));
    }
    for (int step = 16; step; step /= 2) {
      uint64_t other = __shfl_xor_sync(ALL, best, step);
      best = other > best ? other : best;
    }
    if (lane == 0) s.warp_best[warp] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < WARPS; w++) best = s.warp_best[w] > best ? s.warp_best[w] : best;
      put_64(&s.best[cluster_rank()], 0, best);
    }
    cluster_sync();
    if (cluster_rank() == 0 && threadIdx.x == 0)
      for (int block = 0; block < CLUSTER; block++) best = s.best[block] > best ? s.best[block] : best;
    token = (int)~(uint32_t)best;
  }
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    a.tokens[row] = token;
    if (a.slots) a.newest[a.slots[row]] = max(token, 0);
  }
}
