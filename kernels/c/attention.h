/* Attention over the paged cache, read in place, for single queries and for tiles of a prompt's queries.

   Keys are taken in runs of RUN, which start at multiples of RUN; a query's runs are joined in order. A score is one chain of additions in
   order of the head's cells, a run's weighted value and its sum of weights are chains in order of its keys, and keys that a query does not
   see add exact zeros. So a query's result depends neither on its batch, nor on how its prompt is cut into chunks, nor on the number of
   threads, nor on which of two forms computes it:

     few rows:   lanes of a vector are keys (transposed on the way), then elements of the head. For a lone query, at the memory's speed.
     many rows:  lanes are rows, the (query, query head of the group) pairs of a tile, transposed once; a key's cell is a scalar that
                 serves all of them, and a tile of sums stays in registers.

   A cell is what one multiply-add takes: a float, or a pair of bf16 where the CPU multiplies those; then weights are rounded to bf16, as
   the values are, and the keys of a run are taken in pairs. Included once for each element type. */

#include "attention_cells.h"
#include "attention_few.h"
#include "attention_rows.h"

#define MOST_FEW 8
#define MOST_FEW_ALONE 16 /* of a lone query, which waits for memory: the other form asks for nothing ahead */
#define MOST_ROW_GROUPS 4 /* of ROWS rows, that pass over a run one after the other */

/* A query head's elements; rows are numbered token * G + query head of the group. */
INLINE const ELEM *NAME(row_of)(const NAME(attention) *c, long row, long head) {
    return c->q + row / c->G * c->q_stride + (head * c->G + row % c->G) * c->H;
}

INLINE const float *NAME(sink_of)(const NAME(attention) *c, long head, long query) {
    return c->sinks ? c->sinks + head * c->G + query : 0;
}

static void NAME(copy_rows)(const NAME(attention) *c, long first, long head, long rows, NAME(cell) *q) {
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < c->H; h += CELL_SIZE * VL, q += VL)
            store_f32((float *)q, NAME(load_cells)(NAME(row_of)(c, first + r, head) + h));
}

/* q[cells][ROWS] of VL rows, the first `rows` of which exist; the others are zeros. */
static void NAME(spread_rows)(const NAME(attention) *c, long first, long head, long rows, NAME(cell) *q) {
    ELEM padded[CELL_SIZE * VL] = {0};
    for (long h = 0; h < c->H; h += CELL_SIZE * VL) {
        vf x[VL];
        long cells = (c->H - h) / CELL_SIZE < VL ? (c->H - h) / CELL_SIZE : VL;
        for (long r = 0; r < VL; r++) {
            const ELEM *from = r < rows ? NAME(row_of)(c, first + r, head) + h : padded;
            if (r < rows && cells < VL) from = memcpy(padded, from, cells * CELL_SIZE * sizeof(ELEM));
            x[r] = r < rows ? NAME(load_cells)(from) : splat(0);
        }
        transpose(x);
        for (long u = 0; u < cells; u++) store_f32((float *)q + (h / CELL_SIZE + u) * ROWS, x[u]);
    }
}

/* Keys that rows [begin, begin + rows) of a tile see, [low[r], high[r]); no keys for rows up to `room`. */
static void NAME(find_sight)(const NAME(attention) *c, const query_tile *tile, long begin, long rows, long room, int32_t *low,
                             int32_t *high) {
    for (long r = 0; r < room; r++) {
        long end = tile->start + (begin + r) / c->G + 1;
        high[r] = r < rows ? (int32_t)end : 0;
        low[r] = r < rows && c->window && end > c->window ? (int32_t)(end - c->window) : 0;
    }
}

