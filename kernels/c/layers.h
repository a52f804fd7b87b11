/* All decoder layers of a step in one call: no interpreter between the kernels, whose threads stay awake, and no new memory.

   What works row by row is done for ROWS_AT_ONCE rows after another, so that their wide activations are still in a cache when they are
   read. The kernels are those that are called one by one elsewhere: the results have the same bits. Included once for each element type. */

#ifndef LAYERS_ONCE
#define LAYERS_ONCE
#define CACHE_LINE 64
#define ROWS_AT_ONCE 448 /* whole tiles of a product */

/* The structures that kernels/native/structures.py fills; it compares their sizes with those given at the end of kernels.c. Elements are
   those of the function that gets them. */
typedef struct {
    const void *attention_norm, *query_norm, *key_norm, *mlp_norm; /* query_norm and key_norm are null where heads have no norms */
    const void *after_attention, *after_mlp;                       /* norms, or null */
    const float *sinks;                                            /* see attend */
    matrix qkv, output, gate_up, down;
    int64_t window; /* which of a step's window_plans */
    int64_t rope;   /* which of its rope_tables */
    int64_t qkv_site, output_site, gate_up_site, down_site; /* the numbers by which adapters know these products */
} decoder_layer;

typedef struct {
    int64_t num_layers, query_heads, kv_heads, block_tokens, head_dim, num_read_heads, group;
    const int64_t *read_heads;
    float epsilon, norm_offset, scale, cap; /* see add_rms_norm and attend */
    float update_factor;                    /* of what attention and MLP add */
    int64_t is_gelu, turned, has_neighbours; /* see gelu_mul and place_heads */
    int64_t is_fp8;                          /* the caches' numbers are */
    volatile int64_t *num_done; /* one more after every layer, for other threads to read */
    void *const *caches;        /* of each layer */
    const window_plan *windows;
    int64_t num_tokens;
    const float *const *rope_tables; /* see place_heads */
    const int64_t *slots;    /* see place_heads */
    void *x;                 /* [num_tokens, D], the residual stream, changed in place */
    void *scratch;           /* layers_scratch elements */
    float *partial;          /* see attend */
    const update_block *updates; /* of each rows_at_once rows, what adapters add; null where no row has an adapter */
} stack_step;

int64_t most_rows_at_once(void) { return ROWS_AT_ONCE; }
static long rows_at_once(long num_tokens) { return num_tokens < ROWS_AT_ONCE ? num_tokens : ROWS_AT_ONCE; }

/* Elements that a product of `rows` rows needs beside its rows and its results. */
static int64_t product_scratch(const matrix *m, int64_t rows) {
    return m->form == GROUPED ? (grouped_scratch(m, rows) + 1) / (int64_t)sizeof(bf16) : rows * m->num_inputs;
}

/* Elements of scratch that run_layers needs. */
int64_t layers_scratch(const decoder_layer *layers, int64_t num_layers, int64_t num_tokens) {
    int64_t D = layers->qkv.num_inputs, Q = layers->output.num_inputs, I = layers->down.num_inputs, rows = rows_at_once(num_tokens), most = 0;
    for (const decoder_layer *l = layers; l < layers + num_layers; l++) {
        const matrix *matrices[] = {&l->qkv, &l->output, &l->gate_up, &l->down};
        for (int i = 0; i < 4; i++) {
            int64_t size = product_scratch(matrices[i], rows);
            most = size > most ? size : most;
        }
    }
    return num_tokens * (layers->qkv.num_outputs + Q + D) + rows * (D + 3 * I) + most + CACHE_LINE;
}
#endif

static void NAME(multiply_by)(const matrix *m, const ELEM *a, ELEM *out, ELEM *a_packed, long rows) {
    if (m->form == GROUPED) {
        NAME(grouped_linear)(m, a, m->num_inputs, out, 0, a_packed, rows);
        return;
    }
#ifndef ELEM_IS_BF16
    if (m->form == NARROW) {
        linear_f32_by_bf16(a, m->num_inputs, m->packed, m->bias, out, 0, a_packed, rows, m->num_outputs, m->num_inputs);
        return;
    }
#endif
    NAME(linear)(a, m->num_inputs, m->packed, m->bias, out, 0, a_packed, rows, m->num_outputs, m->num_inputs);
}

