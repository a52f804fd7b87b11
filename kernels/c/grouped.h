/* Products of rows with weights that are integers of 4 or 8 bits in groups: weight = scale * (code - zero) + minimum.

   A row is cut into blocks of inputs. A block becomes integers of 8 or 16 bits with a scale. The products of a block are summed in
   integers, exactly; blocks are added in float32 in order of k, whatever M, the tile and the number of threads: a row's result does not
   depend on its batch.

   packed: panels of NR outputs; a panel has, group by group,
     scales [NR], minimums [NR] if there are any (float32 or half), then codes:
     8 bits: [inputs / 4][NR][4];   4 bits: [inputs / 8][NR][4], input 8 i + j in the lower bits of byte j, 8 i + 4 + j in its upper bits.
   The last group's inputs are filled up to a whole block. a: tiles of rows, each [K / 4][rows][4] integers, with the factors of its blocks:
   [blocks][rows]. Four integers of 16 bits are in the order 0, 2, 1, 3: so every other byte of the codes is multiplied by a word. */
#pragma once

#if VL == 8
#include <immintrin.h>
#endif

#define NR (2 * VL)
#define MOST_BLOCK 64
#if VL == 16
#define TILE_OF_ROWS 6 /* 12 sums in integers and 12 in floats, two weights, as they are and masked */
#define HAS_HALF_SCALES 1
#elif VL == 8
#define TILE_OF_ROWS 2
#ifdef __F16C__
#define HAS_HALF_SCALES 1
#endif
#else
#define TILE_OF_ROWS 3
#endif

/* Elements of the matrix's own product; `form` chooses it. Filled by kernels/native/structures.py. */
enum { PACKED = 0, NARROW = 1 /* weights in bfloat16, rows in float32 */, GROUPED = 2 };
typedef struct {
    const void *packed, *bias;
    int64_t num_outputs, num_inputs;
    int64_t form;
    int64_t bits, zero, group, block; /* of GROUPED from here; a group is a number of whole blocks, or more than all of them */
    int64_t row_bytes; /* of an integer of a row: 1 or 2 */
    int64_t has_minimums, has_half_scales;
} matrix;

/* Of a block of a row. */
typedef struct {
    float scale;
    int32_t start; /* -zero * the sum of the block's integers */
    float sum;     /* of the block, as its integers give it */
} block_factors;

int reads_half_scales(void) {
#ifdef HAS_HALF_SCALES
    return 1;
#else
    return 0;
#endif
}

INLINE long grouped_blocks(const matrix *m) { return (m->num_inputs + m->block - 1) / m->block; }
INLINE long grouped_blocks_a_group(const matrix *m) {
    long blocks = grouped_blocks(m), group = m->group / m->block;
    return group < blocks ? group : blocks;
}
INLINE long bytes_of_scales(const matrix *m) { return NR * (m->has_half_scales ? 2 : 4); }
INLINE long bytes_of_header(const matrix *m) { return bytes_of_scales(m) * (m->has_minimums ? 2 : 1); }

static int64_t panel_bytes(const matrix *m) {
    long blocks = grouped_blocks(m), a_group = grouped_blocks_a_group(m), groups = (blocks + a_group - 1) / a_group;
    return groups * bytes_of_header(m) + blocks * m->block * NR * m->bits / 8;
}

int64_t grouped_bytes(const matrix *m) { return (m->num_outputs + NR - 1) / NR * panel_bytes(m); }

/* Bytes of scratch that a product of M rows needs. */
int64_t grouped_scratch(const matrix *m, int64_t M) {
    return M * grouped_blocks(m) * (m->block * m->row_bytes + (int64_t)sizeof(block_factors));
}

typedef struct {
    const matrix *m;
    const uint8_t *codes;
    const void *scales, *minimums;
    uint8_t *packed;
    long first, num_rows;
} packing;

