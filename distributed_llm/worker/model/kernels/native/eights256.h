/* What eights.h says, with AVX2, FMA and F16C. */

typedef __m256 Eight;
typedef __m256 Mask8;

INLINE Eight zero8(void) { return _mm256_setzero_ps(); }
INLINE Eight same8(float value) { return _mm256_set1_ps(value); }
INLINE Eight load_floats8(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store_floats8(float *to, Eight values) { _mm256_storeu_ps(to, values); }

INLINE Eight add8(Eight a, Eight b) { return _mm256_add_ps(a, b); }
INLINE Eight subtract8(Eight a, Eight b) { return _mm256_sub_ps(a, b); }
INLINE Eight multiply8(Eight a, Eight b) { return _mm256_mul_ps(a, b); }
INLINE Eight divide8(Eight a, Eight b) { return _mm256_div_ps(a, b); }
INLINE Eight multiply_add8(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Eight minus_product8(Eight c, Eight a, Eight b) { return _mm256_fnmadd_ps(a, b, c); }
INLINE Eight lower8(Eight a, Eight b) { return _mm256_min_ps(a, b); }
INLINE Eight higher8(Eight a, Eight b) { return _mm256_max_ps(a, b); }
INLINE Mask8 more8(Eight a, Eight b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
INLINE Eight choose8(Mask8 mask, Eight a, Eight b) { return _mm256_blendv_ps(b, a, mask); }

INLINE Eight whole8(Eight values)
{
    return _mm256_round_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE Eight magnitude8(Eight values)
{
    return _mm256_and_ps(values, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}

INLINE Eight larger_bits8(Eight a, Eight b)
{
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

INLINE Eight flipped8(Eight values, uint32_t bits)
{
    return _mm256_xor_ps(values, _mm256_castsi256_ps(_mm256_set1_epi32((int)bits)));
}

INLINE Eight power_of_two8(Eight n)
{
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

INLINE Eight load8(const uint16_t *from)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

INLINE void load_pairs8(const uint16_t *from, Eight *even, Eight *odd)
{
    __m256i both = _mm256_loadu_si256((const __m256i *)from);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}

INLINE Eight load_halves8(const uint16_t *from)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

INLINE void store_halves8(uint16_t *to, Eight values)
{
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

INLINE Eight load_signed8(const uint8_t *from)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

INLINE Eight load_fp8(const uint8_t *from)
{
    __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)from));
    wide = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbfff)); /* one sign */
    return _mm256_cvtph_ps(wide);
}

INLINE Eight rounded8(Eight values)
{
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256 cut = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
    __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(cut, nan, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
}

INLINE void store8(uint16_t *to, Eight rounded)
{
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(rounded), 16);
    __m256i packed = _mm256_packus_epi32(high, high);
    packed = _mm256_permute4x64_epi64(packed, 0x88);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}

INLINE void store_codes8(uint8_t *to, Eight codes)
{
    __m256i wide = _mm256_cvttps_epi32(codes);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}

INLINE float sum8(Eight values)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE float largest8(Eight values)
{
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

INLINE void store_sums8(float *to, const Eight values[4])
{
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]),
                                  _mm256_hadd_ps(values[2], values[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

INLINE Eight sums_of_fours8(const Eight values[4])
{
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]),
                                 _mm256_hadd_ps(values[2], values[3]));
    return _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

INLINE void exchange8(const Eight rows[8], Eight columns[8])
{
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        columns[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        columns[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

INLINE unsigned begins_with8(const float *from, int distance, uint32_t wanted)
{
    __m256i eight = _mm256_loadu_si256((const __m256i *)from);
    __m256i same = _mm256_cmpeq_epi32(_mm256_srl_epi32(eight, _mm_cvtsi32_si128(distance)),
                                      _mm256_set1_epi32((int)wanted));
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(same));
}
