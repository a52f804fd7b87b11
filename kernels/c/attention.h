/* Attention over the paged cache, read in place, for single queries and for tiles of a prompt's queries.

   Keys are taken in runs of RUN, which start at multiples of RUN; a query's runs are joined in order. Within a run every sum has an order
   that depends on the key's position alone, and keys that a query does not see add exact zeros. So a query's result depends neither on its
   batch, nor on how its prompt is cut into chunks, nor on the number of threads.

   Rows of a tile are its (query, query head of the group) pairs, taken four at a time so that each key and value that is loaded serves
   four. Included once for each element type. */

#ifndef ATTENTION_ONCE
#define ATTENTION_ONCE
#define RUN 256
#define SCORES_STRIDE (RUN + VL)

/* Queries [row, row + num_queries) of the batch, at positions `start` and on. A lone query has a task for each of its runs and heads (run
   by run), a tile of several has one for each head. Tasks are numbered over all tiles. */
typedef struct {
    int64_t row;
    int64_t num_queries;
    int64_t start;
    int64_t first_block; /* of its sequence, in the list of all sequences' blocks */
    int64_t first_task;
} query_tile;

typedef struct {
    const int32_t *blocks; /* of the sequence */
    long key_plane, value_plane, planes, P, H;
} key_source;

/* Lanes of four vectors summed: a, b, c, d to four numbers. */
INLINE void four_sums(vf a, vf b, vf c, vf d, float *out) {
#if VL == 16
#define LANES(w, x, y, z) (vi){w, x, y, z, w + 4, x + 4, y + 4, z + 4, w + 8, x + 8, y + 8, z + 8, w + 12, x + 12, y + 12, z + 12}
#elif VL == 8
#define LANES(w, x, y, z) (vi){w, x, y, z, w + 4, x + 4, y + 4, z + 4}
#else
#define LANES(w, x, y, z) (vi){w, x, y, z}
#endif
    vf ab = __builtin_shuffle(a, b, LANES(0, VL, 1, VL + 1)) + __builtin_shuffle(a, b, LANES(2, VL + 2, 3, VL + 3));
    vf cd = __builtin_shuffle(c, d, LANES(0, VL, 1, VL + 1)) + __builtin_shuffle(c, d, LANES(2, VL + 2, 3, VL + 3));
    vf abcd = __builtin_shuffle(ab, cd, LANES(0, 1, VL, VL + 1)) + __builtin_shuffle(ab, cd, LANES(2, 3, VL + 2, VL + 3));
#undef LANES
    typedef float v4 __attribute__((vector_size(16)));
    v4 parts[VL / 4], sum;
    memcpy(parts, &abcd, sizeof abcd);
    sum = parts[0];
#if VL == 16
    sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
#elif VL == 8
    sum = parts[0] + parts[1];
#endif
    memcpy(out, &sum, sizeof sum);
}

/* Joins one run's result (weighted values [H], largest score, sum of weights) into what its row has so far. */
INLINE void join(float *row, const float *run, long H) {
    float largest = fmaxf(row[H], run[H]);
    if (run[H + 1] == 0) return; /* it saw no key of the run */
    float old = expf(row[H] - largest), more = expf(run[H] - largest);
    for (long h = 0; h < H; h += VL) store_f32(row + h, load_f32(row + h) * old + load_f32(run + h) * more);
    row[H] = largest;
    row[H + 1] = row[H + 1] * old + run[H + 1] * more;
}
#endif

/* scores[rows][count] of keys [first, first + count); `rows` is a constant wherever this is inlined. */
INLINE void NAME(score)(const int rows, const float *q, const ELEM *cache, const key_source *s, long first, long count, float *scores) {
    const int32_t *block = s->blocks + first / s->P;
    long P = s->P, H = s->H, offset = first % P;
    for (long j = 0; j < count;) {
        const ELEM *keys = cache + ((*block * s->planes + s->key_plane) * P + offset) * H;
        long here = P - offset < count - j ? P - offset : count - j;
        /* Hardware prefetches stop at the end of a page, and blocks lie anywhere: ask for these keys' values, and the next block's keys. */
        const char *values = (const char *)(keys + (s->value_plane - s->key_plane) * P * H);
        const char *next = (const char *)(cache + (block[j + here < count] * s->planes + s->key_plane) * P * H);
        block++;
        offset = 0;
        for (long i = 0; i < here; i += 4) {
            const ELEM *k = keys + i * H;
            for (long line = i * H * (long)sizeof(ELEM); line < (i + 4) * H * (long)sizeof(ELEM); line += 64) {
                __builtin_prefetch(values + line);
                __builtin_prefetch(next + line);
            }
            long step1 = i + 1 < here ? H : 0, step2 = i + 2 < here ? 2 * H : 0, step3 = i + 3 < here ? 3 * H : 0;
            vf acc[4][4];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = splat(0);
            for (long h = 0; h < H; h += VL) {
                vf k0 = NAME(load)(k + h), k1 = NAME(load)(k + step1 + h), k2 = NAME(load)(k + step2 + h), k3 = NAME(load)(k + step3 + h);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    vf query = load_f32(q + r * H + h);
                    acc[r][0] += query * k0;
                    acc[r][1] += query * k1;
                    acc[r][2] += query * k2;
                    acc[r][3] += query * k3;
                }
            }
            /* What is written past `here` is written again, or lies past the run. */
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) four_sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3], scores + r * SCORES_STRIDE + j + i);
        }
        j += here;
    }
}

