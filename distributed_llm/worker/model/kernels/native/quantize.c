/* Integers made of floating-point weights: what quantized/quantize.py computes, to the last bit, in one
 * pass over weights that stay in the caches. Only sums of numbers that are not whole depend on their order;
 * it is that of torch's sums along rows. */
#include "instructions.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
INSTRUCTIONS("avx2,fma,f16c")
#include "eights.h"

#define MOST_GROUP 128
#define SMALLEST 1e-30f /* scale */
#define SIDE 8

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* What the threads of one call share. Rows are channels, or groups. */
typedef struct Work {
    const void *values;
    uint8_t *codes;
    float *scales, *offsets;
    int64_t rows, columns, step;
    int dtype;
    void (*quantize)(const struct Work *, int64_t first, int64_t last);
    atomic_llong next;
} Work;

INLINE int64_t bytes_of_row(const Work *w) { return w->columns * (w->dtype == FLOAT32 ? 4 : 2); }

INLINE const void *row_of(const Work *w, int64_t row)
{
    return (const char *)w->values + row * bytes_of_row(w);
}

INLINE __m256 values8(const void *row, int dtype, int64_t at)
{
    if (dtype == BFLOAT16)
        return load8((const uint16_t *)row + at);
    if (dtype == FLOAT16)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + at)));
    return _mm256_loadu_ps((const float *)row + at);
}

/* The last ones of a row, and zeros. */
INLINE __m256 last_values(const void *row, int dtype, int64_t at, int64_t columns)
{
    char padded[SIDE * 4] = {0};
    int64_t size = dtype == FLOAT32 ? 4 : 2;
    memcpy(padded, (const char *)row + at * size, (size_t)((columns - at) * size));
    return values8(padded, dtype, 0);
}

/* Whole numbers from 0 to 255 as bytes. */
INLINE void store_codes(uint8_t *to, __m256 codes)
{
    __m256i wide = _mm256_cvttps_epi32(codes);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}

INLINE __m256 whole8(__m256 values)
{
    return _mm256_round_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE __m256 magnitude8(__m256 values)
{
    return _mm256_and_ps(values, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}

INLINE __m256 codes_of_8_bits(__m256 values, __m256 scale)
{
    return _mm256_add_ps(whole8(_mm256_div_ps(values, scale)), _mm256_set1_ps(128.0f));
}

/* Codes of a channel, symmetric about 0. A NaN makes the scale NaN, and an infinity makes it infinite. */
INLINE void fit_channel(const void *row, const int dtype, int64_t columns, uint8_t *codes, float *scale)
{
    int64_t whole = columns / SIDE * SIDE;
    __m256i largest = _mm256_setzero_si256(); /* magnitudes are in the order of their bits */
    for (int64_t i = 0; i < whole; i += SIDE)
        largest = _mm256_max_epu32(
            largest, _mm256_castps_si256(magnitude8(values8(row, dtype, i))));
    if (whole < columns)
        largest = _mm256_max_epu32(
            largest, _mm256_castps_si256(magnitude8(last_values(row, dtype, whole, columns))));
    uint32_t each[SIDE], most = 0;
    _mm256_storeu_si256((__m256i *)each, largest);
    for (int i = 0; i < SIDE; i++)
        most = each[i] > most ? each[i] : most;
    memcpy(scale, &most, sizeof most);
    *scale /= 127.0f;
    if (*scale < SMALLEST)
        *scale = SMALLEST;
    __m256 scales = _mm256_set1_ps(*scale);
    for (int64_t i = 0; i < whole; i += SIDE)
        store_codes(codes + i, codes_of_8_bits(values8(row, dtype, i), scales));
    if (whole < columns) {
        uint8_t last[SIDE];
        store_codes(last, codes_of_8_bits(last_values(row, dtype, whole, columns), scales));
        memcpy(codes + whole, last, (size_t)(columns - whole));
    }
}

INLINE __m256 codes_of_4_bits(__m256 weights, __m256 inverse, __m256 shift)
{
    __m256 codes = whole8(_mm256_sub_ps(_mm256_mul_ps(weights, inverse), shift));
    codes = _mm256_max_ps(codes, _mm256_setzero_ps()); /* of a NaN and another, the second is taken */
    return _mm256_min_ps(codes, _mm256_set1_ps(15.0f));
}

/* The sum of each register's lanes, from the first to the last. */
INLINE __m256 sums_in_order(const __m256 rows[SIDE])
{
    __m256 columns[SIDE], sum = _mm256_setzero_ps();
    exchange8(rows, columns);
    for (int i = 0; i < SIDE; i++)
        sum = _mm256_add_ps(sum, columns[i]);
    return sum;
}

INLINE __m256 joined(const __m256 sums[4])
{
    return _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), sums[2]), sums[3]);
}

