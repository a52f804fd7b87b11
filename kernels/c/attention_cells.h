/* What both forms of attention have in common: weights, sums of runs, cells, and where a run's keys lie. See attention.h. */

#ifndef CELLS_ONCE
#define CELLS_ONCE
#define RUN 256
#define UP_TO(x, step) (((x) + (step)-1) / (step) * (step))
#define NOIPA static __attribute__((noipa)) /* one machine code for all callers: the same roundings */

/* Queries [row, row + num_queries) of the batch, at positions `start` and on. A lone query has a task for each of its runs and heads (run
   by run), a tile of several has one for each head. Tasks are numbered over all tiles. */
typedef struct {
    int64_t row;
    int64_t num_queries;
    int64_t start;
    int64_t first_block; /* of its sequence, in the list of all sequences' blocks */
    int64_t first_task;
} query_tile;

/* A step's attention in layers of one window: `window` positions a query looks back, itself included; 0: all. `blocks` has the block
   tables of all sequences, end to end. */
typedef struct {
    const query_tile *tiles;
    const int32_t *blocks;
    int64_t num_tiles;
    int64_t num_tasks;
    int64_t window;
} window_plan;

/* exp(scale x) for x <= 0, `factor` being scale / ln 2: 2^n times a polynomial of the rest on [-1/2, 1/2]; relative error below 2e-7.
   Below 2^-127: 0. Exact for 0. */
INLINE vf weight_of(vf x, float factor) {
    vf power = max_vf(splat(-127.0f), x * factor);
    vf n = power + (12582912.0f + 127.0f); /* 1.5 * 2^23: rounds to the nearest whole number, which stands in the lowest bits */
    vf r = power - (n - (12582912.0f + 127.0f));
    vf p = splat(1.326472731e-3f);
    p = p * r + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
    return p * (vf)((vi)n << 23);
}

/* How products of queries and keys become scores: times scale / ln 2, for powers of 2 (see weight_of). With a cap, which is not 0, they are
   first cap tanh(product * inner), `inner` being the scale over the cap; then their scale is 1. */
typedef struct {
    float factor, cap, inner;
} scoring;

NOIPA void cap_scores(float *scores, long count, float cap, float inner) {
    for (long j = 0; j < count; j += VL) store_f32(scores + j, cap * tanh_vf(load_f32(scores + j) * inner));
}

/* What the weights of a row are divided by: their sum and, where there is a sink, the weight of its score, which has no key. */
NOIPA float divisor_of(float total, float largest, const float *sink, float factor) {
    return sink ? total + expf(*sink - largest * (factor / 1.44269504f)) : total;
}

/* What is taken off scores whose largest is x: nothing where a row has seen no key. */
INLINE vf shift_of(vf x) { return select_vf(x == -INFINITY, splat(0), x); }

/* Joins a run into the runs before: largest scores and sums of weights of `count` rows. Their values must be multiplied by `old`, the
   run's by `more`. */
NOIPA void join_sums(float *largest, float *total, const float *run_largest, const float *run_total, float factor, float *old, float *more,
                     long count) {
    for (long r = 0; r < count; r += VL) {
        vf a = load_f32(largest + r), b = load_f32(run_largest + r), most = max_vf(a, b), shift = shift_of(most);
        vf x = weight_of(a - shift, factor), y = weight_of(b - shift, factor);
        store_f32(largest + r, most);
        store_f32(total + r, load_f32(total + r) * x + load_f32(run_total + r) * y);
        store_f32(old + r, x);
        store_f32(more + r, y);
    }
}

NOIPA void join_values(float *values, const float *run_values, float old, float more, long H) {
    for (long h = 0; h < H; h += VL) store_f32(values + h, load_f32(values + h) * old + load_f32(run_values + h) * more);
}
#endif

#if defined(ELEM_IS_BF16) && defined(HAS_BF16_DOT)
#define CELL_SIZE 2 /* elements */
#define ROOM (RUN / 2) /* rows of cells for a run's values */
typedef uint32_t NAME(cell);
#else
#define CELL_SIZE 1
#ifdef ELEM_IS_BF16
#define ROOM (2 * RUN)
#else
#define ROOM 0
#endif
typedef float NAME(cell);
#endif

/* Cells of a vector. */
INLINE vf NAME(load_cells)(const ELEM *p) {
#if CELL_SIZE == 2
    return load_f32((const float *)p);
#else
    return NAME(load)(p);
#endif
}