/* Row r of out[rows][H + 2] = weights[r][count] times the values, `width` vectors of them. */
INLINE void NAME(weigh)(const int rows, const int width, const float *weights, const ELEM *cache, const key_source *s, long first,
                        long count, float *out) {
    const int32_t *block = s->blocks + first / s->P;
    long P = s->P, H = s->H, offset = first % P;
    vf acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) acc[r][i] = splat(0);
    for (long j = 0; j < count;) {
        const ELEM *v = cache + ((*block++ * s->planes + s->value_plane) * P + offset) * H;
        long here = P - offset < count - j ? P - offset : count - j;
        offset = 0;
        for (long end = j + here; j < end; j++, v += H) {
            vf values[4];
#pragma GCC unroll 4
            for (int i = 0; i < width; i++) values[i] = NAME(load)(v + i * VL);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int i = 0; i < width; i++) acc[r][i] += weights[r * SCORES_STRIDE + j] * values[i];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) store_f32(out + r * (H + 2) + i * VL, acc[r][i]);
}

/* Up to four rows over keys [first, last); row r sees keys [low[r], high[r]) of them. */
INLINE void NAME(attend_rows)(const int rows, const float *q, const ELEM *cache, const key_source *s, long first, long last, const long *low,
                              const long *high, float *out) {
    float scores[4 * SCORES_STRIDE];
    long H = s->H, count = last - first;
    NAME(score)(rows, q, cache, s, first, count, scores);
    for (int r = 0; r < rows; r++) {
        float *score = scores + r * SCORES_STRIDE, *result = out + r * (H + 2);
        long begin = low[r] > first ? low[r] - first : 0, end = high[r] < last ? high[r] - first : count;
        for (long j = 0; j < begin && j < count; j++) score[j] = -INFINITY;
        for (long j = end > 0 ? end : 0; j < (count + VL - 1) / VL * VL; j++) score[j] = -INFINITY;
        float largest = -INFINITY;
        for (long j = begin; j < end; j++) largest = score[j] > largest ? score[j] : largest;
        vf total = splat(0), shift = splat(begin < end ? largest : 0);
        for (long j = 0; j < count; j += VL) {
            vf e = exp_vf(load_f32(score + j) - shift);
            store_f32(score + j, e);
            total += e;
        }
        result[H] = largest;
        result[H + 1] = sum_of(total);
    }
    long h = 0;
    for (; h + 4 * VL <= H; h += 4 * VL) NAME(weigh)(rows, 4, scores, cache + h, s, first, count, out + h);
    for (; h < H; h += VL) NAME(weigh)(rows, 1, scores, cache + h, s, first, count, out + h);
}

/* One run of one KV head for all rows of a tile: out[rows][H + 2]. */
static void NAME(attend_run)(const float *q, const ELEM *cache, const key_source *s, long run, long rows, const long *low, const long *high,
                             float *out) {
    long align = s->P < VL ? s->P : VL, H = s->H;
    long first = run * RUN > low[0] ? run * RUN : low[0] - low[0] % align;
    long last = (run + 1) * RUN < high[rows - 1] ? (run + 1) * RUN : high[rows - 1];
    for (long r = 0; r < rows; r += 4) {
#define ROWS(n) NAME(attend_rows)(n, q + r * H, cache, s, first, last, low + r, high + r, out + r * (H + 2))
        switch (rows - r) {
            case 1: ROWS(1); break;
            case 2: ROWS(2); break;
            case 3: ROWS(3); break;
            default: ROWS(4);
        }
#undef ROWS
    }
}

/* A call of `attend`: its arguments. */
typedef struct {
    const ELEM *q, *cache;
    const query_tile *tiles;
    const int32_t *blocks;
    const int64_t *read_heads;
    float *partial;
    ELEM *out;
    long q_stride, num_tiles, num_tasks, window, R, G, K, P, H;
    float scale;
} NAME(attention);

