/* All decoder layers of a step in one call: no interpreter between the kernels, whose threads stay awake, and no new memory.

   What works row by row is done for ROWS_AT_ONCE rows after another, so that their wide activations are still in a cache when they are
   read. The kernels are those that are called one by one elsewhere: the results have the same bits. Included once for each element type. */

#ifndef LAYERS_ONCE
#define LAYERS_ONCE
#define ROWS_AT_ONCE 448 /* whole tiles of a product */

/* The structures that kernels/native/structures.py fills; it compares their sizes with those given at the end of kernels.c. Elements are
   those of the function that gets them. */
typedef struct {
    const void *packed, *bias;
    int64_t num_outputs, num_inputs;
    int64_t is_narrow; /* weights in bfloat16, rows in float32 */
} matrix;

typedef struct {
    const void *attention_norm, *query_norm, *key_norm, *mlp_norm; /* query_norm and key_norm are null where heads have no norms */
    matrix qkv, output, gate_up, down;
    int64_t window; /* which of a step's window_plans */
} decoder_layer;

typedef struct {
    int64_t num_layers, query_heads, kv_heads, block_tokens, head_dim, num_read_heads, group;
    const int64_t *read_heads;
    float epsilon, scale;
    volatile int64_t *num_done; /* one more after every layer, for other threads to read */
    void *const *caches;        /* of each layer */
    const window_plan *windows;
    int64_t num_tokens;
    const float *rope_table; /* see place_heads */
    const int64_t *slots;    /* see place_heads */
    void *x;                 /* [num_tokens, D], the residual stream, changed in place */
    void *scratch;           /* layers_scratch elements */
    float *partial;          /* see attend */
} stack_step;

static long rows_at_once(long num_tokens) { return num_tokens < ROWS_AT_ONCE ? num_tokens : ROWS_AT_ONCE; }

/* Elements of scratch that run_layers needs. */
int64_t layers_scratch(const decoder_layer *layer, int64_t num_tokens) {
    int64_t D = layer->qkv.num_inputs, Q = layer->output.num_inputs, I = layer->down.num_inputs, widest = D > Q ? D : Q;
    return num_tokens * (layer->qkv.num_outputs + Q + D) + rows_at_once(num_tokens) * (D + 3 * I + (widest > I ? widest : I));
}
#endif

static void NAME(multiply_by)(const matrix *m, const ELEM *a, ELEM *out, ELEM *a_packed, long rows) {
#ifndef ELEM_IS_BF16
    if (m->is_narrow) {
        linear_f32_by_bf16(a, m->num_inputs, m->packed, m->bias, out, 0, a_packed, rows, m->num_outputs, m->num_inputs);
        return;
    }
#endif
    NAME(linear)(a, m->num_inputs, m->packed, m->bias, out, 0, a_packed, rows, m->num_outputs, m->num_inputs);
}

/* The layers are alike in all but their window. */
void NAME(run_layers)(const stack_step *s, const decoder_layer *layers) {
    long T = s->num_tokens, D = layers->qkv.num_inputs, X = layers->qkv.num_outputs, Q = layers->output.num_inputs, I = layers->down.num_inputs;
    long most = rows_at_once(T);
    ELEM *x = s->x, *heads = s->scratch, *attended = heads + T * X, *update = attended + T * Q, *normed = update + T * D;
    ELEM *wide = normed + most * D, *active = wide + most * 2 * I, *a_packed = active + most * I;
    for (const decoder_layer *l = layers; l < layers + s->num_layers; l++) {
        ELEM *cache = s->caches[l - layers];
        for (long t = 0; t < T; t += most) {
            long rows = T - t < most ? T - t : most;
            NAME(add_rms_norm)(x + t * D, l == layers ? 0 : update + t * D, l->attention_norm, normed, rows, D, s->epsilon);
            NAME(multiply_by)(&l->qkv, normed, heads + t * X, a_packed, rows);
            NAME(place_heads)(heads + t * X, s->rope_table + t * s->head_dim, s->slots + t, cache, l->query_norm, l->key_norm, s->epsilon,
                              rows, s->query_heads, s->kv_heads, s->block_tokens, s->head_dim);
        }
        NAME(attend)(heads, X, cache, s->windows + l->window, s->read_heads, s->partial, attended, s->num_read_heads, s->group,
                     s->kv_heads, s->block_tokens, s->head_dim, s->scale);
        for (long t = 0; t < T; t += most) {
            long rows = T - t < most ? T - t : most;
            NAME(multiply_by)(&l->output, attended + t * Q, update + t * D, a_packed, rows);
            NAME(add_rms_norm)(x + t * D, update + t * D, l->mlp_norm, normed, rows, D, s->epsilon);
            NAME(multiply_by)(&l->gate_up, normed, wide, a_packed, rows);
            NAME(silu_mul)(wide, active, rows, I);
            NAME(multiply_by)(&l->down, active, update + t * D, a_packed, rows);
        }
        ++*s->num_done;
    }
    NAME(add)(x, update, T * D);
}
