/* Norms, the gated activation, and what happens to heads between the first matrix product and attention. Rows are independent; each is
   computed in the same order whatever the batch. Included once for each element type. */

INLINE float NAME(sum_of_squares)(const ELEM *x, long D) {
    vf squares = splat(0);
    long d = 0;
    for (; d + VL <= D; d += VL) {
        vf v = NAME(load)(x + d);
        squares += v * v;
    }
    float total = sum_of(squares);
    for (; d < D; d++) total += NAME(get)(x + d) * NAME(get)(x + d);
    return total;
}

INLINE float NAME(inverse_rms)(const ELEM *x, long D, float epsilon) {
    return 1.0f / sqrtf(NAME(sum_of_squares)(x, D) / (float)D + epsilon);
}

/* out = x * factor * (weight + offset). */
INLINE void NAME(scale_row)(const ELEM *x, const ELEM *weight, float offset, float factor, ELEM *out, long D) {
    long d = 0;
    for (; d + VL <= D; d += VL) NAME(store)(out + d, NAME(load)(x + d) * factor * (NAME(load)(weight + d) + offset));
    for (; d < D; d++) NAME(put)(out + d, NAME(get)(x + d) * factor * (NAME(get)(weight + d) + offset));
}

/* x[count] += update. */
INLINE void NAME(add)(ELEM *x, const ELEM *update, long count) {
    long d = 0;
    for (; d + VL <= count; d += VL) NAME(store)(x + d, NAME(load)(x + d) + NAME(load)(update + d));
    for (; d < count; d++) NAME(put)(x + d, NAME(get)(x + d) + NAME(get)(update + d));
}

/* x[count] *= factor. */
INLINE void NAME(times)(ELEM *x, float factor, long count) {
    long d = 0;
    for (; d + VL <= count; d += VL) NAME(store)(x + d, NAME(load)(x + d) * factor);
    for (; d < count; d++) NAME(put)(x + d, NAME(get)(x + d) * factor);
}

typedef struct {
    ELEM *x;
    const ELEM *update, *weight;
    ELEM *out;
    long D;
    float epsilon, offset;
} NAME(norm);

static void NAME(norm_rows)(void *context, long first, long last) {
    const NAME(norm) *n = context;
    for (long t = first; t < last; t++) {
        ELEM *row = n->x + t * n->D;
        if (n->update) NAME(add)(row, n->update + t * n->D, n->D);
        NAME(scale_row)(row, n->weight, n->offset, NAME(inverse_rms)(row, n->D, n->epsilon), n->out + t * n->D, n->D);
    }
}

/* x[T, D] += update (unless that is null); out, which may be x, = x / rms(x) * (weight + offset). */
void NAME(add_rms_norm)(ELEM *x, const ELEM *update, const ELEM *weight, ELEM *out, long T, long D, float epsilon, float offset) {
    NAME(norm) n = {x, update, weight, out, D, epsilon, offset};
    run_loop(NAME(norm_rows), &n, T, PARTS_FOR(T * D));
}

typedef struct {
    const ELEM *x;
    float *out;
    long stride, D;
} NAME(squaring);

static void NAME(square_rows)(void *context, long first, long last) {
    const NAME(squaring) *s = context;
    for (long t = first; t < last; t++) s->out[t] = NAME(sum_of_squares)(s->x + t * s->stride, s->D);
}

/* Rows of D elements, `stride` apart: the sum of squares of each. */
void NAME(square_sums)(const ELEM *x, long stride, float *out, long T, long D) {
    NAME(squaring) s = {x, out, stride, D};
    run_loop(NAME(square_rows), &s, T, PARTS_FOR(T * D));
}

typedef struct {
    ELEM *x;
    const ELEM *weight;
    const float *squares;
    long stride, D, whole;
    float epsilon;
} NAME(scaling);

static void NAME(scale_rows)(void *context, long first, long last) {
    const NAME(scaling) *s = context;
    for (long t = first; t < last; t++) {
        ELEM *row = s->x + t * s->stride;
        NAME(scale_row)(row, s->weight, 0, 1.0f / sqrtf(s->squares[t] / (float)s->whole + s->epsilon), row, s->D);
    }
}

/* Rows of D elements, `stride` apart, are parts of rows of `whole` elements, the sums of whose squares are given: x *= weight / rms. */
void NAME(scale_by_rms)(ELEM *x, long stride, const float *squares, const ELEM *weight, long T, long D, long whole, float epsilon) {
    NAME(scaling) s = {x, weight, squares, stride, D, whole, epsilon};
    run_loop(NAME(scale_rows), &s, T, PARTS_FOR(T * D));
}

typedef struct {
    const ELEM *gate_up;
    ELEM *out;
    long I;
} NAME(activation);

/* g times sigmoid(steep g + cubic g^3): silu, or gelu in its form with tanh. */
INLINE void NAME(activate)(const NAME(activation) *s, long first, long last, const float steep, const float cubic) {
    for (long t = first; t < last; t++) {
        const ELEM *gate = s->gate_up + t * 2 * s->I, *up = gate + s->I;
        ELEM *row = s->out + t * s->I;
        long i = 0;
        for (; i + VL <= s->I; i += VL) {
            vf g = NAME(load)(gate + i), y = cubic == 0 ? g : g * (steep + cubic * g * g);
            NAME(store)(row + i, g / (1.0f + exp_vf(-y)) * NAME(load)(up + i));
        }
        for (; i < s->I; i++) {
            float g = NAME(get)(gate + i), y = cubic == 0 ? g : g * (steep + cubic * g * g);
            NAME(put)(row + i, g / (1.0f + expf(-y)) * NAME(get)(up + i));
        }
    }
}

