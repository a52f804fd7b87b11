/* Matrix products with weights packed once: out[M, N] = a[M, K] w[N, K]^T + bias[N].

   w is stored as panels of NR outputs, each [K / STEP][NR][STEP]; a is packed per call as tiles of rows, each [K / STEP][rows][STEP].
   Every output is one chain of K / STEP additions, in order of k, whatever M, the tile and the number of threads: a row's result does not
   depend on its batch. Included once for each element type (ELEM, NAME). */

#define NR (2 * VL)

#ifdef ELEM_IS_BF16
#define STEP 2
typedef uint32_t NAME(unit);
#else
#define STEP 1
typedef float NAME(unit);
#endif

#ifndef LINEAR_ONCE
#define LINEAR_ONCE
#define BAND_BYTES (384 << 10)
/* Rows of M in `count` tiles that differ by at most one. */
INLINE long tile_start(long M, long count, long i) { return M / count * i + (i < M % count ? i : M % count); }
#endif

/* w: [N, K] row-major -> packed: ceil(N / NR) panels; outputs past N are zeros. */
void NAME(pack_weight)(const ELEM *w, ELEM *packed, long N, long K) {
    long panels = (N + NR - 1) / NR;
    for (long panel = 0; panel < panels; panel++)
        for (long k = 0; k < K; k += STEP)
            for (long n = 0; n < NR; n++)
                for (long s = 0; s < STEP; s++) {
                    long row = panel * NR + n;
                    *packed++ = row < N ? w[row * K + k + s] : 0;
                }
}

INLINE void NAME(multiply_add)(vf *acc, NAME(unit) a, const ELEM *w0) {
#if defined(ELEM_IS_BF16) && defined(HAS_BF16_DOT)
    *acc = (vf)_mm512_dpbf16_ps((__m512)*acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(w0));
#elif defined(ELEM_IS_BF16)
    vu pair;
    memcpy(&pair, w0, sizeof pair);
    float low = 0, high = 0;
    uint32_t low_bits = a << 16, high_bits = a & 0xffff0000u;
    memcpy(&low, &low_bits, 4);
    memcpy(&high, &high_bits, 4);
    *acc += low * (vf)(pair << 16);
    *acc += high * (vf)(pair & 0xffff0000u);
#else
    *acc += a * load_f32(w0);
#endif
}

/* Sums of one tile, [rows][NR], into `out`; `columns` of them exist. */
static __attribute__((noinline)) void NAME(store_tile)(const float *sums, long rows, ELEM *out, long ldo, const ELEM *bias, long columns) {
    for (long r = 0; r < rows; r++, sums += NR, out += ldo)
        for (int j = 0; j < 2; j++) {
            vf x = load_f32(sums + j * VL);
            if (columns >= (j + 1) * VL) {
                if (bias) x += NAME(load)(bias + j * VL);
                NAME(store)(out + j * VL, x);
            } else
                for (long n = j * VL; n < columns; n++) NAME(put)(out + n, sums[n] + (bias ? NAME(get)(bias + n) : 0));
        }
}

/* One tile: `rows` is a constant wherever this is inlined, so acc lives in registers. Lines of the next panel are asked for meanwhile. */
INLINE void NAME(tile)(const int rows, const NAME(unit) *a, const ELEM *w, const char *next, long next_lines, long K, float *sums) {
    vf acc[MR][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = splat(0);
    for (long k = 0; k < K / STEP; k++) {
        if (next_lines > 0) __builtin_prefetch(next + k * next_lines * 64);
        if (next_lines > 1) __builtin_prefetch(next + k * next_lines * 64 + 64);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            NAME(multiply_add)(&acc[r][0], a[r], w);
            NAME(multiply_add)(&acc[r][1], a[r], w + VL * STEP);
        }
        a += rows;
        w += NR * STEP;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_f32(sums + r * NR, acc[r][0]);
        store_f32(sums + r * NR + VL, acc[r][1]);
    }
}