/* Where rows from `first` on have adapters, add what those add to a product. */
static void NAME(update_product)(const stack_step *s, long first, int64_t site, const ELEM *x, long K, ELEM *out, long ldo) {
    if (s->updates) NAME(add_updates)(s->updates + first / rows_at_once(s->num_tokens), site, x, K, out, ldo);
}

/* `update` to what is added to the stream. */
static void NAME(finish_update)(const stack_step *s, const ELEM *norm, ELEM *update, long rows, long D) {
    if (norm) NAME(add_rms_norm)(update, 0, norm, update, rows, D, s->epsilon, s->norm_offset);
    if (s->update_factor != 1) NAME(times)(update, s->update_factor, rows * D);
}

/* The layers are alike in all but what decoder_layer says. */
void NAME(run_layers)(const stack_step *s, const decoder_layer *layers) {
    long T = s->num_tokens, D = layers->qkv.num_inputs, X = layers->qkv.num_outputs, Q = layers->output.num_inputs, I = layers->down.num_inputs;
    long most = rows_at_once(T);
    ELEM *x = s->x, *heads = s->scratch, *attended = heads + T * X, *update = attended + T * Q, *normed = update + T * D;
    ELEM *wide = normed + most * D, *active = wide + most * 2 * I, *a_packed = active + most * I;
    a_packed = (ELEM *)(((uintptr_t)a_packed + CACHE_LINE - 1) & -(uintptr_t)CACHE_LINE);
    for (const decoder_layer *l = layers; l < layers + s->num_layers; l++) {
        ELEM *cache = s->caches[l - layers];
        for (long t = 0; t < T; t += most) {
            long rows = T - t < most ? T - t : most;
            NAME(add_rms_norm)(x + t * D, l == layers ? 0 : update + t * D, l->attention_norm, normed, rows, D, s->epsilon,
                               s->norm_offset);
            NAME(multiply_by)(&l->qkv, normed, heads + t * X, a_packed, rows);
            NAME(update_product)(s, t, l->qkv_site, normed, D, heads + t * X, X);
            NAME(place_heads)(heads + t * X, s->rope_tables[l->rope] + t * s->turned, s->slots + t, cache, l->query_norm, l->key_norm,
                              s->epsilon, s->norm_offset, rows, s->query_heads, s->kv_heads, s->block_tokens, s->head_dim, s->turned,
                              s->has_neighbours, s->is_fp8);
        }
        NAME(attend)(heads, X, cache, s->windows + l->window, s->read_heads, s->partial, attended, s->num_read_heads, s->group,
                     s->kv_heads, s->block_tokens, s->head_dim, s->scale, s->cap, l->sinks, s->is_fp8);
        for (long t = 0; t < T; t += most) {
            long rows = T - t < most ? T - t : most;
            NAME(multiply_by)(&l->output, attended + t * Q, update + t * D, a_packed, rows);
            NAME(update_product)(s, t, l->output_site, attended + t * Q, Q, update + t * D, D);
            NAME(finish_update)(s, l->after_attention, update + t * D, rows, D);
            NAME(add_rms_norm)(x + t * D, update + t * D, l->mlp_norm, normed, rows, D, s->epsilon, s->norm_offset);
            NAME(multiply_by)(&l->gate_up, normed, wide, a_packed, rows);
            NAME(update_product)(s, t, l->gate_up_site, normed, D, wide, 2 * I);
            (s->is_gelu ? NAME(gelu_mul) : NAME(silu_mul))(wide, active, rows, I);
            NAME(multiply_by)(&l->down, active, update + t * D, a_packed, rows);
            NAME(update_product)(s, t, l->down_site, active, I, update + t * D, D);
            NAME(finish_update)(s, l->after_mlp, update + t * D, rows, D);
        }
        ++*s->num_done;
    }
    NAME(add)(x, update, T * D);
}
