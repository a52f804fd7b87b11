/* Low-rank updates of matrix products: out[row] += B (A x[row]), each row by the adapter of its own request.

   An adapter updates a product by parts, each of some of its outputs (q, k and v of one fused product, say). Ranks are even: an odd one is
   filled up with zeros. A is stored by tiles of A_RANKS rows (or 2, the last), each [K / A_LENGTH][rows][A_LENGTH], its rows lengthened by
   zeros. B is ceil(outputs / UPDATE_WIDTH) panels of [rank][UPDATE_WIDTH], outputs past the part's are zeros, and its numbers have the
   adapter's scale; of bfloat16 two rows of a panel alternate, [rank / 2][UPDATE_WIDTH][2]. So an adapter is read from its first byte to its
   last, and what comes next is asked for meanwhile: a decode step of 8 adapters reads half as much as of the model itself.

   Every sum is one chain in a fixed order for each row: a row's result does not depend on its batch. Included once for each element type. */

#ifndef LORA_ONCE
#define LORA_ONCE
#define UPDATE_WIDTH (4 * VL)
#define UPDATE_ROWS 4 /* rows that share what is read of A and B */
#define ROWS_A_TASK 64
#define A_RANKS 4
#define A_LENGTH (2 * VL)
#define UPDATE_AHEAD 2048 /* bytes */

/* Filled by kernels/native/structures.py. */
typedef struct {
    const void *a, *b;
    int64_t rank, first, num_outputs; /* outputs [first, first + num_outputs) of the product */
} update_part;

typedef struct {
    const update_part *parts;
    int64_t num_parts, rank; /* of all parts together */
} update_site;

typedef struct {
    const update_site *sites; /* of one adapter, by number */
    const int64_t *rows;      /* that it updates, in this block */
    int64_t num_rows, first;  /* the first one's place in `scratch` */
} update_segment;

/* Some rows of a step, which are multiplied together. */
typedef struct {
    const update_segment *segments;
    int64_t num_segments, most_rank;
    void *scratch; /* [rows with an adapter][most_rank], of the type of the rows */
} update_block;

/* What a task does: of a part and some rows all, some rows of A, or a panel of B. */
typedef enum { WHOLE_PART, TILE_OF_A, PANEL_OF_B } update_kind;

int64_t update_width(void) { return UPDATE_WIDTH; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

static long update_tasks(const update_part *part, update_kind kind) {
    return part->rank == 0          ? 0
           : kind == WHOLE_PART ? 1
           : kind == TILE_OF_A  ? ceil_div(part->rank, A_RANKS)
                                : ceil_div(part->num_outputs, UPDATE_WIDTH);
}
#endif

typedef struct {
    const update_block *block;
    long site, K, ldo;
    const ELEM *x;
    ELEM *out;
    update_kind kind;
} NAME(update);

/* Some rows of a segment, and the part of its site that updates them. */
typedef struct {
    const update_part *part;
    const ELEM *x[UPDATE_ROWS];
    ELEM *out[UPDATE_ROWS], *y[UPDATE_ROWS];
} NAME(update_rows);

INLINE void NAME(multiply_vector)(vf *acc, const ELEM *x, const ELEM *a) {
#if defined(ELEM_IS_BF16) && defined(HAS_BF16_DOT)
    *acc = (vf)_mm512_dpbf16_ps((__m512)*acc, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(a));
#else
    *acc += NAME(load)(x) * NAME(load)(a);
    *acc += NAME(load)(x + VL) * NAME(load)(a + VL);
#endif
}

/* y[m][i] = a[i] . x[m] for a tile of A. `rows` and `ranks` are constants wherever this is inlined. */
INLINE void NAME(shrink_tile)(const int rows, const int ranks, const NAME(update_rows) *u, const ELEM (*ends)[A_LENGTH], const ELEM *a,
                              long K, long first) {
    const long whole = K / A_LENGTH * A_LENGTH;
    vf acc[UPDATE_ROWS][A_RANKS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int i = 0; i < ranks; i++) acc[m][i] = splat(0);
    for (long k = 0; k < K; k += A_LENGTH, a += ranks * A_LENGTH) {
#pragma GCC unroll 8
        for (long line = 0; line < ranks * A_LENGTH * (long)sizeof *a; line += 64) __builtin_prefetch((const char *)a + UPDATE_AHEAD + line);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int i = 0; i < ranks; i++) NAME(multiply_vector)(&acc[m][i], k < whole ? u->x[m] + k : ends[m], a + i * A_LENGTH);
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int i = 0; i < ranks; i++) NAME(put)(u->y[m] + first + i, sum_of(acc[m][i]));
}

