/* Tokens from logits [R, V] in float32: the largest, or drawn by the rule of kernels/sample/rule.py. Rows are independent. */

#define NO_PLACE -1     /* the row holds NaN or plus infinity */
#define NOTHING_LEFT -2 /* minus infinity in every place */

INLINE int any_of(vi mask) {
#if VL == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int64_t parts[VL / 2], any = 0;
    memcpy(parts, &mask, sizeof mask);
    for (int i = 0; i < VL / 2; i++) any |= parts[i];
    return any != 0;
#endif
}

#define CHOICE_CHUNK 2048 /* numbers whose largest is known before the next ones are looked at: the search for its place is short */

/* The largest of x[n]; NaN are passed over, and spoil *zero, as infinities do. */
INLINE float largest_of(const float *x, long n, float *zero) {
    vf most[4], zeros[4];
    float largest = -INFINITY;
    long v = 0;
    for (int i = 0; i < 4; i++) most[i] = splat(-INFINITY), zeros[i] = splat(0);
    for (; v + 4 * VL <= n; v += 4 * VL)
        for (int i = 0; i < 4; i++) {
            vf x4 = load_f32(x + v + i * VL);
            most[i] = max_vf(x4, most[i]);
            zeros[i] += x4 * 0.0f;
        }
    for (; v < n; v++) {
        largest = x[v] > largest ? x[v] : largest;
        *zero += x[v] * 0.0f;
    }
    vf all = max_vf(max_vf(most[0], most[1]), max_vf(most[2], most[3]));
    vf none = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
    for (int i = 0; i < VL; i++) {
        largest = all[i] > largest ? all[i] : largest;
        *zero += none[i];
    }
    return largest;
}

static int has_nan(const float *x, long n) {
    long v = 0;
    for (; v + 4 * VL <= n; v += 4 * VL) {
        vi wrong = (vi){0};
        for (int i = 0; i < 4; i++) {
            vf x4 = load_f32(x + v + i * VL);
            wrong |= x4 != x4;
        }
        if (any_of(wrong)) return 1;
    }
    for (; v < n; v++)
        if (x[v] != x[v]) return 1;
    return 0;
}

/* The first place of the largest of x[V], or one of the negative codes. */
static long best_place(const float *x, long V) {
    float largest = -INFINITY, zero = 0;
    long start = 0;
    for (long v = 0; v < V; v += CHOICE_CHUNK) {
        float most = largest_of(x + v, V - v < CHOICE_CHUNK ? V - v : CHOICE_CHUNK, &zero);
        if (most > largest) largest = most, start = v;
    }
    if (zero != zero && has_nan(x, V)) return NO_PLACE;
    if (isinf(largest)) return largest > 0 ? NO_PLACE : NOTHING_LEFT;
    while (x[start] != largest) start++;
    return start;
}

typedef struct {
    const float *x;
    int64_t *out;
    long V;
} choice;

static void choose_rows(void *context, long first, long last) {
    const choice *c = context;
    for (long r = first; r < last; r++) c->out[r] = best_place(c->x + r * c->V, c->V);
}

void argmax_f32(const float *x, int64_t *out, long R, long V) {
    choice c = {x, out, V};
    run_loop(choose_rows, &c, R, PARTS_FOR(R * V));
}

/* ---- rows that keep the tokens of a mask alone */

typedef struct {
    float *x;
    const int32_t *masks, *rows;
    long V;
} masked;

/* x[n], n <= 32, keeps the numbers whose bits are set. */
INLINE void keep_bits(float *x, uint32_t bits, long n) {
    if (bits == UINT32_MAX) return;
    for (long i = 0; i < n; i++) x[i] = (bits >> i) & 1 ? x[i] : -INFINITY;
}

static void mask_rows(void *context, long first, long last) {
    const masked *m = context;
    long words = (m->V + 31) / 32, whole = m->V / 32;
    for (long n = first; n < last; n++) {
        float *x = m->x + m->rows[n] * m->V;
        const uint32_t *bits = (const uint32_t *)m->masks + n * words;
        for (long w = 0; w < whole; w++) keep_bits(x + 32 * w, bits[w], 32);
        if (whole < words) keep_bits(x + 32 * whole, bits[whole], m->V - 32 * whole);
    }
}

