/* The products of a mixture whose experts' weights are integers in groups (grouped.h). Included by mixture.h for each type of rows. */

static void NAME(plan_grouped)(NAME(mixing) *x, const long *counts, const ELEM *rows, ELEM *out, float *wide, int is_down) {
    NAME(grouped_product) *products = (void *)x->products;
    char *integers = (char *)x->packed;
    long first = 0, n = 0, tiles = 0, tasks = 0;
    for (long e = 0; e < x->m->num_here; first += counts[e++]) {
        if (!counts[e]) continue;
        const matrix *m = is_down ? &x->m->experts[e].down : &x->m->experts[e].gate_up;
        NAME(grouped_product) *p = products + n;
        *p = (NAME(grouped_product)){.m = m, .a = rows + first * m->num_inputs, .lda = m->num_inputs, .M = counts[e]};
        p->out = out ? out + first * m->num_outputs : 0, p->wide = wide ? wide + first * m->num_outputs : 0;
        NAME(tile_grouped)(p, integers);
        integers += grouped_scratch(m, p->M);
        x->tiles[n] = tiles, x->tasks[n++] = tasks;
        tiles += p->tiles, tasks += (m->num_outputs + NR - 1) / NR * p->bands;
    }
    x->num_products = n, x->tiles[n] = tiles, x->tasks[n] = tasks;
}

static void NAME(gather_rows)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    long D = x->m->hidden;
    for (long place = first; place < last; place++) memcpy(x->gathered + place * D, x->x + x->token[place] * D, D * sizeof(ELEM));
}

static void NAME(quantize_experts)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    NAME(grouped_product) *products = (void *)x->products;
    for (long n = find_product(x->tiles, first); first < last; n++) {
        long stop = last < x->tiles[n + 1] ? last : x->tiles[n + 1];
        NAME(quantize_tiles)(products + n, first - x->tiles[n], stop - x->tiles[n]);
        first = stop;
    }
}

static void NAME(multiply_grouped_experts)(void *context, long first, long last) {
    const NAME(mixing) *x = context;
    NAME(grouped_product) *products = (void *)x->products;
    for (long n = find_product(x->tasks, first); first < last; n++) {
        long stop = last < x->tasks[n + 1] ? last : x->tasks[n + 1];
        NAME(multiply_grouped)(products + n, first - x->tasks[n], stop - x->tasks[n]);
        first = stop;
    }
}

static void NAME(run_grouped)(NAME(mixing) *x, const long *counts, long rows) {
    long D = x->m->hidden, I = x->m->width;
    run_loop(NAME(gather_rows), x, rows, PARTS_FOR(rows * D));
    NAME(plan_grouped)(x, counts, x->gathered, x->gate_up, 0, 0);
    run_loop(NAME(quantize_experts), x, x->tiles[x->num_products], PARTS_FOR(rows * D));
    run_loop(NAME(multiply_grouped_experts), x, x->tasks[x->num_products], 8);
    run_loop(NAME(activate_experts), x, rows, PARTS_FOR(rows * I));
    NAME(plan_grouped)(x, counts, x->active, 0, x->down, 1);
    run_loop(NAME(quantize_experts), x, x->tiles[x->num_products], PARTS_FOR(rows * I));
    run_loop(NAME(multiply_grouped_experts), x, x->tasks[x->num_products], 8);
}
