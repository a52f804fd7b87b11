/* What products with grouped weights (grouped.h) do to rows: quantize them, and store results. Included once for each element type, after
   linear.h. */

/* One block of a row, `count` of whose elements exist, to its integers, of which every four are `stride` words of four bytes apart, and its
   factors. */
INLINE void NAME(quantize_block)(const matrix *m, const ELEM *a, long count, int32_t *integers, long stride, block_factors *factors) {
    ELEM filled[MOST_BLOCK];
    if (count < m->block) {
        memset(filled, 0, sizeof filled);
        memcpy(filled, a, count * sizeof *a);
        a = filled;
    }
    vf x[MOST_BLOCK / VL];
    vi most = {0}, total = {0};
    for (long i = 0; i < m->block / VL; i++) {
        x[i] = NAME(load)(a + i * VL);
        most = max_vi(most, (vi)x[i] & 0x7fffffff);
    }
    int32_t bits = largest_lane(most);
    float largest, whole = m->row_bytes == 2 ? 32512 : 127; /* 127 * 256 */
    memcpy(&largest, &bits, sizeof bits);
    float inverse = largest < 1e-30f ? 0 : whole / largest, scale = largest < 1e-30f ? 0 : largest / whole;
    if (bits >= 0x7f800000) scale = NAN; /* the block has a NaN or an infinity */
    for (long i = 0; i < m->block / VL; i++) {
        vi number = (vi)(x[i] * inverse + 12582912.0f) - 0x4b400000; /* 1.5 * 2^23: rounds to the nearest whole number */
        total += number;
        m->row_bytes == 2 ? place_halves(number, integers, stride) : place_bytes(number, integers, stride);
        integers += VL / 4 * stride;
    }
    int32_t sum = sum_lanes(total);
    *factors = (block_factors){scale, -(int32_t)m->zero * sum, scale * (float)sum};
}

typedef struct {
    const matrix *m;
    const ELEM *a;
    ELEM *out;
    float *wide;
    int32_t *integers;
    block_factors *factors;
    long lda, M, tiles, tiles_a_band, bands;
} NAME(grouped_product);

static void NAME(quantize_tiles)(void *context, long first_tile, long last_tile) {
    const NAME(grouped_product) *p = context;
    const matrix *m = p->m;
    long blocks = grouped_blocks(m), words = m->block / 4 * m->row_bytes;
    for (long i = first_tile; i < last_tile; i++) {
        long first = tile_start(p->M, p->tiles, i), rows = tile_start(p->M, p->tiles, i + 1) - first;
        for (long b = 0; b < blocks; b++)
            for (long r = 0; r < rows; r++) {
                long k = b * m->block, count = m->num_inputs - k < m->block ? m->num_inputs - k : m->block;
                int32_t *integers = p->integers + first * blocks * words + b * words * rows + r * m->row_bytes;
                block_factors *factors = p->factors + first * blocks + b * rows + r;
                NAME(quantize_block)(m, p->a + (first + r) * p->lda + k, count, integers, rows * m->row_bytes, factors);
            }
    }
}

/* Tasks go band by band, as in linear.h. */
static void NAME(multiply_grouped)(void *context, long first_task, long last_task) {
    const NAME(grouped_product) *p = context;
    const matrix *m = p->m;
    long N = m->num_outputs, panels = (N + NR - 1) / NR, blocks = grouped_blocks(m), words = m->block / 4 * m->row_bytes;
    float sums[TILE_OF_ROWS * NR];
    for (long task = first_task; task < last_task; task++) {
        long band = task / panels, panel = task % panels;
        const uint8_t *w = (const uint8_t *)m->packed + panel * panel_bytes(m);
        const ELEM *bias = m->bias ? (const ELEM *)m->bias + panel * NR : 0;
        long last = (band + 1) * p->tiles_a_band < p->tiles ? (band + 1) * p->tiles_a_band : p->tiles;
        for (long i = band * p->tiles_a_band; i < last; i++) {
            long first = tile_start(p->M, p->tiles, i), rows = tile_start(p->M, p->tiles, i + 1) - first, place = first * N + panel * NR;
            const char *next = p->tiles > 1 && i + 1 == last && (panel + 1) * NR < N ? (const char *)w + panel_bytes(m) : 0;
            any_grouped_tile(rows, m, p->integers + first * blocks * words, p->factors + first * blocks, w, next, sums);
            if (p->wide)
                NAME(store_wide)(sums, rows, p->wide + place, N, bias, N - panel * NR);
            else
                NAME(store_tile)(sums, rows, p->out + place, N, bias, N - panel * NR);
        }
    }
}

/* How the rows are divided, and where they go: m and M are set. scratch: grouped_scratch bytes. */
INLINE void NAME(tile_grouped)(NAME(grouped_product) *p, void *scratch) {
    const matrix *m = p->m;
    long blocks = grouped_blocks(m);
    p->tiles = (p->M + TILE_OF_ROWS - 1) / TILE_OF_ROWS;
    p->tiles_a_band = BAND_BYTES / (TILE_OF_ROWS * blocks * m->block * m->row_bytes) + 1;
    p->bands = (p->tiles + p->tiles_a_band - 1) / p->tiles_a_band;
    p->integers = scratch;
    p->factors = (block_factors *)(p->integers + p->M * blocks * m->block / 4 * m->row_bytes);
}

/* out[M, N] = a[M, K] w^T + bias, or to `wide`, if there. scratch: grouped_scratch bytes. */
void NAME(grouped_linear)(const matrix *m, const ELEM *a, long lda, ELEM *out, float *wide, void *scratch, long M) {
    if (M == 0) return;
    NAME(grouped_product) p = {.m = m, .a = a, .out = out, .wide = wide, .lda = lda, .M = M};
    NAME(tile_grouped)(&p, scratch);
    if (M * m->num_inputs < ENOUGH_FOR_THREADS)
        NAME(quantize_tiles)(&p, 0, p.tiles);
    else
        run_loop(NAME(quantize_tiles), &p, p.tiles, 4);
    run_loop(NAME(multiply_grouped), &p, (m->num_outputs + NR - 1) / NR * p.bands, 8);
}