/* Rows [first, last) of A, which are whole tiles. */
INLINE void NAME(shrink_rows)(const int rows, const NAME(update_rows) *u, long K, long first, long last) {
    const long whole = K / A_LENGTH * A_LENGTH, lda = ceil_div(K, A_LENGTH) * A_LENGTH;
    ELEM ends[UPDATE_ROWS][A_LENGTH]; /* the last elements of x, as long as those of A */
    if (whole < K)
        for (int m = 0; m < rows; m++) {
            memset(ends[m], 0, sizeof ends[m]);
            memcpy(ends[m], u->x[m] + whole, (K - whole) * sizeof(ELEM));
        }
    const ELEM *a = (const ELEM *)u->part->a;
    long i = first;
    for (; i + A_RANKS <= last; i += A_RANKS) NAME(shrink_tile)(rows, A_RANKS, u, ends, a + i * lda, K, i);
    for (; i < last; i += 2) NAME(shrink_tile)(rows, 2, u, ends, a + i * lda, K, i);
}

/* acc[m][j] += two rows of B by two numbers of y. */
INLINE void NAME(expand_pair)(const int rows, vf acc[][4], const ELEM *b, ELEM *const *y, long r) {
#pragma GCC unroll 8
    for (long line = 0; line < 2 * UPDATE_WIDTH * (long)sizeof *b; line += 64) __builtin_prefetch((const char *)b + UPDATE_AHEAD + line);
#if defined(ELEM_IS_BF16) && defined(HAS_BF16_DOT)
    __m512bh w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) w[j] = (__m512bh)_mm512_loadu_si512(b + 2 * j * VL);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        int32_t both;
        memcpy(&both, y[m] + r, sizeof both);
        __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = (vf)_mm512_dpbf16_ps((__m512)acc[m][j], pair, w[j]);
    }
#else
#pragma GCC unroll 2
    for (int s = 0; s < 2; s++) {
        vf w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#ifdef ELEM_IS_BF16
            vu both;
            memcpy(&both, b + 2 * j * VL, sizeof both);
            w[j] = (vf)(s ? both & 0xffff0000u : both << 16);
#else
            w[j] = load_f32(b + s * UPDATE_WIDTH + j * VL);
#endif
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            float factor = NAME(get)(y[m] + r + s);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[m][j] += factor * w[j];
        }
    }
#endif
}

/* out[m] += y[m] B, outputs [n, n + UPDATE_WIDTH) of the part. */
INLINE void NAME(expand_panel)(const int rows, const NAME(update_rows) *u, long n) {
    const long rank = u->part->rank, columns = u->part->num_outputs - n;
    const ELEM *b = (const ELEM *)u->part->b + n * rank;
    vf acc[UPDATE_ROWS][4];
    ELEM edge[UPDATE_ROWS][UPDATE_WIDTH];
    const int is_whole = columns >= UPDATE_WIDTH;
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        const ELEM *from = u->out[m] + n;
        if (!is_whole) {
            memset(edge[m], 0, sizeof edge[m]);
            memcpy(edge[m], from, columns * sizeof *from);
            from = edge[m];
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = NAME(load)(from + j * VL);
    }
    for (long r = 0; r < rank; r += 2, b += 2 * UPDATE_WIDTH) NAME(expand_pair)(rows, acc, b, u->y, r);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        ELEM *to = is_whole ? u->out[m] + n : edge[m];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) NAME(store)(to + j * VL, acc[m][j]);
        if (!is_whole) memcpy(u->out[m] + n, to, columns * sizeof *to);
    }
}