INLINE vf NAME(splat_cell)(const NAME(cell) * p) {
#if CELL_SIZE == 2
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return (vf)(x - (vu){0});
#else
    return splat(*p);
#endif
}

INLINE vf NAME(dot)(vf sum, vf a, vf b) {
#if CELL_SIZE == 2
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + a * b;
#endif
}

/* The cells that stand for two rows of elements, or for two vectors of numbers. */
#if CELL_SIZE == 2
INLINE vf NAME(pair_elements)(const ELEM *first, const ELEM *second) {
    return (vf)(load_halves(first) | load_halves(second) << 16);
}
INLINE vu round_weight(vf x) { return (vu)x + 0x8000; }
INLINE vf NAME(pair_weights)(vf first, vf second) { return (vf)(round_weight(first) >> 16 | (round_weight(second) & 0xffff0000u)); }
#define ONES (vf)(0x3f803f80 - (vu){0})
#endif

/* A call of `attend`: its arguments. */
typedef struct {
    const ELEM *q, *cache;
    const query_tile *tiles;
    const int32_t *blocks;
    const int64_t *read_heads;
    const float *sinks; /* of each query head, or null */
    float *partial;
    ELEM *out;
    long q_stride, num_tiles, num_tasks, window, R, G, K, P, H, is_fp8;
    scoring scores;
} NAME(attention);

/* Keys [first, last) of a run, both multiples of VL; those outside of [low, high) stand for their nearest inside. */
typedef struct {
    long first, last;
    const ELEM *keys[RUN], *values[RUN];
} NAME(run);

static void NAME(find_run)(const NAME(attention) *c, const int32_t *blocks, long head, long run, long low, long high, NAME(run) *out) {
    long P = c->P, H = c->H, i = 0;
    low = low > run * RUN ? low : run * RUN;
    high = high < (run + 1) * RUN ? high : (run + 1) * RUN;
    out->first = low / VL * VL;
    out->last = UP_TO(high, VL);
    const int32_t *block = blocks + low / P;
    const ELEM *key = c->cache + ((*block * 2 * c->K + head) * P + low % P) * H;
    long values = c->K * P * H, left = P - low % P;
    for (; i < low - out->first; i++) out->keys[i] = key, out->values[i] = key + values;
    for (;; i++, key += H) {
        out->keys[i] = key, out->values[i] = key + values;
        if (i + 1 == high - out->first) break;
        if (--left == 0) {
            left = P;
            key = c->cache + (*++block * 2 * c->K + head) * P * H - H;
        }
    }
    for (i++; i < out->last - out->first; i++) out->keys[i] = key, out->values[i] = key + values;
}

INLINE void NAME(widen_row)(const uint8_t *from, ELEM *to, long H) {
    long h = 0;
#if defined(ELEM_IS_BF16) && VL == 16 && defined(__AVX512BW__)
    for (; h + 2 * VL <= H; h += 2 * VL) widen_fp8_to_bf16(from + h, to + h);
#endif
    for (; h < H; h += VL) NAME(store)(to + h, widen_fp8(from + h));
}

/* The same of a cache in 8-bit floats, whose rows are widened into `room`, of 2 RUN H elements. */
static void NAME(widen_run)(const NAME(attention) *c, const int32_t *blocks, long head, long run, long low, long high, ELEM *room,
                            NAME(run) *out) {
    long P = c->P, H = c->H;
    low = low > run * RUN ? low : run * RUN;
    high = high < (run + 1) * RUN ? high : (run + 1) * RUN;
    out->first = low / VL * VL;
    out->last = UP_TO(high, VL);
    for (long at = low; at < high; at++, room += 2 * H) {
        const uint8_t *key = (const uint8_t *)c->cache + ((blocks[at / P] * 2 * c->K + head) * P + at % P) * H;
        NAME(widen_row)(key, room, H);
        NAME(widen_row)(key + c->K * P * H, room + H, H);
        out->keys[at - out->first] = room, out->values[at - out->first] = room + H;
    }
    for (long i = 0; i < low - out->first; i++) out->keys[i] = out->keys[low - out->first], out->values[i] = out->values[low - out->first];
    for (long i = high - out->first; i < out->last - out->first; i++) out->keys[i] = room - 2 * H, out->values[i] = room - H;
}