static uint8_t code_at(const packing *p, long n, long k) {
    if (n >= p->num_rows || k >= p->m->num_inputs) return (uint8_t)p->m->zero;
    if (p->m->bits == 8) return p->codes[n * p->m->num_inputs + k];
    return p->codes[n * ((p->m->num_inputs + 1) / 2) + k / 2] >> (k % 2 * 4) & 15;
}

/* Nibbles 0 to 3 to bytes. */
INLINE uint32_t spread_nibbles(uint32_t x) {
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
}

/* Codes of output n and inputs k to k + 3 (8 bits) or k + 7 (4 bits), as they lie in a panel. */
INLINE uint32_t packed_codes(const packing *p, long n, long k) {
    const matrix *m = p->m;
    uint32_t codes = 0;
    if (n < p->num_rows && k + (m->bits == 8 ? 4 : 8) <= m->num_inputs) {
        memcpy(&codes, p->codes + (m->bits == 8 ? n * m->num_inputs + k : n * ((m->num_inputs + 1) / 2) + k / 2), sizeof codes);
        return m->bits == 8 ? codes : spread_nibbles(codes & 0xffff) | spread_nibbles(codes >> 16) << 4;
    }
    for (long j = 0; j < 4; j++) {
        uint32_t code = m->bits == 8 ? code_at(p, n, k + j) : code_at(p, n, k + j) | (uint32_t)code_at(p, n, k + 4 + j) << 4;
        codes |= code << 8 * j;
    }
    return codes;
}

static void pack_numbers(const packing *p, const void *numbers, uint8_t *out, long n, long group, long groups) {
    long size = p->m->has_half_scales ? 2 : 4;
    for (long i = 0; i < NR; i++)
        if (n + i < p->num_rows)
            memcpy(out + i * size, (const uint8_t *)numbers + ((n + i) * groups + group) * size, size);
        else
            memset(out + i * size, 0, size);
}

static void pack_panels(void *context, long first, long last) {
    const packing *p = context;
    const matrix *m = p->m;
    long blocks = grouped_blocks(m), a_group = grouped_blocks_a_group(m), groups = (blocks + a_group - 1) / a_group;
    for (long panel = first; panel < last; panel++) {
        uint8_t *out = p->packed + panel * panel_bytes(m);
        for (long group = 0; group < groups; group++) {
            pack_numbers(p, p->scales, out, panel * NR, group, groups);
            if (m->has_minimums) pack_numbers(p, p->minimums, out + bytes_of_scales(m), panel * NR, group, groups);
            out += bytes_of_header(m);
            long end = (group + 1) * a_group < blocks ? (group + 1) * a_group : blocks, step = m->bits == 8 ? 4 : 8;
            for (long k = group * a_group * m->block; k < end * m->block; k += step)
                for (long n = panel * NR; n < (panel + 1) * NR; n++, out += 4) {
                    uint32_t codes = packed_codes(p, n, k);
                    memcpy(out, &codes, sizeof codes);
                }
        }
    }
}

/* codes: [N, K], or [N, (K + 1) / 2] of two each; scales and minimums: [N, groups], in half where m says so, else in float32. */
void pack_grouped(const matrix *m, const uint8_t *codes, const void *scales, const void *minimums, uint8_t *packed) {
    packing p = {m, codes, scales, minimums, packed, 0, m->num_outputs};
    run_loop(pack_panels, &p, (m->num_outputs + NR - 1) / NR, 4);
}

