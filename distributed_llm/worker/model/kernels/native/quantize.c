/* Integers made of floating-point weights: what quantized/quantize.py computes, to the last bit, in one
 * pass over weights that stay in the caches. Only sums of numbers that are not whole depend on their order;
 * it is that of torch's sums along rows. */
#include "floats.h"
#include "instructions.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

EIGHTS
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

INLINE Eight values8(const void *row, int dtype, int64_t at)
{
    if (dtype == BFLOAT16)
        return load8((const uint16_t *)row + at);
    if (dtype == FLOAT16)
        return load_halves8((const uint16_t *)row + at);
    return load_floats8((const float *)row + at);
}

/* The last ones of a row, and zeros. */
INLINE Eight last_values(const void *row, int dtype, int64_t at, int64_t columns)
{
    char padded[SIDE * 4] = {0};
    int64_t size = dtype == FLOAT32 ? 4 : 2;
    memcpy(padded, (const char *)row + at * size, (size_t)((columns - at) * size));
    return values8(padded, dtype, 0);
}

INLINE Eight codes_of_8_bits(Eight values, Eight scale)
{
    return add8(whole8(divide8(values, scale)), same8(128.0f));
}

/* Codes of a channel, symmetric about 0. A NaN makes the scale NaN, and an infinity makes it infinite. */
INLINE void fit_channel(const void *row, const int dtype, int64_t columns, uint8_t *codes, float *scale)
{
    int64_t whole = columns / SIDE * SIDE;
    Eight largest = zero8(); /* magnitudes are in the order of their bits */
    for (int64_t i = 0; i < whole; i += SIDE)
        largest = larger_bits8(largest, magnitude8(values8(row, dtype, i)));
    if (whole < columns)
        largest = larger_bits8(largest, magnitude8(last_values(row, dtype, whole, columns)));
    float each[SIDE];
    uint32_t most = 0;
    store_floats8(each, largest);
    for (int i = 0; i < SIDE; i++)
        most = bits_of(each[i]) > most ? bits_of(each[i]) : most;
    *scale = float_of(most) / 127.0f;
    if (*scale < SMALLEST)
        *scale = SMALLEST;
    Eight scales = same8(*scale);
    for (int64_t i = 0; i < whole; i += SIDE)
        store_codes8(codes + i, codes_of_8_bits(values8(row, dtype, i), scales));
    if (whole < columns) {
        uint8_t last[SIDE];
        store_codes8(last, codes_of_8_bits(last_values(row, dtype, whole, columns), scales));
        memcpy(codes + whole, last, (size_t)(columns - whole));
    }
}

INLINE Eight codes_of_4_bits(Eight weights, Eight inverse, Eight shift)
{
    Eight codes = whole8(subtract8(multiply8(weights, inverse), shift));
    codes = higher8(codes, zero8()); /* of a NaN and another, the second is taken */
    return lower8(codes, same8(15.0f));
}

/* The sum of each register's lanes, from the first to the last. */
INLINE Eight sums_in_order(const Eight rows[SIDE])
{
    Eight columns[SIDE], sum = zero8();
    exchange8(rows, columns);
    for (int i = 0; i < SIDE; i++)
        sum = add8(sum, columns[i]);
    return sum;
}

INLINE Eight joined(const Eight sums[4])
{
    return add8(add8(add8(sums[0], sums[1]), sums[2]), sums[3]);
}

/* Eight groups: [8] or, of weights, [8][group] in memory. */
typedef struct {
    Eight scale, offset, gain;
} Fit;