void mask_tokens_f32(float *x, const int32_t *masks, const int32_t *rows, long N, long V) {
    masked m = {x, masks, rows, V};
    run_loop(mask_rows, &m, N, PARTS_FOR(N * V));
}

/* ---- random rows */

#define KEYS_PER_UNIT 131072.0f
#define MASS_OF_LARGEST 33554432.0f
#define BIN_BITS 11
#define BINS (1 << BIN_BITS)
#define LAST_KEY (BINS * BINS - 1)
#define MASS_BITS 44 /* of a bin; the bits above them count tokens */
#define MASS_MASK (((uint64_t)1 << MASS_BITS) - 1)
#define TOKEN_FACTOR 0x9E3779B1u
#define LN_2 0.69314718f

static uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

INLINE vu mix32(vu h, uint32_t key) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13) ^ key) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

static float gumbel(float w) { return (float)-log(-log1p(-(double)w)); }

typedef struct {
    const float *x;
    long V;
    float temperature, largest;
    int limit; /* the largest key that is kept */
} random_row;

/* z = (largest - x) / temperature, and its key. */
INLINE vi key_of(const random_row *row, vf x, vf *z) {
    vf units = (row->largest - x) / row->temperature;
    units = select_vf(units == units, units, splat(0));
    *z = units;
    vf key = units * KEYS_PER_UNIT;
    return __builtin_convertvector(select_vf(key < (float)LAST_KEY, key, splat((float)LAST_KEY)), vi);
}

/* Adds the tokens that are kept to bins of count and mass: to coarse bins, or, where `coarse` >= 0, to the fine bins of that one. */
static void count_tokens(const random_row *row, int coarse, uint64_t *bins) {
    memset(bins, 0, BINS * sizeof *bins);
    for (long v = 0; v < row->V; v += VL) {
        vf x = splat(-INFINITY), z;
        long n = row->V - v < VL ? row->V - v : VL;
        if (n == VL)
            x = load_f32(row->x + v);
        else
            memcpy(&x, row->x + v, n * sizeof(float));
        vi key = key_of(row, x, &z), kept = key <= row->limit;
        if (coarse >= 0) kept &= key >> BIN_BITS == coarse;
        if (!any_of(kept)) continue;
        vi mass = __builtin_convertvector(exp_vf(-z) * MASS_OF_LARGEST + 0.5f, vi) & kept;
        vi place = (coarse >= 0 ? key & (BINS - 1) : key >> BIN_BITS);
        for (long i = 0; i < n; i++) bins[place[i]] += ((uint64_t)(kept[i] & 1) << MASS_BITS) + (uint32_t)mass[i];
    }
}

typedef struct {
    int bin;
    long count_before;
    uint64_t mass_before;
} found_bin;

/* The first bin with which k tokens are reached; the last, if they never are. */
static found_bin bin_of_count(const uint64_t *bins, long k, found_bin before) {
    for (before.bin = 0; before.bin < BINS - 1; before.bin++) {
        long count = bins[before.bin] >> MASS_BITS;
        if (before.count_before + count >= k) break;
        before.count_before += count;
        before.mass_before += bins[before.bin] & MASS_MASK;
    }
    return before;
}

/* The last bin before which the mass is less than the target. */
static found_bin bin_of_mass(const uint64_t *bins, double target, found_bin before) {
    for (before.bin = 0; before.bin < BINS - 1; before.bin++) {
        uint64_t mass = bins[before.bin] & MASS_MASK;
        if ((double)(before.mass_before + mass) >= target) break;
        before.mass_before += mass;
    }
    return before;
}