/* A run of a lone query's rows, all of them few. */
static void NAME(attend_lone)(const NAME(attention) *c, const query_tile *tile, long head, long run_number, float *partial) {
    long H = c->H, G = c->G;
    int32_t low[MOST_FEW_ALONE], high[MOST_FEW_ALONE];
    NAME(cell) q[G * (H / CELL_SIZE)];
    ELEM wide[c->is_fp8 ? 2 * RUN * H : 1];
    NAME(run) run;
    NAME(find_sight)(c, tile, 0, G, G, low, high);
    NAME(copy_rows)(c, tile->row * G, head, G, q);
    if (c->is_fp8)
        NAME(widen_run)(c, c->blocks + tile->first_block, c->read_heads[head], run_number, low[0], high[0], wide, &run);
    else
        NAME(find_run)(c, c->blocks + tile->first_block, c->read_heads[head], run_number, low[0], high[0], &run);
    NAME(attend_few_rows)(q, &run, G, low, high, H, c->scores, partial + G * H, partial + G * H + G, partial);
}

/* Runs [first_run, last_run), joined, for rows [begin, begin + rows) of a tile, at most MOST_ROW_GROUPS * ROWS. */
static void NAME(attend_tile_rows)(const NAME(attention) *c, const query_tile *tile, long head, long begin, long rows, long first_run,
                                   long last_run, float *values, float *largest, float *total) {
    long H = c->H, cells = H / CELL_SIZE, room = UP_TO(rows, ROWS);
    int is_few = rows <= MOST_FEW && cells % VL == 0;
    int32_t low[MOST_ROW_GROUPS * ROWS], high[MOST_ROW_GROUPS * ROWS];
    float run_largest[ROWS], run_total[ROWS], old[ROWS], more[ROWS], run_values[ROWS * H];
    NAME(cell) q[room * cells], run_room[is_few ? 1 : ROOM * H + 1];
    ELEM wide[c->is_fp8 ? 2 * RUN * H : 1];
    NAME(find_sight)(c, tile, begin, rows, room, low, high);
    if (is_few) NAME(copy_rows)(c, tile->row * c->G + begin, head, rows, q);
    for (long r = 0; r < room && !is_few; r += VL)
        NAME(spread_rows)(c, tile->row * c->G + begin + r, head, rows - r, q + r / ROWS * ROWS * cells + r % ROWS);
    for (long i = first_run; i < last_run && i * RUN < high[rows - 1]; i++) {
        NAME(run) run;
        NAME(run_cells) run_cells;
        if ((i + 1) * RUN <= low[0]) continue;
        if (c->is_fp8)
            NAME(widen_run)(c, c->blocks + tile->first_block, c->read_heads[head], i, low[0], high[rows - 1], wide, &run);
        else
            NAME(find_run)(c, c->blocks + tile->first_block, c->read_heads[head], i, low[0], high[rows - 1], &run);
        if (!is_few) NAME(find_cells)(&run, H, run_room, &run_cells);
        for (long at = 0; at < rows; at += ROWS) {
            long here = rows - at < ROWS ? rows - at : ROWS;
            if (low[at] >= run.last || high[at + here - 1] <= run.first) continue;
            if (is_few)
                NAME(attend_few_rows)(q, &run, rows, low, high, H, c->scores, run_largest, run_total, run_values);
            else
                NAME(attend_row_group)(q + at * cells, &run_cells, &run, here, low + at, high + at, H, c->scores, run_largest, run_total,
                                   run_values);
            join_sums(largest + at, total + at, run_largest, run_total, c->scores.factor, old, more, UP_TO(here, VL));
            for (long r = 0; r < here; r++) join_values(values + (at + r) * H, run_values + r * H, old[r], more[r], H);
        }
    }
}

