/* A mixture of experts: each token's experts are chosen, and each expert multiplies the rows of its tokens.

   The rows of one expert are gathered and packed as in linear.h, and the products of all experts are one loop over their panels. A token's
   experts are added in the order of their numbers: a row's result does not depend on its batch. Included after linear.h for each pair of
   element types. */

#ifndef MIXTURE_ONCE
#define MIXTURE_ONCE
#define MOST_EXPERTS 1024
#define PAIRS_AT_ONCE 4096 /* of a token and an expert; bounds the scratch memory */

/* As in kernels/native/structures.py. */
typedef struct {
    matrix gate_up, down; /* of one form, in all experts alike but for what they point to */
} expert;

typedef struct {
    const expert *experts; /* of this rank: those with the numbers [first, first + num_here) */
    int64_t num_experts, first, num_here, num_chosen, hidden, width;
    int64_t is_renormalized, is_rounded; /* see Routing in kernels/mixture/routing.py */
    float alpha, limit, shift;           /* see Swiglu in kernels/mixture/reference.py */
} mixture;

static long mixture_tokens(const mixture *m, long tokens) {
    long most = PAIRS_AT_ONCE / m->num_chosen + 1;
    return tokens < most ? tokens : most;
}

/* The next `bytes` of scratch memory, in cache lines of their own. */
INLINE void *take_scratch(char **scratch, int64_t bytes) {
    char *taken = *scratch;
    *scratch += (bytes + 63) & ~63L;
    return taken;
}

/* Bytes of the rows of so many pairs as products read them. */
static int64_t mixture_packed(const mixture *m, int64_t pairs, int64_t element_bytes) {
    if (m->experts->gate_up.form == GROUPED) {
        int64_t up = grouped_scratch(&m->experts->gate_up, pairs), down = grouped_scratch(&m->experts->down, pairs);
        return up > down ? up : down;
    }
    return pairs * (m->hidden > m->width ? m->hidden : m->width) * element_bytes;
}

/* Bytes of scratch that a step of so many tokens needs. */
int64_t mixture_scratch(const mixture *m, int64_t num_tokens, int64_t element_bytes) {
    int64_t pairs = mixture_tokens(m, num_tokens) * m->num_chosen, products = m->num_here * (int64_t)(sizeof(long) * 20) + 256;
    return mixture_packed(m, pairs, element_bytes) + pairs * (m->hidden * 4 + 3 * m->width * element_bytes + 16) + 2 * products + 64 * 16;
}

/* The product that `number` belongs to, if `starts` are the numbers at which each begins. */
INLINE long find_product(const long *starts, long number) {
    long n = 0;
    while (starts[n + 1] <= number) n++;
    return n;
}
#endif

typedef struct {
    const mixture *m;
    const ELEM *x, *logits;
    ELEM *out;
    int32_t *chosen, *place, *token; /* place[token, choice] among the gathered rows, or -1; token[place] */
    float *weights, *down;           /* [token, choice]; [place, hidden] */
    ELEM *gathered, *packed, *gate_up, *active;
    NAME(product) *products; /* one per expert that has rows */
    long *tiles, *tasks;     /* how many those before each product have */
    long num_products;
} NAME(mixing);

static void NAME(route_row)(const mixture *m, const ELEM *logits, int32_t *chosen, float *weights) {
    char is_chosen[MOST_EXPERTS] = {0};
    float largest = 0, sum = 0;
    for (long s = 0; s < m->num_chosen; s++) {
        long best = -1;
        for (long e = 0; e < m->num_experts; e++)
            if (!is_chosen[e] && (best < 0 || NAME(get)(logits + e) > NAME(get)(logits + best))) best = e;
        is_chosen[best] = 1;
        if (s == 0) largest = NAME(get)(logits + best);
    }
    for (long e = 0, s = 0; e < m->num_experts; e++) {
        if (m->is_renormalized && !is_chosen[e]) continue;
        float each = expf(NAME(get)(logits + e) - largest);
        sum += each;
        if (is_chosen[e]) chosen[s] = (int32_t)e, weights[s++] = each;
    }
    for (long s = 0; s < m->num_chosen; s++) {
        weights[s] /= sum;
        if (m->is_rounded) {
            ELEM rounded;
            NAME(put)(&rounded, weights[s]);
            weights[s] = NAME(get)(&rounded);
        }
    }
}

static void NAME(route_rows)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    long S = x->m->num_chosen;
    for (long t = first; t < last; t++)
        NAME(route_row)(x->m, x->logits + t * x->m->num_experts, x->chosen + t * S, x->weights + t * S);
}