/* Eight groups: [8] or, of weights, [8][group] in memory. */
typedef struct {
    __m256 scale, offset, gain;
} Fit;

/* Rounds, then fits scale and offset to the codes. */
INLINE Fit least_squares(const float *weights, const int group, __m256 total, __m256 middle, __m256 scale)
{
    __m256 offset = _mm256_sub_ps(middle, _mm256_mul_ps(_mm256_set1_ps(7.5f), scale));
    __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1.0f), scale);
    __m256 products[SIDE], linears[SIDE], squares[SIDE];
    float inverses[SIDE], shifts[SIDE];
    _mm256_storeu_ps(inverses, inverse);
    _mm256_storeu_ps(shifts, _mm256_mul_ps(offset, inverse));
    for (int g = 0; g < SIDE; g++) {
        __m256 own_inverse = _mm256_set1_ps(inverses[g]), shift = _mm256_set1_ps(shifts[g]), sums[4];
        linears[g] = squares[g] = _mm256_setzero_ps();
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_setzero_ps();
        for (int i = 0; i < group; i += 4 * SIDE)
            for (int k = 0; k < 4; k++) {
                __m256 own = _mm256_loadu_ps(weights + g * group + i + k * SIDE);
                __m256 codes = codes_of_4_bits(own, own_inverse, shift);
                sums[k] = _mm256_add_ps(sums[k], _mm256_mul_ps(codes, own));
                linears[g] = _mm256_add_ps(linears[g], codes);
                squares[g] = _mm256_fmadd_ps(codes, codes, squares[g]);
            }
        products[g] = joined(sums);
    }
    __m256 product = sums_in_order(products), linear = sums_in_order(linears);
    __m256 square = sums_in_order(squares), count = _mm256_set1_ps((float)group);
    __m256 spread = _mm256_sub_ps(_mm256_mul_ps(count, square), _mm256_mul_ps(linear, linear));
    __m256 fitted = _mm256_div_ps(
        _mm256_sub_ps(_mm256_mul_ps(count, product), _mm256_mul_ps(linear, total)), spread);
    __m256 fits = _mm256_cmp_ps(spread, _mm256_setzero_ps(), _CMP_GT_OQ);
    scale = _mm256_blendv_ps(scale, fitted, fits); /* with one code for all, any scale fits */
    offset = _mm256_div_ps(_mm256_sub_ps(total, _mm256_mul_ps(scale, linear)), count);
    __m256 gain = _mm256_add_ps(_mm256_mul_ps(scale, product), _mm256_mul_ps(offset, total));
    return (Fit){scale, offset, gain};
}

/* Codes of eight groups. A number that is not finite makes its group's offset not finite. */
INLINE void fit_groups(const void *row, const int dtype, const int group, uint8_t *codes, float *scales,
                       float *offsets)
{
    float weights[SIDE * MOST_GROUP], inverses[SIDE], shifts[SIDE];
    __m256 least[SIDE], most[SIDE], totals[SIDE], columns[SIDE];
    for (int g = 0; g < SIDE; g++) {
        __m256 sums[4];
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_setzero_ps();
        least[g] = most[g] = values8(row, dtype, g * group);
        for (int i = 0; i < group; i += 4 * SIDE)
            for (int k = 0; k < 4; k++) {
                int at = g * group + i + k * SIDE;
                __m256 own = values8(row, dtype, at);
                _mm256_storeu_ps(weights + at, own);
                least[g] = _mm256_min_ps(least[g], own);
                most[g] = _mm256_max_ps(most[g], own);
                sums[k] = _mm256_add_ps(sums[k], own);
            }
        totals[g] = joined(sums);
    }
    __m256 total = sums_in_order(totals);
    exchange8(least, columns);
    __m256 lowest = columns[0];
    for (int i = 1; i < SIDE; i++)
        lowest = _mm256_min_ps(lowest, columns[i]);
    exchange8(most, columns);
    __m256 highest = columns[0];
    for (int i = 1; i < SIDE; i++)
        highest = _mm256_max_ps(highest, columns[i]);
    __m256 middle = _mm256_mul_ps(_mm256_add_ps(lowest, highest), _mm256_set1_ps(0.5f));
    __m256 width = _mm256_div_ps(_mm256_sub_ps(highest, lowest), _mm256_set1_ps(15.0f));
    __m256 narrow = _mm256_mul_ps(width, _mm256_set1_ps(0.9f)), smallest = _mm256_set1_ps(SMALLEST);
    Fit best = least_squares(weights, group, total, middle, _mm256_max_ps(width, smallest));
    Fit other = least_squares(weights, group, total, middle, _mm256_max_ps(narrow, smallest));
    __m256 won = _mm256_cmp_ps(other.gain, best.gain, _CMP_GT_OQ);
    /* as kernels keep them */
    __m256 scale = rounded8(_mm256_blendv_ps(best.scale, other.scale, won));
    __m256 offset = _mm256_blendv_ps(best.offset, other.offset, won);
    __m256 eight = _mm256_mul_ps(scale, _mm256_set1_ps(8.0f));
    offset = _mm256_sub_ps(rounded8(_mm256_add_ps(offset, eight)), eight);
    __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1.0f), scale);
    _mm256_storeu_ps(scales, scale);
    _mm256_storeu_ps(offsets, offset);
    _mm256_storeu_ps(inverses, inverse);
    _mm256_storeu_ps(shifts, _mm256_mul_ps(offset, inverse));
    for (int g = 0; g < SIDE; g++) {
        __m256 own_inverse = _mm256_set1_ps(inverses[g]), shift = _mm256_set1_ps(shifts[g]);
        for (int at = g * group; at < (g + 1) * group; at += SIDE)
            store_codes(codes + at,
                        codes_of_4_bits(_mm256_loadu_ps(weights + at), own_inverse, shift));
    }
}

