// Attention of one new token per sequence over a paged 8-bit KV cache, for Hopper: a form of triton_decode.py, which has the contract.
//
// A warp attends the G query heads of one KV head of one row. Keys and values flow through a ring in shared memory, BN at a time; widened
// to float16, they are the left operands of the matrix unit, query heads, padded to 8, the right ones, so that a thread keeps its two
// columns of heads throughout. Keys of earlier tokens are on their way before the kernel that makes the queries is over.
//
// Set by the compiler's options: NORM (of query and key heads), PEAKS, BN (32 or 64), STAGES, TYPE (of heads). Head dim 128.

struct Arguments {
  const uint16_t* heads;  // rows of queries, keys, values
  uint16_t* out;          // [R, N, 128]
  uint8_t* cache;         // e4m3 [blocks, 2 K, tokens per block, 128]
  const int *table, *slots, *lengths;
  const float* rope;      // a row per position: cosines of 64 angles, then their sines
  const uint16_t *query_norm, *key_norm;
  int* peaks;             // [R, peaks_per_row]
  float scale, epsilon;   // scale with log2(e)
  int row_stride, table_stride, window;
  int K, G, block_shift, peaks_per_row;
};

constexpr int H = 128, CHUNKS = H / 16, KEYS_PER_COPY = 32 / CHUNKS, PLANE_BYTES = BN * H;

// Two e4m3 numbers in 16 bits; two float16 numbers; the first in the low half.
__device__ __forceinline__ uint32_t narrow(float low, float high) {
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t widen(uint32_t both) {
  uint32_t wide;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"((uint16_t)both));
  return wide;
}
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float wide_low(uint32_t both) {
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(both));
  return x;
}
__device__ __forceinline__ float wide_high(uint32_t both) {
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(both));
  return x;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Zeros where `is_seen` is not.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool is_seen) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_seen ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t at, uint32_t (&v)[4]) {  // lane i has the address of row i % 8 of matrix i / 8
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ uint32_t transpose(uint32_t x) {  // an 8 x 8 matrix
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A key's 16-byte chunks are permuted, so that neither the reads of keys nor those of values meet in a bank.
__device__ __forceinline__ uint32_t key_place(int key, int chunk) { return key * H + ((chunk ^ (key & 1) << 2) << 4); }
__device__ __forceinline__ uint32_t value_place(int key, int chunk) { return key * H + ((chunk ^ (key & 7)) << 4); }
// The place of a thread's i-th dim: 4 threads share a head, each has 16 bytes of every 64.
__device__ __forceinline__ int dim_of(int i, int t) { return i / 16 * 64 + t * 16 + i % 16; }

// 32 dims of a head, in dim_of's order, after norm and rotation.
__device__ __forceinline__ void load_rotated(float (&x)[32], const uint16_t* head, const uint16_t* norm, const float* rope, float epsilon, int t) {
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    uint32_t both = *(const uint32_t*)(head + dim_of(i, t));
    x[i] = unpack_low(both), x[i + 1] = unpack_high(both);
  }
  if (NORM) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) sum += x[i] * x[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float factor = rsqrtf(sum / H + epsilon);
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      uint32_t both = *(const uint32_t*)(norm + dim_of(i, t));
      x[i] *= factor * unpack_low(both), x[i + 1] *= factor * unpack_high(both);
    }
  }
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    float2 cos = *(const float2*)(rope + dim_of(i, t)), sin = *(const float2*)(rope + H / 2 + dim_of(i, t));
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float left = x[i + e], right = x[i + e + 16], c = e ? cos.y : cos.x, s = e ? sin.y : sin.x;
      x[i + e] = left * c - right * s;
      x[i + e + 16] = right * c + left * s;
    }
  }
}