/* The largest key that min-p, top-k and top-p keep. */
static int limit_of(random_row row, long top_k, float top_p, float min_p) {
    if (min_p > 0) row.limit = (int)fminf(-logf(min_p) * KEYS_PER_UNIT, LAST_KEY);
    if (top_k <= 0 && !(top_p < 1)) return row.limit;
    uint64_t coarse[BINS], fine[BINS], total = 0;
    int limit = row.limit;
    count_tokens(&row, -1, coarse);
    for (int i = 0; i < BINS; i++) total += coarse[i] & MASS_MASK;
    if (top_k > 0) {
        found_bin k = bin_of_count(coarse, top_k, (found_bin){0});
        count_tokens(&row, k.bin, fine);
        found_bin fine_k = bin_of_count(fine, top_k, k);
        int key = k.bin * BINS + fine_k.bin;
        limit = key < limit ? key : limit;
        total = fine_k.mass_before + (fine[fine_k.bin] & MASS_MASK);
    }
    if (top_p < 1) {
        double target = (double)top_p * (double)total;
        found_bin p = bin_of_mass(coarse, target, (found_bin){0});
        count_tokens(&row, p.bin, fine);
        int key = p.bin * BINS + bin_of_mass(fine, target, p).bin;
        limit = key < limit ? key : limit;
    }
    return limit;
}

/* The token of the largest x + temperature * g. A cheap bound of g, at most 0.07 above it for the large ones, spares nearly all logarithms:
   log2 of a number is at least what its bits say as a whole number. `best` is any token that is kept. */
static long draw_token(const random_row *row, uint64_t hash, long best) {
    const uint32_t low = (uint32_t)hash, high = (uint32_t)(hash >> 32);
    const float T = row->temperature;
    const int is_limited = row->limit < LAST_KEY;
    float most = -INFINITY;
    vu mixed = (vu){0} + low;
    for (int i = 0; i < VL; i++) mixed[i] += (uint32_t)i * TOKEN_FACTOR;
    const vu first = mixed;
    for (long at = -1; at < (row->V + VL - 1) / VL; at++) { /* first, the lanes where `best` is */
        long v = at < 0 ? best / VL * VL : at * VL, n = row->V - v < VL ? row->V - v : VL;
        vf x = splat(-INFINITY), z;
        if (n == VL)
            x = load_f32(row->x + v);
        else
            memcpy(&x, row->x + v, n * sizeof(float));
        if (is_limited) {
            vi kept = key_of(row, x, &z) <= row->limit;
            if (!any_of(kept)) continue;
            x = select_vf(kept, x, splat(-INFINITY));
        }
        vu h = mix32(first + (uint32_t)v * TOKEN_FACTOR, high);
        vf w = (__builtin_convertvector(h, vf) + 0.5f) * 0x1p-32f;
        w = select_vf(w < 1 - 0x1p-24f, w, splat(1 - 0x1p-24f));
        vf bound = 127 * LN_2 + 0.01f - __builtin_convertvector((vi)w, vf) * (LN_2 * 0x1p-23f);
        vi maybe = x + T * bound >= most;
        if (!any_of(maybe)) continue;
        for (long i = 0; i < n; i++) {
            float score = maybe[i] ? x[i] + T * gumbel(w[i]) : -INFINITY;
            if (score > most || (score == most && v + i < best)) most = score, best = v + i;
        }
    }
    return best;
}

typedef struct {
    const float *x, *temperature, *top_p, *min_p;
    const int32_t *top_k, *position;
    const int64_t *seed;
    int64_t *out;
    long V;
} sampling;

static void sample_rows(void *context, long first, long last) {
    const sampling *s = context;
    for (long r = first; r < last; r++) {
        random_row row = {s->x + r * s->V, s->V, s->temperature[r], 0, LAST_KEY};
        long best = best_place(row.x, row.V);
        if (best >= 0 && row.temperature > 0) {
            uint64_t hash = mix64((uint64_t)s->seed[r] * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u);
            hash = mix64(hash + ((uint64_t)s->position[r] + 1) * 0x9E3779B97F4A7C15u);
            row.largest = row.x[best];
            row.limit = limit_of(row, s->top_k[r] < s->V ? s->top_k[r] : 0, s->top_p[r], s->min_p[r]);
            best = draw_token(&row, hash, best);
        }
        s->out[r] = best;
    }
}

/* A token for each row of x[R, V]; the arrays have a number per row, as `SamplingParameters` has them. */
void sample_f32(const float *x, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p,
                const int64_t *seed, const int32_t *position, int64_t *out, long R, long V) {
    sampling s = {x, temperature, top_p, min_p, top_k, position, seed, out, V};
    run_loop(sample_rows, &s, R, PARTS_FOR(R * V));
}