INLINE vi max_vi(vi x, vi y) {
    vi is_more = x > y;
    return (is_more & x) | (~is_more & y);
}
INLINE int32_t largest_lane(vi x) {
#if VL == 16
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t largest = x[0];
    for (int i = 1; i < VL; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}
INLINE int32_t sum_lanes(vi x) {
#if VL == 16
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t sum = 0;
    for (int i = 0; i < VL; i++) sum += x[i];
    return sum;
#endif
}
/* The lowest bytes of all lanes, four to a word, words `stride` apart. */
INLINE void place_bytes(vi x, int32_t *words, long stride) {
#if VL == 16
    __m128i bytes = _mm512_cvtepi32_epi8((__m512i)x);
#else
    int8_t bytes[VL];
    for (int i = 0; i < VL; i++) bytes[i] = (int8_t)x[i];
#endif
#pragma GCC unroll 4
    for (int i = 0; i < VL / 4; i++) memcpy(words + i * stride, (const char *)&bytes + 4 * i, sizeof *words);
}

/* The lower halves of all lanes, four to two words in the order 0, 2, 1, 3; pairs of words are `stride` words apart. */
INLINE void place_halves(vi x, int32_t *words, long stride) {
#if VL == 16
    __m256i narrow = _mm512_cvtepi32_epi16((__m512i)x);
    narrow = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(narrow, 0xd8), 0xd8);
#else
    int16_t narrow[VL];
    for (int i = 0; i < VL; i++) narrow[i] = (int16_t)x[i / 4 * 4 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4)];
#endif
#pragma GCC unroll 4
    for (int i = 0; i < VL / 4; i++) memcpy(words + i * stride, (const char *)&narrow + 8 * i, 8);
}

INLINE vu load_bytes(const uint8_t *p) {
    vu x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* acc[i] += the sum over j of byte j of w[i], unsigned, times byte j of x, signed. */
INLINE vi dot4(vi acc, vu w, int32_t x) {
#if VL == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif VL == 8 && defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif VL == 16 && defined(__AVX512BW__)
    __m512i all = _mm512_set1_epi32(x), even = _mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8), odd = _mm512_srai_epi16(all, 8);
    acc += (vi)_mm512_madd_epi16((__m512i)(w & 0x00ff00ff), even);
    return acc + (vi)_mm512_madd_epi16((__m512i)(w >> 8 & 0x00ff00ff), odd);
#elif VL == 8
    __m256i all = _mm256_set1_epi32(x), even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), odd = _mm256_srai_epi16(all, 8);
    acc += (vi)_mm256_madd_epi16((__m256i)(w & 0x00ff00ff), even);
    return acc + (vi)_mm256_madd_epi16((__m256i)(w >> 8 & 0x00ff00ff), odd);
#else
    for (int j = 0; j < 4; j++) acc += (vi)(w >> 8 * j & 0xff) * (int32_t)(int8_t)(x >> 8 * j);
    return acc;
#endif
}

INLINE vf load_number(const uint8_t *p, int is_half) {
#ifdef HAS_HALF_SCALES
    if (is_half) {
#if VL == 16
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
    }
#endif
    return load_f32((const float *)p);
}

/* acc[i] += the sum over j of word j of w[i] times word j of x, all signed. */
INLINE vi dot2(vi acc, vu w, int32_t x) {
#if VL == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif VL == 8 && defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif VL == 16 && defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif VL == 8
    return acc + (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#else
    return acc + (vi)(w & 0xffff) * (int32_t)(int16_t)x + (vi)(w >> 16) * (x >> 16);
#endif
}

/* sums[rows][2] += four inputs of the panel's outputs, whose codes are the bytes of w0 and w1. */
INLINE void dot_bytes(const int rows, vi sums[][2], vu w0, vu w1, const int32_t *a) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        sums[r][0] = dot4(sums[r][0], w0, a[r]);
        sums[r][1] = dot4(sums[r][1], w1, a[r]);
    }
}

/* The same of rows of 16 bits, and of two inputs, whose codes are the bytes in `mask` of w0 and w1: the words a[2 r]. */
INLINE void dot_words(const int rows, vi sums[][2], vu w0, vu w1, uint32_t mask, const int32_t *a) {
    w0 &= mask, w1 &= mask;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        sums[r][0] = dot2(sums[r][0], w0, a[2 * r]);
        sums[r][1] = dot2(sums[r][1], w1, a[2 * r]);
    }
}