extern "C" __global__ void __launch_bounds__(32) decode(const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t raw[];
  uint32_t ring = (shared_address(raw) + 127) & ~127u;
  int head = blockIdx.x, row = blockIdx.y;
  int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  // Nothing up to the wait is written by the kernel before.
  int length = a.lengths[row], first = max(length - a.window, 0), begin = first / BN * BN;
  int last = max(length - 1, 0), end = length - 1, steps = begin < end ? (end - begin + BN - 1) / BN : 0;
  const int* table = a.table + (size_t)(a.slots ? a.slots[row] : row) * a.table_stride;
  size_t plane_bytes = (size_t)H << a.block_shift, block_bytes = plane_bytes * 2 * a.K;
  const uint8_t* planes = a.cache + head * plane_bytes;
  auto block_of = [&](int step) {  // of the BN / 32 keys from lane * (BN / 32) on
    int at = min(begin + step * BN + lane * (BN / 32), end - 1);
    return step < steps ? table[max(at, first) >> a.block_shift] : 0;
  };
  auto load = [&](int step, int block) {
    if (step < steps) {
      uint32_t to = ring + step % STAGES * (2 * PLANE_BYTES);
#pragma unroll
      for (int i = 0; i < BN / KEYS_PER_COPY; i++) {
        int key = i * KEYS_PER_COPY + lane / CHUNKS, chunk = lane % CHUNKS, at = begin + step * BN + key;
        int id = __shfl_sync(~0u, block, i * KEYS_PER_COPY / (BN / 32));
        bool is_seen = at >= first && at < end;
        const uint8_t* from = planes + id * block_bytes + (size_t)(at & ((1 << a.block_shift) - 1)) * H + chunk * 16;
        copy_16(to + key_place(key, chunk), from, is_seen);
        copy_16(to + PLANE_BYTES + value_place(key, chunk), from + plane_bytes * a.K, is_seen);
      }
    }
    copy_commit();
  };
  int block = block_of(0);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    int next = block_of(s + 1);
    load(s, block);
    block = next;
  }
  wait_for_predecessor();
  start_successor();

  const uint16_t* heads = a.heads + (size_t)row * a.row_stride;
  uint32_t q[16];  // of query head g; those beyond G are zero
  float high[2] = {-1e30f, -1e30f}, total[2] = {}, acc[H / 16][4] = {};  // of heads 2 t and 2 t + 1: two rows of dims per 16, two heads
  {
    float x[32];
    bool is_head = g < a.G;
    load_rotated(x, heads + (head * a.G + (is_head ? g : 0)) * H, a.query_norm, a.rope + (size_t)last * H, a.epsilon, t);
#pragma unroll
    for (int i = 0; i < 16; i++) q[i] = is_head ? pack_half(x[i * 2], x[i * 2 + 1]) : 0;
  }
  if (length > 0) {  // the new token: out of registers, and into the cache
    float x[32];
    const uint16_t *key = heads + (a.K * a.G + head) * H, *value = key + a.K * H;
    load_rotated(x, key, a.key_norm, a.rope + (size_t)last * H, a.epsilon, t);
    uint8_t* to = a.cache + table[last >> a.block_shift] * block_bytes + head * plane_bytes + (size_t)(last & ((1 << a.block_shift) - 1)) * H;
    float score = 0.0f;
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      uint32_t kept = narrow(x[i * 2], x[i * 2 + 1]), wide = widen(kept);
      words[i / 2] = i % 2 ? words[i / 2] | kept << 16 : kept;
      score += wide_low(q[i]) * wide_low(wide) + wide_high(q[i]) * wide_high(wide);
    }
    score += __shfl_xor_sync(~0u, score, 1);
    score += __shfl_xor_sync(~0u, score, 2);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      high[e] = __shfl_sync(~0u, score, (t * 2 + e) * 4) * a.scale;
      total[e] = g == 0 ? 1.0f : 0.0f;  // sums of 8 threads are added at the end
    }
    if (g == 0) {
      *(uint4*)(to + dim_of(0, t)) = make_uint4(words[0], words[1], words[2], words[3]);
      *(uint4*)(to + dim_of(16, t)) = make_uint4(words[4], words[5], words[6], words[7]);
    }
    uint8_t* value_to = to + plane_bytes * a.K;