/* Gives the rows of each expert places one after the other, in the order of the tokens. counts[num_here]: rows of each. Returns all. */
static long NAME(place_pairs)(NAME(mixing) *x, long *counts, long tokens) {
    const mixture *m = x->m;
    long pairs = tokens * m->num_chosen, starts[MOST_EXPERTS], total = 0;
    memset(counts, 0, m->num_here * sizeof *counts);
    for (long i = 0; i < pairs; i++) {
        long e = x->chosen[i] - m->first;
        if (e >= 0 && e < m->num_here) counts[e]++;
    }
    for (long e = 0; e < m->num_here; e++) starts[e] = total, total += counts[e];
    for (long i = 0; i < pairs; i++) {
        long e = x->chosen[i] - m->first;
        int is_here = e >= 0 && e < m->num_here;
        x->place[i] = is_here ? (int32_t)starts[e]++ : -1;
        if (is_here) x->token[x->place[i]] = (int32_t)(i / m->num_chosen);
    }
    return total;
}

/* The products of all experts' rows, [place, K] -> [place, N] of `out`, or of `wide` if there. */
static void NAME(plan_products)(NAME(mixing) *x, const long *counts, const ELEM *rows, ELEM *out, float *wide, long N, long K, int is_down) {
    long first = 0, n = 0, tiles = 0, tasks = 0;
    for (long e = 0; e < x->m->num_here; first += counts[e++]) {
        if (!counts[e]) continue;
        const matrix *m = is_down ? &x->m->experts[e].down : &x->m->experts[e].gate_up;
        NAME(product) *p = x->products + n;
        *p = (NAME(product)){.a = rows + first * K, .lda = K, .w = m->packed, .bias = m->bias, .M = counts[e], .N = N, .K = K};
        p->out = out ? out + first * N : 0, p->wide = wide ? wide + first * N : 0;
        p->a_packed = p->M == 1 ? (ELEM *)p->a : x->packed + first * K; /* one row is packed as it is */
        NAME(tile_product)(p);
        x->tiles[n] = tiles, x->tasks[n++] = tasks;
        tiles += p->tiles, tasks += (N + NR - 1) / NR * p->bands;
    }
    x->num_products = n, x->tiles[n] = tiles, x->tasks[n] = tasks;
}

static void NAME(gather_tiles)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    long n = find_product(x->tiles, first), D = x->m->hidden;
    for (long i = first; i < last; i++) {
        while (x->tiles[n + 1] <= i) n++;
        const NAME(product) *p = x->products + n;
        long tile = i - x->tiles[n], place = (p->a - x->gathered) / D, stop = place + tile_start(p->M, p->tiles, tile + 1);
        for (place += tile_start(p->M, p->tiles, tile); place < stop; place++)
            memcpy(x->gathered + place * D, x->x + x->token[place] * D, D * sizeof(ELEM));
        if (p->M > 1) NAME(pack_tiles)((void *)p, tile, tile + 1);
    }
}

static void NAME(pack_active)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    long n = find_product(x->tiles, first);
    for (long i = first; i < last; i++) {
        while (x->tiles[n + 1] <= i) n++;
        if (x->products[n].M > 1) NAME(pack_tiles)(x->products + n, i - x->tiles[n], i - x->tiles[n] + 1);
    }
}

static void NAME(multiply_experts)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    for (long n = find_product(x->tasks, first); first < last; n++) {
        long stop = last < x->tasks[n + 1] ? last : x->tasks[n + 1];
        NAME(multiply)(x->products + n, first - x->tasks[n], stop - x->tasks[n]);
        first = stop;
    }
}

static void NAME(activate_experts)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    const mixture *m = x->m;
    long I = m->width;
    for (long place = first; place < last; place++) {
        const ELEM *gate = x->gate_up + place * 2 * I, *up = gate + I;
        ELEM *row = x->active + place * I;
        long i = 0;
        for (; i + VL <= I; i += VL) {
            vf g = NAME(load)(gate + i), u = NAME(load)(up + i), limit = splat(m->limit);
            g = select_vf(g > limit, limit, g);
            u = select_vf(u > limit, limit, select_vf(u < -limit, -limit, u));
            NAME(store)(row + i, g / (1.0f + exp_vf(-m->alpha * g)) * (u + m->shift));
        }
        for (; i < I; i++) {
            float g = NAME(get)(gate + i), u = NAME(get)(up + i);
            g = g > m->limit ? m->limit : g;
            u = u > m->limit ? m->limit : u < -m->limit ? -m->limit : u;
            NAME(put)(row + i, g / (1.0f + expf(-m->alpha * g)) * (u + m->shift));
        }
    }
}

static void NAME(add_experts)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    long D = x->m->hidden, S = x->m->num_chosen;
    for (long t = first; t < last; t++) {
        const int32_t *place = x->place + t * S;
        const float *weights = x->weights + t * S;
        ELEM *row = x->out + t * D;
        long d = 0;
        for (; d + VL <= D; d += VL) {
            vf sum = splat(0);
            for (long s = 0; s < S; s++)
                if (place[s] >= 0) sum += weights[s] * load_f32(x->down + place[s] * D + d);
            NAME(store)(row + d, sum);
        }
        for (; d < D; d++) {
            float sum = 0;
            for (long s = 0; s < S; s++)
                if (place[s] >= 0) sum += weights[s] * x->down[place[s] * D + d];
            NAME(put)(row + d, sum);
        }
    }
}