static void quantize_channels(const Work *w, int64_t first, int64_t last)
{
    for (int64_t row = first; row < last; row++) {
        const void *values = row_of(w, row);
        uint8_t *codes = w->codes + row * w->columns;
        if (w->dtype == BFLOAT16)
            fit_channel(values, BFLOAT16, w->columns, codes, w->scales + row);
        else if (w->dtype == FLOAT16)
            fit_channel(values, FLOAT16, w->columns, codes, w->scales + row);
        else
            fit_channel(values, FLOAT32, w->columns, codes, w->scales + row);
    }
}

static void quantize_eight(const void *values, int dtype, int group, uint8_t *codes, float *scales,
                           float *offsets)
{
    if (dtype == BFLOAT16)
        fit_groups(values, BFLOAT16, group, codes, scales, offsets);
    else if (dtype == FLOAT16)
        fit_groups(values, FLOAT16, group, codes, scales, offsets);
    else
        fit_groups(values, FLOAT32, group, codes, scales, offsets);
}

static void quantize_groups(const Work *w, int64_t first, int64_t last)
{
    int group = (int)w->columns;
    int64_t whole = first + (last - first) / SIDE * SIDE, rest = last - whole;
    for (int64_t row = first; row < whole; row += SIDE)
        quantize_eight(row_of(w, row), w->dtype, group, w->codes + row * group, w->scales + row,
                       w->offsets + row);
    if (!rest)
        return;
    char values[SIDE * MOST_GROUP * sizeof(float)] = {0};
    uint8_t codes[SIDE * MOST_GROUP];
    float scales[SIDE], offsets[SIDE];
    memcpy(values, row_of(w, whole), (size_t)(rest * bytes_of_row(w)));
    quantize_eight(values, w->dtype, group, codes, scales, offsets);
    memcpy(w->codes + whole * group, codes, (size_t)(rest * group));
    memcpy(w->scales + whole, scales, (size_t)rest * sizeof *scales);
    memcpy(w->offsets + whole, offsets, (size_t)rest * sizeof *offsets);
}

static void quantize_some(void *data)
{
    Work *w = data;
    for (;;) {
        int64_t first = atomic_fetch_add_explicit(&w->next, w->step, memory_order_relaxed);
        if (first >= w->rows)
            return;
        w->quantize(w, first, first + w->step < w->rows ? first + w->step : w->rows);
    }
}

#define WEIGHTS_AT_A_TIME 65536

static void quantize_all(Work w, int threads)
{
    w.step = (WEIGHTS_AT_A_TIME / w.columns / SIDE + 1) * SIDE;
    in_threads(quantize_some, &w, threads);
}

/* Codes of 8 bits [rows, columns], and a scale for each row; offsets are left as they are. */
EXPORT void quantize_int8(const void *values, int dtype, int64_t rows, int64_t columns, uint8_t *codes,
                          float *scales, float *offsets, int threads)
{
    quantize_all((Work){.values = values, .dtype = dtype, .rows = rows, .columns = columns, .codes = codes,
                        .scales = scales, .offsets = offsets, .quantize = quantize_channels},
                 threads);
}

/* Codes of 4 bits [groups, group], scales and offsets of groups. A group is 32, 64 or 128 weights. */
EXPORT void quantize_int4(const void *values, int dtype, int64_t groups, int64_t group, uint8_t *codes,
                          float *scales, float *offsets, int threads)
{
    quantize_all((Work){.values = values, .dtype = dtype, .rows = groups, .columns = group, .codes = codes,
                        .scales = scales, .offsets = offsets, .quantize = quantize_groups},
                 threads);
}
INSTRUCTIONS_END
#endif