static void NAME(silu_rows)(void *context, long first, long last) { NAME(activate)(context, first, last, 1, 0); }

/* 2 sqrt(2 / pi) (g + 0.044715 g^3), since (1 + tanh(y)) / 2 = sigmoid(2 y). */
static void NAME(gelu_rows)(void *context, long first, long last) { NAME(activate)(context, first, last, 1.5957691216f, 0.07135481627f); }

/* gate_up[T, 2 I] -> out[T, I] = silu(gate) * up. */
void NAME(silu_mul)(const ELEM *gate_up, ELEM *out, long T, long I) {
    NAME(activation) s = {gate_up, out, I};
    run_loop(NAME(silu_rows), &s, T, PARTS_FOR(T * I));
}

/* The same with gelu's approximation by tanh. */
void NAME(gelu_mul)(const ELEM *gate_up, ELEM *out, long T, long I) {
    NAME(activation) s = {gate_up, out, I};
    run_loop(NAME(gelu_rows), &s, T, PARTS_FOR(T * I));
}

/* The first `turned` elements of a head in pairs (i, i + turned / 2), or (2 i, 2 i + 1); out may be x. */
INLINE void NAME(rotate)(const ELEM *x, const float *table, ELEM *out, long turned) {
    long half = turned / 2, i = 0;
    for (; i + VL <= half; i += VL) {
        vf left = NAME(load)(x + i), right = NAME(load)(x + half + i), cosine = load_f32(table + i), sine = load_f32(table + half + i);
        NAME(store)(out + i, left * cosine - right * sine);
        NAME(store)(out + half + i, right * cosine + left * sine);
    }
    for (; i < half; i++) {
        float left = NAME(get)(x + i), right = NAME(get)(x + half + i);
        NAME(put)(out + i, left * table[i] - right * table[half + i]);
        NAME(put)(out + half + i, right * table[i] + left * table[half + i]);
    }
}

INLINE void NAME(rotate_neighbours)(const ELEM *x, const float *table, ELEM *out, long turned) {
    for (long i = 0; i < turned / 2; i++) {
        float left = NAME(get)(x + 2 * i), right = NAME(get)(x + 2 * i + 1);
        NAME(put)(out + 2 * i, left * table[i] - right * table[turned / 2 + i]);
        NAME(put)(out + 2 * i + 1, right * table[i] + left * table[turned / 2 + i]);
    }
}

typedef struct {
    ELEM *heads;
    const float *table;
    const int64_t *slots;
    ELEM *cache;
    const ELEM *query_norm, *key_norm;
    float epsilon, offset;
    long N, K, P, H, turned, has_neighbours, is_fp8;
} NAME(placing);

static void NAME(place_rows)(void *context, long first, long last) {
    const NAME(placing) *p = context;
    long N = p->N, K = p->K, P = p->P, H = p->H, turned = p->turned;
    ELEM wide[p->is_fp8 ? H : 1];
    for (long t = first; t < last; t++) {
        const float *angles = p->table + t * turned;
        for (long n = 0; n < N + 2 * K; n++) {
            ELEM *head = p->heads + (t * (N + 2 * K) + n) * H;
            const ELEM *norm = n < N ? p->query_norm : p->key_norm;
            long place = n < N ? 0 : ((p->slots[t] / P * 2 * K + n - N) * P + p->slots[t] % P) * H;
            ELEM *target = n < N ? head : p->is_fp8 ? wide : p->cache + place;
            long kept = n < N + K ? turned : 0; /* what is not rotated begins here */
            if (n < N + K && norm) NAME(scale_row)(head, norm, p->offset, NAME(inverse_rms)(head, H, p->epsilon), head, H);
            if (kept && p->has_neighbours)
                NAME(rotate_neighbours)(head, angles, target, turned);
            else if (kept)
                NAME(rotate)(head, angles, target, turned);
            if (target != head && kept < H) memcpy(target + kept, head + kept, (H - kept) * sizeof(ELEM));
            for (long i = 0; i < H && target == wide; i += VL) narrow_fp8((uint8_t *)p->cache + place + i, NAME(load)(wide + i));
        }
    }
}

/* heads[T, N + 2 K, H]: queries, keys, values. Norms (unless null; their weights plus `offset`) and rotates queries in place; puts keys,
   likewise, and values into their token's slot (block * P + offset) of cache[blocks, 2 K, P, H], whose numbers are rows' or fp8. table[T, turned]: cosines, then sines,
   of the pairs among a head's first elements. H % (2 VL) = 0. */
void NAME(place_heads)(ELEM *heads, const float *table, const int64_t *slots, ELEM *cache, const ELEM *query_norm, const ELEM *key_norm,
                       float epsilon, float offset, long T, long N, long K, long P, long H, long turned, long has_neighbours,
                       long is_fp8) {
    NAME(placing) p = {heads, table, slots, cache, query_norm, key_norm, epsilon, offset, N, K, P, H, turned, has_neighbours, is_fp8};
    run_loop(NAME(place_rows), &p, T, PARTS_FOR(T * (N + 2 * K) * H));
}