INLINE void NAME(update_some)(const int rows, const NAME(update_rows) *u, long K, update_kind kind, long number) {
    const long rank = u->part->rank, first = number * A_RANKS;
    if (kind == WHOLE_PART) NAME(shrink_rows)(rows, u, K, 0, rank);
    if (kind == TILE_OF_A) NAME(shrink_rows)(rows, u, K, first, first + A_RANKS < rank ? first + A_RANKS : rank);
    if (kind == PANEL_OF_B) NAME(expand_panel)(rows, u, number * UPDATE_WIDTH);
    if (kind == WHOLE_PART)
        for (long n = 0; n < u->part->num_outputs; n += UPDATE_WIDTH) NAME(expand_panel)(rows, u, n);
}

/* Rows [begin, end) of a segment, the numbers [place, place + rank) of their y. */
static void NAME(update_chunk)(const NAME(update) *u, const update_segment *segment, const update_part *part, long begin, long end, long place,
                               long number) {
    NAME(update_rows) some = {.part = part};
    for (long row = begin; row < end; row += UPDATE_ROWS) {
        long rows = end - row < UPDATE_ROWS ? end - row : UPDATE_ROWS;
        for (long m = 0; m < rows; m++) {
            long at = segment->rows[row + m];
            some.x[m] = u->x + at * u->K;
            some.out[m] = u->out + at * u->ldo + part->first;
            some.y[m] = (ELEM *)u->block->scratch + (segment->first + row + m) * u->block->most_rank + place;
        }
        switch (rows) {
            case 1: NAME(update_some)(1, &some, u->K, u->kind, number); break;
            case 2: NAME(update_some)(2, &some, u->K, u->kind, number); break;
            case 3: NAME(update_some)(3, &some, u->K, u->kind, number); break;
            default: NAME(update_some)(4, &some, u->K, u->kind, number);
        }
    }
}

/* Tasks: segments, of each some rows, of those the parts, of each what its kind of task is. */
static void NAME(run_updates)(void *context, long first_task, long last_task) {
    const NAME(update) *u = context;
    long task = 0;
    for (long s = 0; s < u->block->num_segments && task < last_task; s++) {
        const update_segment *segment = u->block->segments + s;
        const update_site *site = segment->sites + u->site;
        for (long begin = 0; begin < segment->num_rows && site->rank; begin += ROWS_A_TASK) {
            long end = begin + ROWS_A_TASK < segment->num_rows ? begin + ROWS_A_TASK : segment->num_rows, place = 0;
            for (long p = 0; p < site->num_parts; place += site->parts[p++].rank) {
                long count = update_tasks(site->parts + p, u->kind);
                for (long number = 0; number < count; number++, task++)
                    if (task >= first_task && task < last_task) NAME(update_chunk)(u, segment, site->parts + p, begin, end, place, number);
            }
        }
    }
}

static long NAME(count_tasks)(const update_block *block, long site, update_kind kind) {
    long count = 0;
    for (long s = 0; s < block->num_segments; s++) {
        const update_site *of = block->segments[s].sites + site;
        for (long p = 0; p < of->num_parts; p++) count += ceil_div(block->segments[s].num_rows, ROWS_A_TASK) * update_tasks(of->parts + p, kind);
    }
    return count;
}

/* out[row] += what the row's adapter adds to the product `site` of x[row]; x is [rows of the block, K], out has rows of ldo elements. With
   fewer parts than keep all threads busy, their rows of A are shared out first, then their panels of B. */
void NAME(add_updates)(const update_block *block, long site, const ELEM *x, long K, ELEM *out, long ldo) {
    NAME(update) u = {block, site, K, ldo, x, out, WHOLE_PART};
    long count = NAME(count_tasks)(block, site, WHOLE_PART);
    if (count >= 4 * (pool.num_helpers + 1) || pool.num_helpers == 0) {
        run_loop(NAME(run_updates), &u, count, 4);
        return;
    }
    u.kind = TILE_OF_A;
    run_loop(NAME(run_updates), &u, NAME(count_tasks)(block, site, TILE_OF_A), 4);
    u.kind = PANEL_OF_B;
    run_loop(NAME(run_updates), &u, NAME(count_tasks)(block, site, PANEL_OF_B), 4);
}
