/* Norms, the gated activation, and what happens to heads between the first matrix product and attention. Rows are independent; each is
   computed in the same order whatever the batch. Included once for each element type. */

INLINE float NAME(inverse_rms)(const ELEM *x, long D, float epsilon) {
    vf squares = splat(0);
    long d = 0;
    for (; d + VL <= D; d += VL) {
        vf v = NAME(load)(x + d);
        squares += v * v;
    }
    float total = sum_of(squares);
    for (; d < D; d++) total += NAME(get)(x + d) * NAME(get)(x + d);
    return 1.0f / sqrtf(total / (float)D + epsilon);
}

INLINE void NAME(scale_row)(const ELEM *x, const ELEM *weight, float factor, ELEM *out, long D) {
    long d = 0;
    for (; d + VL <= D; d += VL) NAME(store)(out + d, NAME(load)(x + d) * factor * NAME(load)(weight + d));
    for (; d < D; d++) NAME(put)(out + d, NAME(get)(x + d) * factor * NAME(get)(weight + d));
}

/* x[count] += update. */
INLINE void NAME(add)(ELEM *x, const ELEM *update, long count) {
    long d = 0;
    for (; d + VL <= count; d += VL) NAME(store)(x + d, NAME(load)(x + d) + NAME(load)(update + d));
    for (; d < count; d++) NAME(put)(x + d, NAME(get)(x + d) + NAME(get)(update + d));
}

typedef struct {
    ELEM *x;
    const ELEM *update, *weight;
    ELEM *out;
    long D;
    float epsilon;
} NAME(norm);

static void NAME(norm_rows)(void *context, long first, long last) {
    const NAME(norm) *n = context;
    for (long t = first; t < last; t++) {
        ELEM *row = n->x + t * n->D;
        if (n->update) NAME(add)(row, n->update + t * n->D, n->D);
        NAME(scale_row)(row, n->weight, NAME(inverse_rms)(row, n->D, n->epsilon), n->out + t * n->D, n->D);
    }
}

/* x[T, D] += update (unless that is null); out = x / rms(x) * weight. */
void NAME(add_rms_norm)(ELEM *x, const ELEM *update, const ELEM *weight, ELEM *out, long T, long D, float epsilon) {
    NAME(norm) n = {x, update, weight, out, D, epsilon};
    run_loop(NAME(norm_rows), &n, T, PARTS_FOR(T * D));
}

typedef struct {
    const ELEM *gate_up;
    ELEM *out;
    long I;
} NAME(activation);

static void NAME(activate_rows)(void *context, long first, long last) {
    const NAME(activation) *s = context;
    for (long t = first; t < last; t++) {
        const ELEM *gate = s->gate_up + t * 2 * s->I, *up = gate + s->I;
        ELEM *row = s->out + t * s->I;
        long i = 0;
        for (; i + VL <= s->I; i += VL) {
            vf g = NAME(load)(gate + i);
            NAME(store)(row + i, g / (1.0f + exp_vf(-g)) * NAME(load)(up + i));
        }
        for (; i < s->I; i++) {
            float g = NAME(get)(gate + i);
            NAME(put)(row + i, g / (1.0f + expf(-g)) * NAME(get)(up + i));
        }
    }
}

/* gate_up[T, 2 I] -> out[T, I] = silu(gate) * up. */
void NAME(silu_mul)(const ELEM *gate_up, ELEM *out, long T, long I) {
    NAME(activation) s = {gate_up, out, I};
    run_loop(NAME(activate_rows), &s, T, PARTS_FOR(T * I));
}

INLINE void NAME(rotate)(const ELEM *x, const float *table, ELEM *out, long H) {
    for (long i = 0; i < H / 2; i += VL) {
        vf left = NAME(load)(x + i), right = NAME(load)(x + H / 2 + i), cosine = load_f32(table + i), sine = load_f32(table + H / 2 + i);
        NAME(store)(out + i, left * cosine - right * sine);
        NAME(store)(out + H / 2 + i, right * cosine + left * sine);
    }
}

typedef struct {
    ELEM *heads;
    const float *table;
    const int64_t *slots;
    ELEM *cache;
    const ELEM *query_norm, *key_norm;
    float epsilon;
    long N, K, P, H;
} NAME(placing);

static void NAME(place_rows)(void *context, long first, long last) {
    const NAME(placing) *p = context;
    long N = p->N, K = p->K, P = p->P, H = p->H;
    for (long t = first; t < last; t++) {
        const float *angles = p->table + t * H;
        for (long n = 0; n < N + 2 * K; n++) {
            ELEM *head = p->heads + (t * (N + 2 * K) + n) * H;
            const ELEM *norm = n < N ? p->query_norm : p->key_norm;
            ELEM *target = n < N ? head : p->cache + ((p->slots[t] / P * 2 * K + n - N) * P + p->slots[t] % P) * H;
            if (n < N + K && norm) NAME(scale_row)(head, norm, NAME(inverse_rms)(head, H, p->epsilon), head, H);
            if (n < N + K)
                NAME(rotate)(head, angles, target, H);
            else
                memcpy(target, head, H * sizeof(ELEM));
        }
    }
}

/* heads[T, N + 2 K, H]: queries, keys, values. Norms (unless null) and rotates queries in place; puts keys, likewise, and values into
   their token's slot (block * P + offset) of cache[blocks, 2 K, P, H]. table[T, H]: cosines, then sines. H % (2 VL) = 0. */
void NAME(place_heads)(ELEM *heads, const float *table, const int64_t *slots, ELEM *cache, const ELEM *query_norm, const ELEM *key_norm,
                       float epsilon, long T, long N, long K, long P, long H) {
    NAME(placing) p = {heads, table, slots, cache, query_norm, key_norm, epsilon, N, K, P, H};
    run_loop(NAME(place_rows), &p, T, PARTS_FOR(T * (N + 2 * K) * H));
}
