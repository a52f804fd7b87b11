/* Attention of few rows: lanes are keys, transposed on the way, and then elements of the head. See attention.h. */

#define FEW 4 /* rows at a time */

/* Scores of keys [0, count), rows RUN apart. */
INLINE void NAME(score_few)(const int rows, const NAME(cell) *q, const NAME(run) *run, long cells, float *scores) {
    long count = run->last - run->first;
    for (long j = 0; j < count; j += VL) {
        vf sums[FEW];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sums[r] = splat(0);
        long next = j + VL < count ? j + VL : j;
        for (long u = 0; u < cells; u += VL) {
            vf x[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) x[i] = NAME(load_cells)(run->keys[j + i] + u * CELL_SIZE);
            /* Hardware prefetches stop at the end of a page, and blocks lie anywhere: ask for these keys' values, and the next keys. */
            long bytes = CELL_SIZE * sizeof(ELEM);
            if (VL * bytes == 64 || u * bytes % 64 == 0) {
#pragma GCC unroll 16
                for (int i = 0; i < VL; i++) {
                    __builtin_prefetch(run->values[j + i] + u * CELL_SIZE);
                    __builtin_prefetch(run->keys[next + i] + u * CELL_SIZE);
                }
            }
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) sums[r] = NAME(dot)(sums[r], x[i], NAME(splat_cell)(q + r * cells + u + i));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) store_f32(scores + r * RUN + j, sums[r]);
    }
}

/* values[rows][H] and, where asked, total[rows] of weights that stand RUN apart. */
INLINE void NAME(weigh_few)(const int rows, const int width, const int with_total, const float *weights, const NAME(run) *run, long h,
                            long H, float *values, float *total) {
    long count = run->last - run->first;
    vf sums[FEW][4], weight_sums[FEW];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        weight_sums[r] = splat(0);
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) sums[r][i] = splat(0);
    }
    for (long j = 0; j < count; j += CELL_SIZE) {
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < width; i++)
#if CELL_SIZE == 2
            x[i] = NAME(pair_elements)(run->values[j] + h + i * VL, run->values[j + 1] + h + i * VL);
#else
            x[i] = NAME(load)(run->values[j] + h + i * VL);
#endif
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf weight = NAME(splat_cell)((const NAME(cell) *)(weights + r * RUN) + j / CELL_SIZE);
#if CELL_SIZE == 2
            if (with_total) weight_sums[r] = NAME(dot)(weight_sums[r], weight, ONES);
#else
            if (with_total) weight_sums[r] += weight;
#endif
#pragma GCC unroll 4
            for (int i = 0; i < width; i++) sums[r][i] = NAME(dot)(sums[r][i], weight, x[i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        if (with_total) total[r] = weight_sums[r][0];
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) store_f32(values + r * H + h + i * VL, sums[r][i]);
    }
}

/* Row r sees keys at positions [low[r], high[r]). */
INLINE void NAME(attend_few)(const int rows, const NAME(cell) *q, const NAME(run) *run, const int32_t *low, const int32_t *high, long H,
                             scoring form, float *largest, float *total, float *values) {
    float scores[FEW * RUN];
    long count = run->last - run->first;
    NAME(score_few)(rows, q, run, H / CELL_SIZE, scores);
    for (int r = 0; r < rows; r++) {
        float *score = scores + r * RUN;
        if (form.cap != 0) cap_scores(score, count, form.cap, form.inner);
        for (long j = 0; j < count && j < low[r] - run->first; j++) score[j] = -INFINITY;
        for (long j = high[r] > run->first ? high[r] - run->first : 0; j < count; j++) score[j] = -INFINITY;
        vf most = splat(-INFINITY);
        for (long j = 0; j < count; j += VL) most = max_vf(load_f32(score + j), most);
        float top = most[0];
        for (int i = 1; i < VL; i++) top = most[i] > top ? most[i] : top;
        largest[r] = top;
        vf shift = shift_of(splat(top));
        for (long j = 0; j < count; j += VL) {
            vf weight = weight_of(load_f32(score + j) - shift, form.factor);
#if CELL_SIZE == 2
            vh narrow = __builtin_convertvector(round_weight(weight) >> 16, vh);
            memcpy((ELEM *)score + j, &narrow, sizeof narrow);
#else
            store_f32(score + j, weight);
#endif
        }
    }
    long h = 0;
    for (; h + 4 * VL <= H; h += 4 * VL)
        if (h == 0)
            NAME(weigh_few)(rows, 4, 1, scores, run, h, H, values, total);
        else
            NAME(weigh_few)(rows, 4, 0, scores, run, h, H, values, total);
    for (; h < H; h += VL) NAME(weigh_few)(rows, 1, 1, scores, run, h, H, values, total);
}

/* values[rows][H], largest[rows] and total[rows] of a run; q: [rows][cells]. */
static void NAME(attend_few_rows)(const NAME(cell) *q, const NAME(run) *run, long rows, const int32_t *low, const int32_t *high, long H,
                                  scoring form, float *largest, float *total, float *values) {
    for (long r = 0; r < rows; r += FEW) {
#define FORM(n) NAME(attend_few)(n, q + r * (H / CELL_SIZE), run, low + r, high + r, H, form, largest + r, total + r, values + r * H)
        switch (rows - r) {
            case 1: FORM(1); break;
            case 2: FORM(2); break;
            case 3: FORM(3); break;
            default: FORM(FEW);
        }
#undef FORM
    }
}
