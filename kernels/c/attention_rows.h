/* Attention of many rows: lanes are rows, and a key's cell is a scalar that serves all of them. See attention.h. */

#ifndef ROWS_ONCE
#define ROWS_ONCE
/* Sums of VECTORS x KEYS vectors, then of LINES rows of WIDTH vectors, stay in registers. */
#define VECTORS 3
#define ROWS (VECTORS * VL)
#define LINES 6
#define KEYS (VL == 16 ? 8 : 4) /* divides VL, as a run's keys are counted */
#define WIDTH (VL == 8 ? 2 : 4)

/* Scores of keys that a row does not see to -inf, and the largest of each row again; row r sees keys at positions [low[r], high[r]). */
static __attribute__((noinline)) void hide_unseen(const int32_t *low, const int32_t *high, long position, long count, long stride,
                                                  float *scores, float *largest) {
    for (long r = 0; r < stride; r += VL) {
        vi from, to;
        memcpy(&from, low + r, sizeof from);
        memcpy(&to, high + r, sizeof to);
        vf most = splat(-INFINITY);
        for (long j = 0; j < count; j++) {
            int32_t at = (int32_t)(position + j);
            vf score = select_vf((from <= at) & (to > at), load_f32(scores + j * stride + r), splat(-INFINITY));
            store_f32(scores + j * stride + r, score);
            most = max_vf(score, most);
        }
        store_f32(largest + r, most);
    }
}
#endif

/* The cells of a run: its keys' as they stand or widened, its values' likewise, or those of two keys beside each other. */
typedef struct {
    const NAME(cell) *keys[RUN], *values[RUN / CELL_SIZE];
} NAME(run_cells);

static void NAME(find_cells)(const NAME(run) *run, long H, NAME(cell) *room, NAME(run_cells) *out) {
    long count = run->last - run->first;
#if CELL_SIZE == 2
    for (long j = 0; j < count; j += 2, room += H) {
        for (long h = 0; h < H; h += VL) store_f32((float *)room + h, NAME(pair_elements)(run->values[j] + h, run->values[j + 1] + h));
        out->values[j / 2] = room;
    }
    for (long j = 0; j < count; j++) out->keys[j] = (const NAME(cell) *)run->keys[j];
#elif defined(ELEM_IS_BF16)
    for (long j = 0; j < count; j++, room += 2 * H) {
        for (long h = 0; h < H; h += VL) {
            store_f32(room + h, NAME(load)(run->keys[j] + h));
            store_f32(room + H + h, NAME(load)(run->values[j] + h));
        }
        out->keys[j] = room, out->values[j] = room + H;
    }
#else
    (void)room, (void)H;
    for (long j = 0; j < count; j++) out->keys[j] = run->keys[j], out->values[j] = run->values[j];
#endif
}

/* scores[count][vectors * VL], and the largest of each row; q: [cells][ROWS]. */
INLINE void NAME(score_rows)(const int vectors, const NAME(cell) *q, const NAME(cell) *const *keys, long cells, long count, float *scores,
                             float *largest) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) store_f32(largest + v * VL, splat(-INFINITY));
    for (long j = 0; j < count; j += KEYS) {
        const NAME(cell) *key[KEYS];
        vf sums[KEYS][VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; i++) {
            key[i] = keys[j + i];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sums[i][v] = splat(0);
        }
        for (long u = 0; u < cells; u++) {
            vf x[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) x[v] = load_f32((const float *)q + u * ROWS + v * VL);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS; i++) {
                vf k = NAME(splat_cell)(key[i] + u);
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) sums[i][v] = NAME(dot)(sums[i][v], k, x[v]);
            }
        }
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            vf most = load_f32(largest + v * VL);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS; i++) {
                store_f32(scores + ((j + i) * vectors + v) * VL, sums[i][v]);
                most = max_vf(sums[i][v], most);
            }
            store_f32(largest + v * VL, most);
        }
    }
}

