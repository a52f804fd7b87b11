/* Matrix products with weights packed once: out[M, N] = a[M, K] w[N, K]^T + bias[N].

   w is stored as panels of NR outputs, each [K / W_STEP][NR][W_STEP]; a is packed per call as tiles of rows, each
   [K / A_STEP][rows][A_STEP]. Every output is one chain of additions in order of k, whatever M, the tile and the number of threads: a
   row's result does not depend on its batch. Included for each pair of element types: ELEM of a, bias and out, WEIGHT of w (NAME):

     float, float   bf16, bf16 (pairs of products, where the CPU has that)   float, bf16 (weights widened on the way: the same bits as
     float weights of the same values give, from half the memory) */

#define NR (2 * VL)

#if defined(ELEM_IS_BF16)
#define A_STEP 2
#define W_STEP 2
typedef uint32_t NAME(unit);
#elif defined(WEIGHT_IS_BF16)
#define A_STEP 1
#define W_STEP 2
typedef float NAME(unit);
#else
#define A_STEP 1
#define W_STEP 1
typedef float NAME(unit);
#endif

#ifndef LINEAR_ONCE
#define LINEAR_ONCE
#define BAND_BYTES (384 << 10)
#define BYTES_AHEAD 8192 /* of 1 to 16 KiB the best by a little; a whole panel ahead drives the rows out of the level-1 cache */
typedef uint32_t v4u __attribute__((vector_size(16)));
/* Rows of M in `count` tiles that differ by at most one. */
INLINE long tile_start(long M, long count, long i) { return M / count * i + (i < M % count ? i : M % count); }
#endif

/* w: [N, K] row-major -> packed: ceil(N / NR) panels; outputs past N are zeros. */
void NAME(pack_weight)(const WEIGHT *w, WEIGHT *packed, long N, long K) {
    long panels = (N + NR - 1) / NR;
    for (long panel = 0; panel < panels; panel++)
        for (long k = 0; k < K; k += W_STEP)
            for (long n = 0; n < NR; n++)
                for (long s = 0; s < W_STEP; s++) {
                    long row = panel * NR + n;
                    *packed++ = row < N ? w[row * K + k + s] : 0;
                }
}

/* acc[rows][2] += one W_STEP of a times w. */
INLINE void NAME(multiply_add)(const int rows, vf acc[][2], const NAME(unit) *a, const WEIGHT *w) {
#if defined(ELEM_IS_BF16) && defined(HAS_BF16_DOT)
    __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + VL * W_STEP);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512bh pair = (__m512bh)_mm512_set1_epi32((int)a[r]);
        acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], pair, w0);
        acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], pair, w1);
    }
#elif defined(WEIGHT_IS_BF16)
    vu left, right;
    memcpy(&left, w, sizeof left);
    memcpy(&right, w + 2 * VL, sizeof right);
#pragma GCC unroll 2
    for (int s = 0; s < 2; s++) {
        vf w0 = (vf)(s ? left & 0xffff0000u : left << 16), w1 = (vf)(s ? right & 0xffff0000u : right << 16);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
#ifdef ELEM_IS_BF16
            float x;
            uint32_t bits = s ? a[r] & 0xffff0000u : a[r] << 16;
            memcpy(&x, &bits, sizeof x);
#else
            float x = a[s * rows + r];
#endif
            acc[r][0] += x * w0;
            acc[r][1] += x * w1;
        }
    }
#else
    vf w0 = load_f32(w), w1 = load_f32(w + VL);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        acc[r][0] += a[r] * w0;
        acc[r][1] += a[r] * w1;
    }
#endif
}

/* Sums of one tile, [rows][NR], unrounded into `wide`, or into `out`; `columns` of them exist. */
static void NAME(store_wide)(const float *sums, long rows, float *wide, long ldo, const ELEM *bias, long columns) {
    columns = columns < NR ? columns : NR;
    for (long r = 0; r < rows; r++, sums += NR, wide += ldo)
        if (bias)
            for (long n = 0; n < columns; n++) wide[n] = sums[n] + NAME(get)(bias + n);
        else
            memcpy(wide, sums, columns * sizeof *wide);
}

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

/* One tile. `rows` and `lines` are constants wherever this is inlined, so acc lives in registers. `lines` lines a step are asked for
   meanwhile, from `next` on. */
