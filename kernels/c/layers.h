/* All layers of a step in one call: no interpreter between the kernels, whose threads stay awake, and no new memory.

   What works row by row goes in blocks of rows, so that a block's wide activations are still in a cache when they are read. The kernels
   are those that are called one by one elsewhere: the results have the same bits. Included once for each element type. */

#ifndef LAYERS_ONCE
#define LAYERS_ONCE
#define BLOCK_ROWS 448 /* whole tiles of a product */

typedef struct {
    const void *packed, *bias;
    int64_t N, K, is_narrow; /* narrow: weights in bfloat16, rows in float32 */
} matrix;

typedef struct {
    const query_tile *tiles;
    const int32_t *blocks;
    int64_t num_tiles, num_tasks, window;
} attention_plan;

typedef struct {
    int64_t T, num_layers, query_heads, kv_heads, block_tokens, head_dim, read_heads, group;
} step_sizes;
#endif

typedef struct {
    const ELEM *attention_norm, *query_norm, *key_norm, *mlp_norm;
    matrix qkv, output, gate_up, down;
    int64_t plan;
} NAME(layer);

static void NAME(multiply_by)(const matrix *m, const ELEM *a, ELEM *out, ELEM *a_packed, long rows) {
#ifndef ELEM_IS_BF16
    if (m->is_narrow) {
        linear_f32_by_bf16(a, m->K, m->packed, m->bias, out, 0, a_packed, rows, m->N, m->K);
        return;
    }
#endif
    NAME(linear)(a, m->K, m->packed, m->bias, out, 0, a_packed, rows, m->N, m->K);
}

/* x[T, D] is the residual stream, changed in place. caches: each layer's blocks. table, slots: see place_heads. partial: see attend.
   scratch: T * (qkv.N + output.K + D) + min(T, BLOCK_ROWS) * (D + 3 down.K + the largest K of any matrix) elements. num_done: one more
   after every layer, for other threads to read. */
void NAME(run_layers)(const step_sizes *z, const NAME(layer) *layers, ELEM *const *caches, const attention_plan *plans,
                      const int64_t *read_heads, const float *table, const int64_t *slots, ELEM *x, ELEM *scratch, float *partial,
                      float epsilon, float scale, volatile int64_t *num_done) {
    long T = z->T, D = layers->qkv.K, X = layers->qkv.N, Q = layers->output.K, I = layers->down.K, B = T < BLOCK_ROWS ? T : BLOCK_ROWS;
    ELEM *heads = scratch, *attended = heads + T * X, *update = attended + T * Q, *normed = update + T * D;
    ELEM *wide = normed + B * D, *active = wide + B * 2 * I, *a_packed = active + B * I;
    for (const NAME(layer) *l = layers; l < layers + z->num_layers; l++) {
        ELEM *cache = caches[l - layers];
        const attention_plan *plan = plans + l->plan;
        for (long t = 0; t < T; t += B) {
            long rows = T - t < B ? T - t : B;
            NAME(add_rms_norm)(x + t * D, l == layers ? 0 : update + t * D, l->attention_norm, normed, rows, D, epsilon);
            NAME(multiply_by)(&l->qkv, normed, heads + t * X, a_packed, rows);
            NAME(place_heads)(heads + t * X, table + t * z->head_dim, slots + t, cache, l->query_norm, l->key_norm, epsilon, rows,
                              z->query_heads, z->kv_heads, z->block_tokens, z->head_dim);
        }
        NAME(attend)(heads, X, cache, plan->tiles, plan->blocks, read_heads, partial, attended, plan->num_tiles, plan->num_tasks,
                     plan->window, z->read_heads, z->group, z->kv_heads, z->block_tokens, z->head_dim, scale);
        for (long t = 0; t < T; t += B) {
            long rows = T - t < B ? T - t : B;
            NAME(multiply_by)(&l->output, attended + t * Q, update + t * D, a_packed, rows);
            NAME(add_rms_norm)(x + t * D, update + t * D, l->mlp_norm, normed, rows, D, epsilon);
            NAME(multiply_by)(&l->gate_up, normed, wide, a_packed, rows);
            NAME(silu_mul)(wide, active, rows, I);
            NAME(multiply_by)(&l->down, active, update + t * D, a_packed, rows);
        }
        ++*num_done;
    }
    NAME(add)(x, update, T * D);
}