/* LINES rows of values[][H], from the weights' cells, which stand `stride` apart. */
INLINE void NAME(weigh_rows)(const int width, const NAME(cell) *weights, long stride, const NAME(cell) *const *cells, long count, long H,
                             float *values) {
    vf sums[LINES][WIDTH];
#pragma GCC unroll 6
    for (int r = 0; r < LINES; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) sums[r][i] = splat(0);
    for (long j = 0; j < count; j++, weights += stride) {
        vf x[WIDTH];
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) x[i] = load_f32((const float *)cells[j] + i * VL);
#pragma GCC unroll 6
        for (int r = 0; r < LINES; r++) {
            vf weight = NAME(splat_cell)(weights + r);
#pragma GCC unroll 4
            for (int i = 0; i < width; i++) sums[r][i] = NAME(dot)(sums[r][i], weight, x[i]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < LINES; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) store_f32(values + r * H + i * VL, sums[r][i]);
}

static __attribute__((noinline)) void NAME(score_block)(long vectors, const NAME(cell) *q, const NAME(cell) *const *keys, long cells,
                                                        long count, float *scores, float *largest) {
    switch (vectors) {
        case 1: NAME(score_rows)(1, q, keys, cells, count, scores, largest); break;
        case 2: NAME(score_rows)(2, q, keys, cells, count, scores, largest); break;
        default: NAME(score_rows)(VECTORS, q, keys, cells, count, scores, largest);
    }
}

static __attribute__((noinline)) void NAME(weigh_block)(long width, const NAME(cell) *weights, long stride, const NAME(cell) *const *cells,
                                                        long count, long H, float *values) {
    if (width == WIDTH)
        NAME(weigh_rows)(WIDTH, weights, stride, cells, count, H, values);
    else
        NAME(weigh_rows)(1, weights, stride, cells, count, H, values);
}

/* Scores to the cells of weights, in place, and each row's sum of them. */
static __attribute__((noinline)) void NAME(weights_of_rows)(long count, long stride, float factor, float *scores, const float *largest,
                                                            float *total) {
    for (long r = 0; r < stride; r += VL) {
        vf shift = shift_of(load_f32(largest + r)), sum = splat(0);
        float *from = scores + r, *to = from;
#pragma GCC unroll 2
        for (long j = 0; j < count; j += CELL_SIZE, from += CELL_SIZE * stride, to += stride) {
            vf weight = weight_of(load_f32(from) - shift, factor);
#if CELL_SIZE == 2
            weight = NAME(pair_weights)(weight, weight_of(load_f32(from + stride) - shift, factor));
            sum = NAME(dot)(sum, weight, ONES);
#else
            sum += weight;
#endif
            store_f32(to, weight);
        }
        store_f32(total + r, sum);
    }
}

/* Keys [first, first + count) of the run for `rows` rows; row r sees keys at positions [low[r], high[r]). */
static void NAME(attend_row_group)(const NAME(cell) *q, const NAME(run_cells) *cells, const NAME(run) *run, long rows, const int32_t *low,
                               const int32_t *high, long H, scoring form, float *largest, float *total, float *values) {
    float scores[RUN * ROWS + LINES];
    const NAME(cell) *moved[RUN / CELL_SIZE], *weights = (const NAME(cell) *)scores;
    long first = low[0] > run->first ? low[0] / VL * VL : run->first;
    long last = high[rows - 1] < run->last ? UP_TO(high[rows - 1], VL) : run->last;
    long offset = first - run->first, count = last - first, vectors = (rows + VL - 1) / VL, stride = vectors * VL;
    NAME(score_block)(vectors, q, cells->keys + offset, H / CELL_SIZE, count, scores, largest);
    if (form.cap != 0) cap_scores(scores, count * stride, form.cap, form.inner);
    if (form.cap != 0 || low[rows - 1] > first || high[0] < last) hide_unseen(low, high, first, count, stride, scores, largest);
    NAME(weights_of_rows)(count, stride, form.factor, scores, largest, total);
    for (long h = 0; h < H;) {
        long width = h + WIDTH * VL <= H ? WIDTH : 1;
        for (long j = 0; j < count / CELL_SIZE; j++) moved[j] = cells->values[offset / CELL_SIZE + j] + h;
        for (long r = 0; r < stride; r += LINES)
            NAME(weigh_block)(width, weights + r, stride, moved, count / CELL_SIZE, H, values + r * H + h);
        h += width * VL;
    }
}