INLINE void NAME(tile)(const int rows, const int lines, const NAME(unit) *a, const WEIGHT *w, const char *next, long K, float *sums) {
    vf acc[MR][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = splat(0);
    for (long k = 0; k < K / W_STEP; k++) {
        if (lines > 0) __builtin_prefetch(next + k * lines * 64);
        if (lines > 1) __builtin_prefetch(next + k * lines * 64 + 64);
        NAME(multiply_add)(rows, acc, a, w);
        a += rows * (W_STEP / A_STEP);
        w += NR * W_STEP;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_f32(sums + r * NR, acc[r][0]);
        store_f32(sums + r * NR + VL, acc[r][1]);
    }
}

static void NAME(any_tile)(long rows, long lines, const NAME(unit) *a, const WEIGHT *w, const char *next, long K, float *sums) {
#define TILE(n) \
    case n: \
        if (lines == 0) \
            NAME(tile)(n, 0, a, w, next, K, sums); \
        else if (lines == 1) \
            NAME(tile)(n, 1, a, w, next, K, sums); \
        else \
            NAME(tile)(n, 2, a, w, next, K, sums); \
        break;
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
}

/* Transposes, four by four where there are so many; a unit is A_STEP elements, four bytes. */
INLINE void NAME(pack_rows)(const ELEM *a, long lda, long rows, long K, NAME(unit) *packed) {
    long units = K / A_STEP, r = 0;
    for (; r + 4 <= rows; r += 4) {
        const ELEM *from = a + r * lda;
        long k = 0;
        for (; k + 4 <= units; k += 4) {
            v4u x[4], pairs[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) memcpy(x + i, from + i * lda + k * A_STEP, sizeof x[i]);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                pairs[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], (v4u){0, 4, 1, 5});
                pairs[i + 2] = __builtin_shuffle(x[2 * i], x[2 * i + 1], (v4u){2, 6, 3, 7});
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                v4u column = __builtin_shuffle(pairs[i / 2 * 2], pairs[i / 2 * 2 + 1], i % 2 ? (v4u){2, 3, 6, 7} : (v4u){0, 1, 4, 5});
                memcpy(packed + (k + i) * rows + r, &column, sizeof column);
            }
        }
        for (; k < units; k++)
            for (long i = 0; i < 4; i++) memcpy(packed + k * rows + r + i, from + i * lda + k * A_STEP, sizeof *packed);
    }
    for (; r < rows; r++)
        for (long k = 0; k < units; k++) memcpy(packed + k * rows + r, a + r * lda + k * A_STEP, sizeof *packed);
}

typedef struct {
    const ELEM *a, *bias;
    const WEIGHT *w;
    ELEM *out, *a_packed;
    float *wide;
    long lda, M, N, K, tiles, tiles_a_band, bands;
} NAME(product);

static void NAME(pack_tiles)(void *context, long first_tile, long last_tile) {
    const NAME(product) *p = context;
    for (long i = first_tile; i < last_tile; i++) {
        long first = tile_start(p->M, p->tiles, i), rows = tile_start(p->M, p->tiles, i + 1) - first;
        NAME(pack_rows)(p->a + first * p->lda, p->lda, rows, p->K, (NAME(unit) *)(p->a_packed + first * p->K));
    }
}

/* Tasks go band by band, so that a band's rows of `a` stay in the level-2 cache while the panels pass by. */
static void NAME(multiply)(void *context, long first_task, long last_task) {
    const NAME(product) *p = context;
    long K = p->K, N = p->N, panels = (N + NR - 1) / NR;
    float sums[MR * NR];
    for (long task = first_task; task < last_task; task++) {
        long band = task / panels, panel = task % panels;
        const WEIGHT *w_panel = p->w + panel * NR * K;
        const char *next = (const char *)w_panel + (p->tiles == 1 ? BYTES_AHEAD : NR * K * (long)sizeof(WEIGHT));
        long last = (band + 1) * p->tiles_a_band < p->tiles ? (band + 1) * p->tiles_a_band : p->tiles;
        for (long i = band * p->tiles_a_band; i < last; i++) {
            long first = tile_start(p->M, p->tiles, i), rows = tile_start(p->M, p->tiles, i + 1) - first;
            /* A panel has two lines a step. A tile alone asks for them a little ahead, few tiles for those of the next panel, in two halves
               where there are two. Where there are many, the first wait for them, which costs less than asking. */
            long lines = (panel + 1) * NR >= N || p->tiles > 4 ? 0 : p->tiles == 1 ? 2 : i < 2 ? 1 : 0;
            const ELEM *bias = p->bias ? p->bias + panel * NR : 0;
            long place = first * N + panel * NR;
            NAME(any_tile)(rows, lines, (const NAME(unit) *)(p->a_packed + first * K), w_panel, next + (i == 1 ? K / W_STEP * 64 : 0), K, sums);
            if (p->wide)
                NAME(store_wide)(sums, rows, p->wide + place, N, bias, N - panel * NR);
            else
                NAME(store_tile)(sums, rows, p->out + place, N, bias, N - panel * NR);
        }
    }
}

/* How the rows are divided: M and K are set. */
INLINE void NAME(tile_product)(NAME(product) *p) {
    p->tiles = (p->M + MR - 1) / MR;
    p->tiles_a_band = BAND_BYTES / (MR * p->K * (long)sizeof(ELEM)) + 1;
    p->bands = (p->tiles + p->tiles_a_band - 1) / p->tiles_a_band;
}

/* To `wide`, if there, else to `out`. a_packed: room for M * K elements. K is even. */
void NAME(linear)(const ELEM *a, long lda, const WEIGHT *w, const ELEM *bias, ELEM *out, float *wide, ELEM *a_packed, long M, long N,
                  long K) {
    if (M == 0) return;
    NAME(product) p = {.a = a, .bias = bias, .w = w, .out = out, .a_packed = a_packed, .wide = wide, .lda = lda, .M = M, .N = N, .K = K};
    NAME(tile_product)(&p);
    if (M == 1)
        p.a_packed = (ELEM *)a; /* packed as it is */
    else if (M * K < ENOUGH_FOR_THREADS)
        NAME(pack_tiles)(&p, 0, p.tiles);
    else
        run_loop(NAME(pack_tiles), &p, p.tiles, 4);
    run_loop(NAME(multiply), &p, (N + NR - 1) / NR * p.bands, 8);
}

#undef A_STEP
#undef W_STEP
