/* Numbers of KV caches in 8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa, no infinity), without a scale. */
#pragma once

typedef uint8_t vb __attribute__((vector_size(VL)));

/* VL numbers, exactly. */
INLINE vf widen_fp8(const uint8_t *p) {
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
#if VL == 16
    vu code = (vu)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
    vu code = __builtin_convertvector(bytes, vu);
#endif
    vu size = code & 0x7f;
    vf small = __builtin_convertvector((vi)size, vf) * 0x1p-9f, x = select_vf((vi)(size < 8), small, (vf)((size << 20) + (120u << 23)));
    x = select_vf((vi)(size == 0x7f), splat(NAN), x);
    return (vf)((vu)x | (code & 0x80) << 24);
}

#if VL == 16 && defined(__AVX512BW__)
/* 32 numbers, exactly: the eight smallest sizes, which have no leading one, come from a table. */
INLINE void widen_fp8_to_bf16(const uint8_t *p, bf16 *out) {
    const __m512i few = _mm512_zextsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)), size = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    __m512i x = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
    x = _mm512_mask_permutexvar_epi16(x, _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8)), size, few);
    x = _mm512_mask_mov_epi16(x, _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
    _mm512_storeu_si512(out, _mm512_or_si512(x, _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8)));
}
#endif

/* To the nearest, ties to even; what is beyond 448, the largest, becomes that. */
INLINE void narrow_fp8(uint8_t *p, vf x) {
    vu sign = (vu)x >> 24 & 0x80;
    vf size = (vf)((vu)x & 0x7fffffff);
    size = select_vf(size > 448.0f, splat(448.0f), size);
    vi small = (vi)(size * 512.0f + 12582912.0f) - 0x4b400000; /* 1.5 * 2^23: rounds to the nearest whole number */
    vi large = (vi)(((vu)size + 0x7ffff + ((vu)size >> 20 & 1)) >> 20) - (120 << 3);
    vi is_small = size < 0x1p-6f, is_nan = x != x;
    vi code = (is_small & small) | (~is_small & large);
    code = (is_nan & 0x7f) | (~is_nan & code) | (vi)sign;
#if VL == 16
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)code));
#else
    vb bytes = __builtin_convertvector(code, vb);
    memcpy(p, &bytes, sizeof bytes);
#endif
}