#pragma unroll
    for (int c = 0; c < H / 16; c++) {  // dims of this thread's rows of acc
      int dim = c * 16 + g * 2;
      uint32_t both = *(const uint32_t*)(value + dim), kept = narrow(unpack_low(both), unpack_high(both)), wide = widen(kept);
      if (t == 0) *(uint16_t*)(value_to + dim) = (uint16_t)kept;
      acc[c][0] = acc[c][1] = wide_low(wide), acc[c][2] = acc[c][3] = wide_high(wide);
    }
  }

  for (int step = 0; step < steps; step++) {
    int next = block_of(step + STAGES);
    copy_wait<STAGES - 2>();
    __syncwarp();
    load(step + STAGES - 1, block);
    block = next;
    uint32_t keys = ring + step % STAGES * (2 * PLANE_BYTES), values = keys + PLANE_BYTES;
    float scores[BN / 16][4] = {};
#pragma unroll
    for (int m = 0; m < BN / 16; m++) {
#pragma unroll
      for (int j = 0; j < CHUNKS / 4; j++) {
        uint4 low = load_shared(keys + key_place(m * 16 + g, t + j * 4)), high_rows = load_shared(keys + key_place(m * 16 + 8 + g, t + j * 4));
        const uint32_t l[4] = {low.x, low.y, low.z, low.w}, h[4] = {high_rows.x, high_rows.y, high_rows.z, high_rows.w};
#pragma unroll
        for (int w = 0; w < 4; w++)
          multiply(scores[m], widen(l[w]), widen(h[w]), widen(l[w] >> 16), widen(h[w] >> 16), q[j * 8 + w * 2], q[j * 8 + w * 2 + 1]);
      }
    }
    int from = begin + step * BN;
    bool is_whole = from >= first && from + BN <= end;
    float higher[2] = {high[0], high[1]};
#pragma unroll
    for (int m = 0; m < BN / 16; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at = from + m * 16 + i / 2 * 8 + g;
        scores[m][i] = is_whole || (at >= first && at < end) ? scores[m][i] * a.scale : -__int_as_float(0x7f800000);
        higher[i % 2] = fmaxf(higher[i % 2], scores[m][i]);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      for (int i = 4; i < 32; i *= 2) higher[e] = fmaxf(higher[e], __shfl_xor_sync(~0u, higher[e], i));
      float shrink = exp2_fast(high[e] - higher[e]);
      total[e] *= shrink, high[e] = higher[e];
#pragma unroll
      for (int c = 0; c < H / 16; c++) acc[c][e] *= shrink, acc[c][e + 2] *= shrink;
    }
#pragma unroll
    for (int m = 0; m < BN / 16; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[m][i] = exp2_fast(scores[m][i] - high[i % 2]);
        total[i % 2] += scores[m][i];
      }
      uint32_t first_weights = transpose(pack_half(scores[m][0], scores[m][1])), second_weights = transpose(pack_half(scores[m][2], scores[m][3]));
      int key = m * 16 + lane % 16, chunk = lane / 16;  // whose address this lane gives
#pragma unroll
      for (int c = 0; c < H / 16; c += 2) {  // pairs of dims lie in 16 bits: the first ones are rows 0 to 7 of a tile, the second ones 8 to 15
        uint32_t v[4];
        load_transposed(values + value_place(key, c + chunk), v);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t low = __byte_perm(v[i * 2], 0, 0x3120), high_keys = __byte_perm(v[i * 2 + 1], 0, 0x3120);
          multiply(acc[c + i], widen(low), widen(low >> 16), widen(high_keys), widen(high_keys >> 16), first_weights, second_weights);
        }
      }
    }
  }

  copy_wait<0>();
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 2; e++)
    for (int i = 4; i < 32; i *= 2) total[e] += __shfl_xor_sync(~0u, total[e], i);
  float* sums = (float*)(raw + (ring - shared_address(raw)));  // [8, H]: the ring is free
#pragma unroll
  for (int c = 0; c < H / 16; c++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sums[(t * 2 + i % 2) * H + c * 16 + g * 2 + i / 2] = acc[c][i] / (total[i % 2] > 0.0f ? total[i % 2] : 1.0f);
    }
  }
  __syncwarp();
  uint16_t* out = a.out + ((size_t)row * a.K + head) * a.G * H + lane * 4;
  float peak = 0.0f;
  for (int i = 0; i < a.G; i++) {
    float4 y = *(const float4*)(sums + i * H + lane * 4);
    uint32_t left = pack(y.x, y.y), right = pack(y.z, y.w);
    *(uint2*)(out + i * H) = make_uint2(left, right);
    if (PEAKS) peak = fmaxf(peak, fmaxf(fmaxf(fabsf(unpack_low(left)), fabsf(unpack_high(left))), fmaxf(fabsf(unpack_low(right)), fabsf(unpack_high(right)))));
  }
  if (PEAKS) {
    for (int i = 1; i < 32; i *= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, i));
    if (lane == 0) atomicMax(a.peaks + row * a.peaks_per_row + head % a.peaks_per_row, __float_as_int(peak));
  }
}