/* All that one task does. A tile's rows, joined, go to `out`; a lone query's run to `partial`: values[G][H], largest[G], total[G]. */
static void NAME(attend_tile)(const NAME(attention) *c, const query_tile *tile, long task) {
    enum { MOST = MOST_ROW_GROUPS * ROWS };
    long H = c->H, G = c->G, all = tile->num_queries * G, head = (task - tile->first_task) % c->R;
    long first = c->window && tile->start + 1 > c->window ? (tile->start + 1 - c->window) / RUN : 0, last = INT32_MAX / RUN;
    float *partial = tile->num_queries > 1 ? 0 : c->partial + task * G * (H + 2);
    if (partial) {
        first += (task - tile->first_task) / c->R;
        last = first + 1;
        if (G <= MOST_FEW_ALONE && H % (CELL_SIZE * VL) == 0) {
            NAME(attend_lone)(c, tile, head, first, partial);
            return;
        }
    }
    for (long begin = 0; begin < all; begin += MOST) {
        long rows = all - begin < MOST ? all - begin : MOST;
        float values[rows * H], largest[MOST], total[MOST] = {0};
        memset(values, 0, sizeof values);
        for (long r = 0; r < MOST; r++) largest[r] = -INFINITY;
        NAME(attend_tile_rows)(c, tile, head, begin, rows, first, last, values, largest, total);
        if (partial) {
            memcpy(partial + begin * H, values, sizeof values);
            memcpy(partial + G * H + begin, largest, rows * sizeof *largest);
            memcpy(partial + G * H + G + begin, total, rows * sizeof *total);
            continue;
        }
        for (long r = begin; r < begin + rows; r++) {
            ELEM *to = c->out + (((tile->row + r / G) * c->R + head) * G + r % G) * H;
            float divisor = divisor_of(total[r - begin], largest[r - begin], NAME(sink_of)(c, head, r % G), c->scores.factor);
            for (long h = 0; h < H; h += VL) NAME(store)(to + h, load_f32(values + (r - begin) * H + h) / divisor);
        }
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
    long H = c->H, G = c->G, R = c->R, lanes = UP_TO(G, VL);
    float values[G * H], sums[6][lanes];
    for (long i = first; i < last; i++) {
        const query_tile *tile = c->tiles + i / R;
        if (tile->num_queries > 1) continue;
        long num_runs = ((i / R + 1 < c->num_tiles ? tile[1].first_task : c->num_tasks) - tile->first_task) / R;
        memset(values, 0, sizeof values);
        memset(sums, 0, sizeof sums);
        for (long g = 0; g < lanes; g++) sums[0][g] = -INFINITY;
        for (long run = 0; run < num_runs; run++) {
            const float *part = c->partial + (tile->first_task + run * R + i % R) * G * (H + 2);
            memcpy(sums[2], part + G * H, G * sizeof *part);
            memcpy(sums[3], part + G * H + G, G * sizeof *part);
            join_sums(sums[0], sums[1], sums[2], sums[3], c->scores.factor, sums[4], sums[5], lanes);
            for (long g = 0; g < G; g++) join_values(values + g * H, part + g * H, sums[4][g], sums[5][g], H);
        }
        for (long g = 0; g < G; g++) {
            ELEM *to = c->out + ((tile->row * R + i % R) * G + g) * H;
            float divisor = divisor_of(sums[1][g], sums[0][g], NAME(sink_of)(c, i % R, g), c->scores.factor);
            for (long h = 0; h < H; h += VL) NAME(store)(to + h, load_f32(values + g * H + h) / divisor);
        }
    }
}

/* q: rows of q_stride elements, R heads of G queries each; read_heads[R] names the KV head that each reads. partial: room for
   plan->num_tasks * G * (H + 2). out: rows of R G H elements. cap: see scoring; 0: none. sinks[R G]: a score for each query head that
   takes part in its softmax without a key; or null. The cache's numbers are those of rows, or fp8. H % VL = 0. */
void NAME(attend)(const ELEM *q, long q_stride, const ELEM *cache, const window_plan *plan, const int64_t *read_heads, float *partial,
                  ELEM *out, long R, long G, long K, long P, long H, float scale, float cap, const float *sinks, long is_fp8) {
    scoring scores = cap != 0 ? (scoring){1.44269504f, cap, scale / cap} : (scoring){scale * 1.44269504f, 0, 0};
    NAME(attention)
    c = {q,     cache,         plan->tiles,     plan->blocks,    read_heads,   sinks, partial, out,
         q_stride, plan->num_tiles, plan->num_tasks, plan->window, R, G, K, P, H, is_fp8, scores};
    run_loop(NAME(attend_tasks), &c, plan->num_tasks, 16);
    run_loop(NAME(join_runs), &c, plan->num_tiles * R, PARTS_FOR(plan->num_tiles * R * G * H));
}
#undef CELL_SIZE
#undef ROOM
#undef ONES
