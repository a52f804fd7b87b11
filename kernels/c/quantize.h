/* Matrices to integers in groups, as kernels/quantize_integers.py describes it. Included once for each element type. */

#ifndef QUANTIZE_ONCE
#define QUANTIZE_ONCE
#define TRIALS 9
/* What the number of largest magnitude of a group of 4 bits is tried to become, before it is rounded to -8 to 7. */
static const float trials[TRIALS] = {-7.0f, -7.4f, -7.7f, -8.0f, -8.3f, -8.6f, -9.0f, -9.5f, -10.0f};
#define ROUNDS_AT 12582912.0f /* 1.5 * 2^23: added and taken away, it rounds to the nearest whole number */

INLINE vf clamp_vf(vf x, float low, float high) {
    x = max_vf(x, splat(low));
#if VL == 16
    return (vf)_mm512_min_ps((__m512)x, (__m512)splat(high));
#else
    return select_vf(x < high, x, splat(high));
#endif
}
/* The sum of each vector's lanes: transposed, a vector's lanes are added by one addition for all. */
INLINE void sum_each(const vf *vectors, float *sums) {
    vf columns[VL];
    for (int first = 0; first < TRIALS; first += VL) {
        int count = TRIALS - first < VL ? TRIALS - first : VL;
        for (int i = 0; i < VL; i++) columns[i] = i < count ? vectors[first + i] : splat(0);
        transpose(columns);
        for (int i = 1; i < VL; i++) columns[0] += columns[i];
        memcpy(sums + first, columns, count * sizeof *sums);
    }
}
INLINE float largest_number(vf x) {
#if VL == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float largest = x[0];
    for (int i = 1; i < VL; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}
INLINE float reciprocal(float x) { return x == 0 ? 0 : 1 / x; }
#endif

typedef struct {
    const ELEM *w;
    const float *read_scales;
    float *scales;
    uint8_t *codes;
    long K, group, bits;
} NAME(quantizing);

/* Elements [i, i + VL) of a group of `size`, zeros beyond it. */
INLINE vf NAME(load_some)(const ELEM *w, long i, long size) {
    ELEM part[VL] = {0};
    if (i + VL <= size) return NAME(load)(w + i);
    memcpy(part, w + i, (size - i) * sizeof *w);
    return NAME(load)(part);
}

/* The number of largest magnitude, with its sign. */
INLINE float NAME(extreme)(const ELEM *w, long size) {
    vf low = splat(0), high = splat(0);
    for (long i = 0; i < size; i += VL) {
        vf x = NAME(load_some)(w, i, size);
        low = max_vf(low, -x), high = max_vf(high, x);
    }
    float least = largest_number(low), most = largest_number(high);
    return least > most ? -least : most;
}

/* For each trial, the best scale of its codes q is sum(w q) / sum(q q), and lowers the squared error by sum(w q)^2 / sum(q q). */
static float NAME(best_scale)(const ELEM *w, long size) {
    float inverse_of_extreme = reciprocal(NAME(extreme)(w, size)), inverse[TRIALS], best = 0, scale = 0;
    vf dots[TRIALS], squares[TRIALS];
#pragma GCC unroll 9
    for (int t = 0; t < TRIALS; t++) {
        inverse[t] = trials[t] * inverse_of_extreme;
        dots[t] = squares[t] = splat(0);
    }
    for (long i = 0; i < size; i += VL) {
        vf x = NAME(load_some)(w, i, size);
#pragma GCC unroll 9
        for (int t = 0; t < TRIALS; t++) {
            vf step = clamp_vf(x * inverse[t] + ROUNDS_AT - ROUNDS_AT, -8, 7);
            dots[t] += x * step, squares[t] += step * step;
        }
    }
    float sums[2 * TRIALS];
    sum_each(dots, sums), sum_each(squares, sums + TRIALS);
    for (int t = 0; t < TRIALS; t++) {
        float dot = sums[t], square = sums[TRIALS + t], gain;
        square = square < 1 ? 1 : square;
        gain = dot * dot / square;
        if (gain > best) best = gain, scale = dot / square;
    }
    return scale;
}

static void NAME(choose_of_rows)(void *context, long first, long last) {
    const NAME(quantizing) *q = context;
    long groups = (q->K + q->group - 1) / q->group;
    for (long n = first; n < last; n++)
        for (long g = 0; g < groups; g++) {
            long begin = g * q->group, size = q->K - begin < q->group ? q->K - begin : q->group;
            const ELEM *w = q->w + n * q->K + begin;
            float largest = q->bits == 8 ? NAME(extreme)(w, size) : 0;
            q->scales[n * groups + g] = q->bits == 4 ? NAME(best_scale)(w, size) : (largest < 0 ? -largest : largest) * (1.0f / 127);
        }
}

/* From input k on; of 4 bits k is even. */
INLINE void NAME(place_codes)(vi code, uint8_t *codes, long k, long bits) {
    uint8_t bytes[VL];
#if VL == 16
    _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)code));
#else
    for (int j = 0; j < VL; j++) bytes[j] = (uint8_t)code[j];
#endif
    if (bits == 8)
        memcpy(codes + k, bytes, sizeof bytes);
    else
        for (int j = 0; j < VL / 2; j++) codes[k / 2 + j] = (uint8_t)(bytes[2 * j] | bytes[2 * j + 1] << 4);
}

static void NAME(round_of_rows)(void *context, long first, long last) {
    const NAME(quantizing) *q = context;
    long groups = (q->K + q->group - 1) / q->group, row_bytes = q->bits == 8 ? q->K : (q->K + 1) / 2;
    float low = q->bits == 8 ? -128 : -8, high = q->bits == 8 ? 127 : 7;
    for (long n = first; n < last; n++) {
        uint8_t *codes = q->codes + n * row_bytes;
        if (q->bits == 4) memset(codes, 0, row_bytes);
        for (long g = 0; g < groups; g++) {
            long begin = g * q->group, size = q->K - begin < q->group ? q->K - begin : q->group;
            float inverse = reciprocal(q->read_scales[n * groups + g]);
            for (long i = 0; i < size; i += VL) {
                vi code = __builtin_convertvector(clamp_vf(NAME(load_some)(q->w + n * q->K + begin, i, size) * inverse + ROUNDS_AT - ROUNDS_AT,
                                                           low, high) - low, vi);
                if (i + VL <= size && (q->bits == 8 || begin % 2 == 0)) {
                    NAME(place_codes)(code, codes, begin + i, q->bits);
                    continue;
                }
                for (long j = 0; j < VL && i + j < size; j++) {
                    long k = begin + i + j;
                    if (q->bits == 8)
                        codes[k] = (uint8_t)code[j];
                    else
                        codes[k / 2] |= (uint8_t)(code[j] << k % 2 * 4);
                }
            }
        }
    }
}

/* w: [N, K]; scales: [N, groups], of 4 bits those of the least squared error among the trials, of 8 bits those that make the largest
   magnitude 127. */
void NAME(choose_scales)(const ELEM *w, long N, long K, long group, long bits, float *scales) {
    NAME(quantizing) q = {.w = w, .scales = scales, .K = K, .group = group, .bits = bits};
    run_loop(NAME(choose_of_rows), &q, N, 4);
}

/* codes: [N, K], 128 for 0, or [N, (K + 1) / 2] of two each, 8 for 0. */
void NAME(round_weights)(const ELEM *w, const float *scales, long N, long K, long group, long bits, uint8_t *codes) {
    NAME(quantizing) q = {.w = w, .read_scales = scales, .codes = codes, .K = K, .group = group, .bits = bits};
    run_loop(NAME(round_of_rows), &q, N, 4);
}
