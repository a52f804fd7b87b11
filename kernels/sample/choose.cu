// Tokens from logits by the rule of kernels/sample/rule.py: a row by a cluster of blocks, which keeps it in registers.
//
//     load, largest ─▶ limited rows: bins of count and mass ─▶ largest key that is kept ─▶ draw ─▶ token
//
// The blocks gather bins in shared memory and add them to those of the cluster's first block, which searches them: 1,024
// coarse bins, then the 4,096 keys of the bin where the limit lies.
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
#define COARSE 1024
#define FINE 4096  // keys of a coarse bin
#define FINE_BITS 12
#define DONE -2  // in place of a coarse bin
#define HALF_BITS 12  // a mass is added in halves of 14 and 12 bits, whose sums stay below 2^32 for 2^18 tokens
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

struct Bins {  // of `size` each
  uint32_t *counts, *highs, *lows;
};

struct Found {
  int bin;
  uint32_t count_before;
  uint64_t mass_before, mass_inside, total;
};

struct Shared {
  float largest[CLUSTER], warp_largest[WARPS];
  uint32_t is_wrong[CLUSTER], warp_is_wrong[WARPS];
  uint64_t best[CLUSTER], warp_best[WARPS], warp_mass[WARPS];
  uint32_t warp_count[WARPS];
  int wanted_bin, limit;
  Found found;
};

// ---- shared memory of other blocks
// It is there once they have entered the kernel: each thread calls the first at its start, the second before the first `put`.
__device__ __forceinline__ void cluster_enter() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void await_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
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
__device__ __forceinline__ void add_at_first(const void* at, uint32_t value) {
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(at_block(at, 0)), "r"(value) : "memory");
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
__device__ __forceinline__ int key_of(float z) { return (int)fminf(z * KEYS_PER_UNIT, (float)LAST_KEY); }

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
  await_cluster();
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
// The first bin with which `k` tokens are reached, or, where k is 0, the last before which less mass than `target` lies; bin -1: none.
// Called by all threads of one block.
template <int SIZE>
__device__ Found find_bin(const Bins bins, uint32_t k, double target, uint32_t count_before, uint64_t mass_before, Shared& s) {
  constexpr int PER = SIZE / THREADS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * PER;
  uint32_t count = 0;
  uint64_t mass = 0;
  for (int i = first; i < first + PER; i++) count += bins.counts[i], mass += ((uint64_t)bins.highs[i] << HALF_BITS) + bins.lows[i];
  uint32_t counts = count;
  uint64_t masses = mass;
  for (int step = 1; step < 32; step *= 2) {
    uint32_t c = __shfl_up_sync(ALL, counts, step);
    uint64_t m = __shfl_up_sync(ALL, masses, step);
    if (lane >= step) counts += c, masses += m;
  }
  if (lane == 31) s.warp_count[warp] = counts, s.warp_mass[warp] = masses;
  if (threadIdx.x == 0) s.found.bin = -1;
  __syncthreads();
  uint64_t total = 0;
  counts += count_before - count, masses += mass_before - mass;
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) counts += s.warp_count[w], masses += s.warp_mass[w];
    total += s.warp_mass[w];
  }
  if (threadIdx.x == 0) s.found.total = total;
  for (int i = first; i < first + PER; i++) {
    count = bins.counts[i], mass = ((uint64_t)bins.highs[i] << HALF_BITS) + bins.lows[i];
    bool is_it = k ? counts < k && counts + count >= k : (double)masses < target && (double)(masses + mass) >= target;
    if (is_it) s.found.bin = i, s.found.count_before = counts, s.found.mass_before = masses, s.found.mass_inside = mass;
    counts += count, masses += mass;
  }
  __syncthreads();
  Found found = s.found;
  __syncthreads();
  return found;
}

struct Search {
  float largest, scale;  // 1 / temperature
  int limit;             // of min-p
  uint32_t top_k;        // 0: off
  float top_p;           // 1: off
};

// Adds a block's tokens to its own bins: coarse ones, or those of the keys of one coarse bin.
__device__ __forceinline__ void gather(float (&x)[E], const Search& search, const Bins bins, int coarse_bin) {
#pragma unroll
  for (int e = 0; e < E; e++) {
    asm volatile("" : "+f"(x[e]));  // so that nothing is computed ahead and kept
    float z = (search.largest - x[e]) * search.scale;
    int key = key_of(z);
    if (key > search.limit || (coarse_bin >= 0 && key >> FINE_BITS != coarse_bin)) continue;
    int place = coarse_bin >= 0 ? key & (FINE - 1) : key >> FINE_BITS;
    if (search.top_k) atomicAdd(&bins.counts[place], 1);
    if (search.top_p < 1) {
      uint32_t mass = (uint32_t)(exp2_fast(z * -LOG2_E) * MASS_OF_LARGEST + 0.5f);
      if (mass >> HALF_BITS) atomicAdd(&bins.highs[place], mass >> HALF_BITS);
      if (mass & ((1 << HALF_BITS) - 1)) atomicAdd(&bins.lows[place], mass & ((1 << HALF_BITS) - 1));
    }
  }
  __syncthreads();
}