/* 16 inputs of the panel's outputs. */
INLINE const uint8_t *dot_16(const int rows, const int row_bytes, const int bits, vi sums[][2], const uint8_t *w, const int32_t *a) {
    const long step = rows * row_bytes;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += bits == 8 ? 1 : 2, a += step) {
        vu w0 = load_bytes(w), w1 = load_bytes(w + 4 * VL);
        if (row_bytes == 1 && bits == 8) dot_bytes(rows, sums, w0, w1, a);
        if (row_bytes == 1 && bits == 4) {
            dot_bytes(rows, sums, w0 & 0x0f0f0f0f, w1 & 0x0f0f0f0f, a);
            dot_bytes(rows, sums, w0 >> 4 & 0x0f0f0f0f, w1 >> 4 & 0x0f0f0f0f, a += step);
        }
        if (row_bytes == 2 && bits == 8) {
            dot_words(rows, sums, w0, w1, 0x00ff00ff, a);
            dot_words(rows, sums, w0 >> 8, w1 >> 8, 0x00ff00ff, a + 1);
        }
        if (row_bytes == 2 && bits == 4) {
            dot_words(rows, sums, w0, w1, 0x000f000f, a);
            dot_words(rows, sums, w0 >> 8, w1 >> 8, 0x000f000f, a + 1);
            a += step;
            dot_words(rows, sums, w0 >> 4, w1 >> 4, 0x000f000f, a);
            dot_words(rows, sums, w0 >> 12, w1 >> 12, 0x000f000f, a + 1);
        }
        w += 4 * NR;
    }
    return w;
}

/* One tile of rows and one panel: [rows][NR] sums. `rows`, `row_bytes` and `bits` are constants wherever this is inlined. */
INLINE void grouped_tile(const int rows, const int row_bytes, const int bits, const matrix *m, const int32_t *a, const block_factors *factors,
                         const uint8_t *w, const char *next, float *out) {
    vf total[TILE_OF_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = splat(0);
    long blocks = grouped_blocks(m), a_group = grouped_blocks_a_group(m), left = 0, is_half = m->has_half_scales;
    long steps = m->block / 16, scale_bytes = bytes_of_scales(m), number_bytes = scale_bytes / 2, header_bytes = bytes_of_header(m);
    long block_bytes = m->block * NR * bits / 8;
    const char *stop_next = next ? next + block_bytes : 0;
    const uint8_t *header = w;
    for (long b = 0; b < blocks; b++, left--, factors += rows) {
        if (left == 0) header = w, w += header_bytes, left = a_group;
        for (; next && next < stop_next + b * block_bytes; next += 64) __builtin_prefetch(next, 0, 2);
        vi sums[TILE_OF_ROWS][2];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (vi){0} + factors[r].start;
        for (long k = 0; k < steps; k++, a += 4 * rows * row_bytes) w = dot_16(rows, row_bytes, bits, sums, w, a);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vf scale = load_number(header + j * number_bytes, is_half);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) total[r][j] += __builtin_convertvector(sums[r][j], vf) * factors[r].scale * scale;
            if (m->has_minimums) {
                vf minimum = load_number(header + scale_bytes + j * number_bytes, is_half);
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) total[r][j] += minimum * factors[r].sum;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_f32(out + r * NR, total[r][0]);
        store_f32(out + r * NR + VL, total[r][1]);
    }
}

static void any_grouped_tile(long rows, const matrix *m, const int32_t *a, const block_factors *factors, const uint8_t *w, const char *next,
                             float *out) {
#define TILE_OF(n, row_bytes) \
    case n * 4 + row_bytes: \
        if (m->bits == 8) \
            grouped_tile(n, row_bytes, 8, m, a, factors, w, next, out); \
        else \
            grouped_tile(n, row_bytes, 4, m, a, factors, w, next, out); \
        break;
#define TILE(n) TILE_OF(n, 1) TILE_OF(n, 2)
    switch (rows * 4 + m->row_bytes) {
        TILE(1) TILE(2)
#if TILE_OF_ROWS > 2
        TILE(3)
#endif
#if TILE_OF_ROWS > 3
        TILE(4) TILE(5) TILE(6)
#endif
    }
#undef TILE_OF
#undef TILE
}