static void NAME(run_packed)(NAME(mixing) *x, const long *counts, long rows) {
    long D = x->m->hidden, I = x->m->width;
    NAME(plan_products)(x, counts, x->gathered, x->gate_up, 0, 2 * I, D, 0);
    run_loop(NAME(gather_tiles), x, x->tiles[x->num_products], PARTS_FOR(rows * D));
    run_loop(NAME(multiply_experts), x, x->tasks[x->num_products], 8);
    run_loop(NAME(activate_experts), x, rows, PARTS_FOR(rows * I));
    NAME(plan_products)(x, counts, x->active, 0, x->down, D, I, 1);
    run_loop(NAME(pack_active), x, x->tiles[x->num_products], PARTS_FOR(rows * I));
    run_loop(NAME(multiply_experts), x, x->tasks[x->num_products], 8);
}

#if defined(WEIGHT_IS_BF16) && !defined(ELEM_IS_BF16)
#define WIDENS_WEIGHTS
#else
#include "mixture_grouped.h"
#endif

static void NAME(mix)(const mixture *m, const ELEM *x_rows, const ELEM *logits, ELEM *out, char *scratch, long tokens) {
    long pairs = tokens * m->num_chosen, D = m->hidden, I = m->width;
    NAME(mixing) x = {.m = m, .x = x_rows, .logits = logits, .out = out};
    x.down = take_scratch(&scratch, pairs * D * sizeof(float));
    x.gathered = (ELEM *)x.down; /* which are read before the other is written */
    x.packed = take_scratch(&scratch, mixture_packed(m, pairs, sizeof(ELEM)));
    x.gate_up = take_scratch(&scratch, pairs * 2 * I * sizeof(ELEM));
    x.active = take_scratch(&scratch, pairs * I * sizeof(ELEM));
    x.chosen = take_scratch(&scratch, pairs * sizeof(int32_t));
    x.place = take_scratch(&scratch, pairs * sizeof(int32_t));
    x.token = take_scratch(&scratch, pairs * sizeof(int32_t));
    x.weights = take_scratch(&scratch, pairs * sizeof(float));
    x.products = take_scratch(&scratch, m->num_here * sizeof(NAME(product)));
    x.tiles = take_scratch(&scratch, (m->num_here + 1) * sizeof(long));
    x.tasks = take_scratch(&scratch, (m->num_here + 1) * sizeof(long));
    long *counts = take_scratch(&scratch, m->num_here * sizeof(long));

    run_loop(NAME(route_rows), &x, tokens, PARTS_FOR(tokens * m->num_experts * m->num_chosen));
    long rows = NAME(place_pairs)(&x, counts, tokens);
    if (rows) {
#ifndef WIDENS_WEIGHTS
        if (m->experts->gate_up.form == GROUPED)
            NAME(run_grouped)(&x, counts, rows);
        else
#endif
            NAME(run_packed)(&x, counts, rows);
    }
    run_loop(NAME(add_experts), &x, tokens, PARTS_FOR(tokens * m->num_chosen * D));
}

/* x[T, hidden], logits[T, num_experts] -> out[T, hidden]: what the chosen experts of this rank add. hidden and width are even. */
void NAME(mixture)(const mixture *m, const ELEM *x, const ELEM *logits, ELEM *out, void *scratch, long T) {
    long most = mixture_tokens(m, T);
    for (long t = 0; t < T; t += most)
        NAME(mix)(m, x + t * m->hidden, logits + t * m->num_experts, out + t * m->hidden, scratch, T - t < most ? T - t : most);
}

typedef struct {
    ELEM *out;
    const ELEM *gate, *x;
    long D;
} NAME(gating);

static void NAME(add_gated_rows)(void *context, long first, long last) {
    const NAME(gating) *g = context;
    for (long t = first; t < last; t++) {
        float factor = 1.0f / (1.0f + expf(-NAME(get)(g->gate + t)));
        ELEM *out = g->out + t * g->D;
        const ELEM *x = g->x + t * g->D;
        long d = 0;
        for (; d + VL <= g->D; d += VL) NAME(store)(out + d, NAME(load)(out + d) + factor * NAME(load)(x + d));
        for (; d < g->D; d++) NAME(put)(out + d, NAME(get)(out + d) + factor * NAME(get)(x + d));
    }
}

/* out[T, D] += sigmoid(gate[T]) * x[T, D]. */
void NAME(add_gated)(ELEM *out, const ELEM *gate, const ELEM *x, long T, long D) {
    NAME(gating) g = {out, gate, x, D};
    run_loop(NAME(add_gated_rows), &g, T, PARTS_FOR(T * D));
}

#undef WIDENS_WEIGHTS