/* All that one task does. A lone query's run goes to `partial`, a tile's rows, joined, to `out`. */
static void NAME(attend_tile)(const NAME(attention) *c, const query_tile *tile, long task) {
    long H = c->H, G = c->G, R = c->R, rows = tile->num_queries * G, head = (task - tile->first_task) % R, low[rows], high[rows];
    float query[rows * H], joined[rows * (H + 2)], run_result[rows * (H + 2)];
    key_source s = {c->blocks + tile->first_block, c->read_heads[head], c->K + c->read_heads[head], 2 * c->K, c->P, H};
    for (long r = 0; r < rows; r++) {
        const ELEM *from = c->q + (tile->row + r / G) * c->q_stride + (head * G + r % G) * H;
        for (long h = 0; h < H; h += VL) store_f32(query + r * H + h, NAME(load)(from + h) * c->scale);
        high[r] = tile->start + r / G + 1;
        low[r] = c->window && high[r] > c->window ? high[r] - c->window : 0;
    }
    if (tile->num_queries == 1) {
        long run = low[0] / RUN + (task - tile->first_task) / R;
        NAME(attend_run)(query, c->cache, &s, run, rows, low, high, c->partial + task * G * (H + 2));
        return;
    }
    memset(joined, 0, sizeof joined);
    for (long r = 0; r < rows; r++) joined[r * (H + 2) + H] = -INFINITY;
    for (long run = low[0] / RUN; run * RUN < high[rows - 1]; run++) {
        NAME(attend_run)(query, c->cache, &s, run, rows, low, high, run_result);
        for (long r = 0; r < rows; r++) join(joined + r * (H + 2), run_result + r * (H + 2), H);
    }
    for (long r = 0; r < rows; r++) {
        float *row = joined + r * (H + 2);
        ELEM *to = c->out + (((tile->row + r / G) * R + head) * G + r % G) * H;
        for (long h = 0; h < H; h += VL) NAME(store)(to + h, load_f32(row + h) / row[H + 1]);
    }
}

static void NAME(attend_tasks)(void *context, long first, long last) {
    const NAME(attention) *c = context;
    for (long task = first; task < last; task++) {
        long i = 0, end = c->num_tiles;
        while (end - i > 1) {
            long middle = (i + end) / 2;
            if (c->tiles[middle].first_task <= task)
                i = middle;
            else
                end = middle;
        }
        NAME(attend_tile)(c, c->tiles + i, task);
    }
}

/* The runs of the heads of lone queries, joined. One item is a head of a tile. */
static void NAME(join_runs)(void *context, long first, long last) {
    const NAME(attention) *c = context;
    long H = c->H, G = c->G, R = c->R, stride = G * (H + 2);
    float joined[H + 2];
    for (long i = first; i < last; i++) {
        const query_tile *tile = c->tiles + i / R;
        if (tile->num_queries > 1) continue;
        long num_runs = ((i / R + 1 < c->num_tiles ? tile[1].first_task : c->num_tasks) - tile->first_task) / R;
        for (long g = 0; g < G; g++) {
            memset(joined, 0, sizeof joined);
            joined[H] = -INFINITY;
            for (long run = 0; run < num_runs; run++)
                join(joined, c->partial + (tile->first_task + run * R + i % R) * stride + g * (H + 2), H);
            ELEM *to = c->out + ((tile->row * R + i % R) * G + g) * H;
            for (long h = 0; h < H; h += VL) NAME(store)(to + h, load_f32(joined + h) / joined[H + 1]);
        }
    }
}

/* q: rows of q_stride elements, R heads of G queries each; read_heads[R] names the KV head each reads. window: positions a query looks
   back, itself included; 0: all. partial: room for num_tasks * G * (H + 2). out: rows of R G H elements. H % VL = 0. */
void NAME(attend)(const ELEM *q, long q_stride, const ELEM *cache, const query_tile *tiles, const int32_t *blocks, const int64_t *read_heads,
                  float *partial, ELEM *out, long num_tiles, long num_tasks, long window, long R, long G, long K, long P, long H,
                  float scale) {
    NAME(attention) c = {q, cache, tiles, blocks, read_heads, partial, out, q_stride, num_tiles, num_tasks, window, R, G, K, P, H, scale};
    run_loop(NAME(attend_tasks), &c, num_tasks, 16);
    run_loop(NAME(join_runs), &c, num_tiles * R, PARTS_FOR(num_tiles * R * G * H));
}