/* Rounds, then fits scale and offset to the codes. */
INLINE Fit least_squares(const float *weights, const int group, Eight total, Eight middle, Eight scale)
{
    Eight offset = subtract8(middle, multiply8(same8(7.5f), scale));
    Eight inverse = divide8(same8(1.0f), scale);
    Eight products[SIDE], linears[SIDE], squares[SIDE];
    float inverses[SIDE], shifts[SIDE];
    store_floats8(inverses, inverse);
    store_floats8(shifts, multiply8(offset, inverse));
    for (int g = 0; g < SIDE; g++) {
        Eight own_inverse = same8(inverses[g]), shift = same8(shifts[g]), sums[4];
        linears[g] = squares[g] = zero8();
        for (int k = 0; k < 4; k++)
            sums[k] = zero8();
        for (int i = 0; i < group; i += 4 * SIDE)
            for (int k = 0; k < 4; k++) {
                Eight own = load_floats8(weights + g * group + i + k * SIDE);
                Eight codes = codes_of_4_bits(own, own_inverse, shift);
                sums[k] = add8(sums[k], multiply8(codes, own));
                linears[g] = add8(linears[g], codes);
                squares[g] = multiply_add8(codes, codes, squares[g]);
            }
        products[g] = joined(sums);
    }
    Eight product = sums_in_order(products), linear = sums_in_order(linears);
    Eight square = sums_in_order(squares), count = same8((float)group);
    Eight spread = subtract8(multiply8(count, square), multiply8(linear, linear));
    Eight fitted = divide8(
        subtract8(multiply8(count, product), multiply8(linear, total)), spread);
    /* with one code for all, any scale fits */
    scale = choose8(more8(spread, zero8()), fitted, scale);
    offset = divide8(subtract8(total, multiply8(scale, linear)), count);
    Eight gain = add8(multiply8(scale, product), multiply8(offset, total));
    return (Fit){scale, offset, gain};
}

/* Codes of eight groups. A number that is not finite makes its group's offset not finite. */
INLINE void fit_groups(const void *row, const int dtype, const int group, uint8_t *codes, float *scales,
                       float *offsets)
{
    float weights[SIDE * MOST_GROUP], inverses[SIDE], shifts[SIDE];
    Eight least[SIDE], most[SIDE], totals[SIDE], columns[SIDE];
    for (int g = 0; g < SIDE; g++) {
        Eight sums[4];
        for (int k = 0; k < 4; k++)
            sums[k] = zero8();
        least[g] = most[g] = values8(row, dtype, g * group);
        for (int i = 0; i < group; i += 4 * SIDE)
            for (int k = 0; k < 4; k++) {
                int at = g * group + i + k * SIDE;
                Eight own = values8(row, dtype, at);
                store_floats8(weights + at, own);
                least[g] = lower8(least[g], own);
                most[g] = higher8(most[g], own);
                sums[k] = add8(sums[k], own);
            }
        totals[g] = joined(sums);
    }
    Eight total = sums_in_order(totals);
    exchange8(least, columns);
    Eight lowest = columns[0];
    for (int i = 1; i < SIDE; i++)
        lowest = lower8(lowest, columns[i]);
    exchange8(most, columns);
    Eight highest = columns[0];
    for (int i = 1; i < SIDE; i++)
        highest = higher8(highest, columns[i]);
    Eight middle = multiply8(add8(lowest, highest), same8(0.5f));
    Eight width = divide8(subtract8(highest, lowest), same8(15.0f));
    Eight narrow = multiply8(width, same8(0.9f)), smallest = same8(SMALLEST);
    Fit best = least_squares(weights, group, total, middle, higher8(width, smallest));
    Fit other = least_squares(weights, group, total, middle, higher8(narrow, smallest));
    Mask8 won = more8(other.gain, best.gain);
    /* as kernels keep them */
    Eight scale = rounded8(choose8(won, other.scale, best.scale));
    Eight offset = choose8(won, other.offset, best.offset);
    Eight eight = multiply8(scale, same8(8.0f));
    offset = subtract8(rounded8(add8(offset, eight)), eight);
    Eight inverse = divide8(same8(1.0f), scale);
    store_floats8(scales, scale);
    store_floats8(offsets, offset);
    store_floats8(inverses, inverse);
    store_floats8(shifts, multiply8(offset, inverse));
    for (int g = 0; g < SIDE; g++) {
        Eight own_inverse = same8(inverses[g]), shift = same8(shifts[g]);
        for (int at = g * group; at < (g + 1) * group; at += SIDE)
            store_codes8(codes + at,
                        codes_of_4_bits(load_floats8(weights + at), own_inverse, shift));
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
EIGHTS_END
