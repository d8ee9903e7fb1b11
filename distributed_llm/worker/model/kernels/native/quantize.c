/* Integers made of floating-point weights: what quantized/quantize.py computes, to the last bit, in one
 * pass over weights that stay in the caches. Only sums of numbers that are not whole depend on their order;
 * it is that of torch's sums along rows. */
#include "floats.h"
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
typedef struct {
    const void *values;
    uint8_t *codes;
    float *scales, *offsets;
    int64_t rows, columns, step;
    int dtype;
    void (*quantize)(const void *row, int dtype, int64_t columns, uint8_t *codes, float *scale,
                     float *offset);
    atomic_llong next;
} Work;

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

/* The sum of the lanes, from the first to the last. */
INLINE float lanes_in_order(__m256 sums)
{
    float each[SIDE], sum = 0.0f;
    _mm256_storeu_ps(each, sums);
    for (int i = 0; i < SIDE; i++)
        sum += each[i];
    return sum;
}

INLINE float joined(const __m256 sums[4])
{
    return lanes_in_order(
        _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), sums[2]), sums[3]));
}

INLINE __m256 codes_of_4_bits(__m256 weights, __m256 inverse, __m256 shift)
{
    __m256 codes = whole8(_mm256_sub_ps(_mm256_mul_ps(weights, inverse), shift));
    codes = _mm256_max_ps(codes, _mm256_setzero_ps()); /* of a NaN and another, the second is taken */
    return _mm256_min_ps(codes, _mm256_set1_ps(15.0f));
}

typedef struct {
    float scale, offset, gain;
} Fit;

/* Rounds, then fits scale and offset to the codes. */
INLINE Fit least_squares(const float *weights, const int group, float total, float middle, float scale)
{
    float offset = middle - 7.5f * scale, inverse = 1.0f / scale;
    __m256 inverses = _mm256_set1_ps(inverse), shift = _mm256_set1_ps(offset * inverse);
    __m256 products[4], linears = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
    for (int k = 0; k < 4; k++)
        products[k] = _mm256_setzero_ps();
    for (int i = 0; i < group; i += 4 * SIDE)
        for (int k = 0; k < 4; k++) {
            __m256 own = _mm256_loadu_ps(weights + i + k * SIDE);
            __m256 codes = codes_of_4_bits(own, inverses, shift);
            products[k] = _mm256_add_ps(products[k], _mm256_mul_ps(codes, own));
            linears = _mm256_add_ps(linears, codes);
            squares = _mm256_fmadd_ps(codes, codes, squares);
        }
    float product = joined(products), linear = sum8(linears), square = sum8(squares);
    float count = (float)group, spread = count * square - linear * linear;
    if (spread > 0) /* with one code for all, any scale fits */
        scale = (count * product - linear * total) / spread;
    offset = (total - scale * linear) / count;
    return (Fit){scale, offset, scale * product + offset * total};
}

INLINE float as_bfloat16(float value) { return widened(narrowed(value)); }

/* Codes of a group. A number that is not finite makes its offset not finite. */
INLINE void fit_group(const void *row, const int dtype, const int group, uint8_t *codes, float *scale,
                      float *offset)
{
    float weights[MOST_GROUP];
    __m256 sums[4], least = values8(row, dtype, 0), most = least;
    for (int k = 0; k < 4; k++)
        sums[k] = _mm256_setzero_ps();
    for (int i = 0; i < group; i += 4 * SIDE)
        for (int k = 0; k < 4; k++) {
            __m256 own = values8(row, dtype, i + k * SIDE);
            _mm256_storeu_ps(weights + i + k * SIDE, own);
            least = _mm256_min_ps(least, own);
            most = _mm256_max_ps(most, own);
            sums[k] = _mm256_add_ps(sums[k], own);
        }
    float total = joined(sums), highest = max8(most);
    float lowest = -max8(_mm256_sub_ps(_mm256_setzero_ps(), least));
    float middle = (lowest + highest) / 2, width = (highest - lowest) / 15;
    float narrow = width * 0.9f;
    Fit best = least_squares(weights, group, total, middle, width < SMALLEST ? SMALLEST : width);
    Fit other = least_squares(weights, group, total, middle, narrow < SMALLEST ? SMALLEST : narrow);
    if (other.gain > best.gain)
        best = other;
    /* as kernels keep them */
    *scale = as_bfloat16(best.scale);
    *offset = as_bfloat16(best.offset + 8 * *scale) - 8 * *scale;
    float inverse = 1.0f / *scale;
    __m256 inverses = _mm256_set1_ps(inverse), shift = _mm256_set1_ps(*offset * inverse);
    for (int i = 0; i < group; i += SIDE)
        store_codes(codes + i, codes_of_4_bits(_mm256_loadu_ps(weights + i), inverses, shift));
}

static void quantize_channel(const void *row, int dtype, int64_t columns, uint8_t *codes, float *scale,
                             float *offset)
{
    (void)offset;
    if (dtype == BFLOAT16)
        fit_channel(row, BFLOAT16, columns, codes, scale);
    else if (dtype == FLOAT16)
        fit_channel(row, FLOAT16, columns, codes, scale);
    else
        fit_channel(row, FLOAT32, columns, codes, scale);
}

static void quantize_group(const void *row, int dtype, int64_t columns, uint8_t *codes, float *scale,
                           float *offset)
{
    int group = (int)columns;
    if (dtype == BFLOAT16)
        fit_group(row, BFLOAT16, group, codes, scale, offset);
    else if (dtype == FLOAT16)
        fit_group(row, FLOAT16, group, codes, scale, offset);
    else
        fit_group(row, FLOAT32, group, codes, scale, offset);
}

static void quantize_some(void *data)
{
    Work *w = data;
    int64_t size = w->columns * (w->dtype == FLOAT32 ? 4 : 2);
    for (;;) {
        int64_t first = atomic_fetch_add_explicit(&w->next, w->step, memory_order_relaxed);
        for (int64_t row = first; row < first + w->step && row < w->rows; row++)
            w->quantize((const char *)w->values + row * size, w->dtype, w->columns,
                        w->codes + row * w->columns, w->scales + row, w->offsets + row);
        if (first + w->step >= w->rows)
            return;
    }
}

#define WEIGHTS_AT_A_TIME 65536

static void quantize_all(Work w, int threads)
{
    w.step = WEIGHTS_AT_A_TIME / w.columns + 1;
    in_threads(quantize_some, &w, threads);
}

/* Codes of 8 bits [rows, columns], and a scale for each row; offsets are left as they are. */
EXPORT void quantize_int8(const void *values, int dtype, int64_t rows, int64_t columns, uint8_t *codes,
                          float *scales, float *offsets, int threads)
{
    quantize_all((Work){.values = values, .dtype = dtype, .rows = rows, .columns = columns, .codes = codes,
                        .scales = scales, .offsets = offsets, .quantize = quantize_channel},
                 threads);
}

/* Codes of 4 bits [groups, group], scales and offsets of groups. A group is 32, 64 or 128 weights. */
EXPORT void quantize_int4(const void *values, int dtype, int64_t groups, int64_t group, uint8_t *codes,
                          float *scales, float *offsets, int threads)
{
    quantize_all((Work){.values = values, .dtype = dtype, .rows = groups, .columns = group, .codes = codes,
                        .scales = scales, .offsets = offsets, .quantize = quantize_group},
                 threads);
}
INSTRUCTIONS_END
#endif