// Adds the bins to those of the first block, and clears them.
__device__ __forceinline__ void push(const Bins bins, int size) {
  for (int i = threadIdx.x; i < size; i += THREADS) {
    if (bins.counts[i]) add_at_first(&bins.counts[i], bins.counts[i]), bins.counts[i] = 0;
    if (bins.highs[i]) add_at_first(&bins.highs[i], bins.highs[i]), bins.highs[i] = 0;
    if (bins.lows[i]) add_at_first(&bins.lows[i], bins.lows[i]), bins.lows[i] = 0;
  }
}

// What the first block looks for next in bins that have been added up; `limit` so far. Of the whole block.
struct Progress {
  bool has_k, has_p;
  int limit;
  uint32_t count_before;  // the coarse bin whose keys are looked at
  uint64_t mass_before;
  double target;  // of top-p's mass
};

// The coarse bin whose keys must be gathered next, or DONE. `bin`: those that have just been gathered, or -1.
__device__ __forceinline__ int advance(Progress& to, const Search& search, const Bins coarse, const Bins fine, int bin, Shared& s) {
  if (bin < 0 && search.top_k) {
    Found k = find_bin<COARSE>(coarse, search.top_k, 0, 0, 0, s);
    to.target = (double)search.top_p * (double)k.total;
    if (k.bin >= 0) {
      to.has_k = true, to.count_before = k.count_before, to.mass_before = k.mass_before;
      return k.bin;
    }
  } else if (bin < 0) {
    to.target = (double)search.top_p * (double)find_bin<COARSE>(coarse, 1, 0, 0, 0, s).total;
  } else {
    Found key = find_bin<FINE>(fine, to.has_k ? search.top_k : 0, to.target, to.count_before, to.mass_before, s);
    to.limit = min(to.limit, bin * FINE + key.bin);
    if (to.has_p) return DONE;
    to.target = (double)search.top_p * (double)(key.mass_before + key.mass_inside);
  }
  if (!(search.top_p < 1)) return DONE;
  to.target = fmax(to.target, 1e-300);  // of top_p 0: the likeliest token stays
  Found p = find_bin<COARSE>(coarse, 0, to.target, 0, 0, s);
  to.has_k = false, to.has_p = true, to.mass_before = p.mass_before;
  if (p.bin == bin) {
    Found key = find_bin<FINE>(fine, 0, to.target, 0, p.mass_before, s);
    to.limit = min(to.limit, bin * FINE + key.bin);
    return DONE;
  }
  return p.bin;
}

// The largest key that min-p, top-k and top-p keep.
__device__ __forceinline__ int find_limit(const Arguments& a, int row, float (&x)[E], float largest, float scale, uint32_t* memory,
                                          Shared& s) {
  const float min_p = a.min_p[row];
  const int top_k = a.top_k[row];
  Search search = {largest, scale, LAST_KEY, top_k > 0 && top_k < V ? (uint32_t)top_k : 0, a.top_p[row]};
  if (min_p > 0) search.limit = (int)fminf(-logf(min_p) * KEYS_PER_UNIT, (float)LAST_KEY);
  if (!search.top_k && !(search.top_p < 1)) return search.limit;
  const Bins coarse = {memory, memory + COARSE, memory + 2 * COARSE};
  memory += 3 * COARSE;
  const Bins fine = {memory, memory + FINE, memory + 2 * FINE};
  Progress progress = {false, false, search.limit, 0, 0, 0};
  for (int bin = -1; bin != DONE;) {
    const Bins bins = bin < 0 ? coarse : fine;
    gather(x, search, bins, bin);
    if (cluster_rank() != 0) push(bins, bin < 0 ? COARSE : FINE);
    cluster_sync();
    if (cluster_rank() == 0) {
      int next = advance(progress, search, coarse, fine, bin, s);
      if (bin >= 0 && next != DONE)
        for (int i = threadIdx.x; i < FINE; i += THREADS) fine.counts[i] = fine.highs[i] = fine.lows[i] = 0;
      if (threadIdx.x < CLUSTER) {
        put(&s.wanted_bin, threadIdx.x, (uint32_t)next);
        put(&s.limit, threadIdx.x, (uint32_t)progress.limit);
      }
    }
    cluster_sync();
    bin = s.wanted_bin;
  }
  return s.limit;
}
#endif

// The best of this thread's tokens. A bound of each score spares nearly all exact logarithms: g = -log(-log(1 - w)) is at most -log(w).
// The bounds replace the logits.
__device__ __forceinline__ uint64_t draw(const Arguments& a, int row, float (&x)[E], float largest, float temperature, int limit) {
  const uint64_t hash = mix64(mix64((uint64_t)a.seed[row] * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull) +
                              ((uint64_t)(int64_t)a.position[row] + 1) * 0x9E3779B97F4A7C15ull);
  const float scale = 1 / temperature;
  float most = -INFINITE;
  int likely = -1;
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (LIMITED && key_of((largest - x[e]) * scale) > limit) {
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
  cluster_enter();
  const int row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float x[E];
#pragma unroll
  for (int e = 0; e < E; e += 4) {
    x[e] = x[e + 1] = x[e + 2] = x[e + 3] = -INFINITE;
    if (token_of(e) < V) load_four(a, row, token_of(e), x + e);
  }
#if LIMITED
  extern __shared__ uint4 zeros[];
  for (int i = threadIdx.x; i < 3 * (COARSE + FINE) / 4; i += THREADS) zeros[i] = make_uint4(0, 0, 0, 0);
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
      limit = find_limit(a, row, x, largest, 1 / temperature, (uint32_t*)zeros, s);
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