static void NAME(any_tile)(long rows, const NAME(unit) *a, const ELEM *w, const char *next, long next_lines, long K, ELEM *out, long ldo,
                           const ELEM *bias, long columns) {
    float sums[MR * NR];
#define TILE(n) \
    case n: NAME(tile)(n, a, w, next, next_lines, K, sums); break;
    switch (rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if MR > 6
        TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
#if MR > 12
        TILE(13) TILE(14)
#endif
    }
#undef TILE
    NAME(store_tile)(sums, rows, out, ldo, bias, columns);
}

INLINE void NAME(pack_rows)(const ELEM *a, long lda, long rows, long K, ELEM *packed) {
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < K; k += STEP)
            for (long s = 0; s < STEP; s++) packed[(k / STEP * rows + r) * STEP + s] = a[r * lda + k + s];
}

typedef struct {
    const ELEM *a, *w, *bias;
    ELEM *out, *a_packed;
    long lda, M, N, K, tiles, tiles_a_band, bands;
} NAME(product);

static void NAME(pack_tiles)(void *context, long first_tile, long last_tile) {
    const NAME(product) *p = context;
    for (long i = first_tile; i < last_tile; i++) {
        long first = tile_start(p->M, p->tiles, i), rows = tile_start(p->M, p->tiles, i + 1) - first;
        NAME(pack_rows)(p->a + first * p->lda, p->lda, rows, p->K, p->a_packed + first * p->K);
    }
}

/* Tasks go band by band, so that a band's rows of `a` stay in the level-2 cache while the panels pass by. */
static void NAME(multiply)(void *context, long first_task, long last_task) {
    const NAME(product) *p = context;
    long K = p->K, N = p->N, panels = (N + NR - 1) / NR;
    for (long task = first_task; task < last_task; task++) {
        long band = task / panels, panel = task % panels;
        const ELEM *w_panel = p->w + panel * NR * K;
        const char *next = (const char *)(w_panel + NR * K);
        long last = (band + 1) * p->tiles_a_band < p->tiles ? (band + 1) * p->tiles_a_band : p->tiles;
        for (long i = band * p->tiles_a_band; i < last; i++) {
            long first = tile_start(p->M, p->tiles, i), rows = tile_start(p->M, p->tiles, i + 1) - first;
            /* A panel has two lines a step: one tile asks for both, else the first two tiles for one each. */
            long lines = (panel + 1) * NR >= N ? 0 : p->tiles == 1 ? 2 : i < 2 ? 1 : 0;
            NAME(any_tile)(rows, (const NAME(unit) *)(p->a_packed + first * K), w_panel, next + (i == 1 ? K / STEP * 64 : 0), lines, K,
                           p->out + first * N + panel * NR, N, p->bias ? p->bias + panel * NR : 0, N - panel * NR);
        }
    }
}

/* a_packed: room for M * K elements. K is a multiple of STEP. */
void NAME(linear)(const ELEM *a, long lda, const ELEM *w, const ELEM *bias, ELEM *out, ELEM *a_packed, long M, long N, long K) {
    if (M == 0) return;
    long tiles = (M + MR - 1) / MR, tiles_a_band = BAND_BYTES / (MR * K * (long)sizeof(ELEM)) + 1;
    long bands = (tiles + tiles_a_band - 1) / tiles_a_band;
    NAME(product) p = {a, w, bias, out, a_packed, lda, M, N, K, tiles, tiles_a_band, bands};
    if (M == 1)
        p.a_packed = (ELEM *)a; /* packed as it is */
    else if (M * K < ENOUGH_FOR_THREADS)
        NAME(pack_tiles)(&p, 0, tiles);
    else
        run_loop(NAME(pack_tiles), &p, tiles, 4);
    run_loop(NAME(multiply), &p, (N + NR - 1) / NR * bands, 8);
}

#undef STEP
