/* The convolution of each channel with its latest columns, as layers with a window compute it for one token. */
#include "replay.h"

#include "floats.h"
#include "instructions.h"
#include "threads.h"

#include <stdint.h>

EIGHTS
#include "eights.h"

/* In the order of recurrences.py; steps are in elements. */
typedef struct {
    int64_t sequences, channels, columns, width;
    int64_t step, channel_step; /* of the new columns */
} Sizes;

/* What the window [channels, columns] of a sequence and its new column make, any numbers of columns. */
static void move_on(const Sizes *z, const uint16_t *column, uint16_t *window, const uint16_t *weight,
                    const uint16_t *bias, uint16_t *output)
{
    const int64_t older = z->width - 1, first = z->columns - older;
    for (int64_t c = 0; c < z->channels; c++) {
        uint16_t *own = window + c * z->columns, newest = column[c * z->channel_step];
        const uint16_t *by = weight + c * z->width;
        float sum = bias ? widened(bias[c]) : 0.0f;
        for (int64_t i = 0; i < older; i++)
            sum += widened(own[first + i]) * widened(by[i]);
        sum += widened(newest) * widened(by[older]);
        for (int64_t i = 0; i + 1 < z->columns; i++)
            own[i] = own[i + 1];
        own[z->columns - 1] = newest;
        output[c] = narrowed(sum);
    }
}

/* Moves windows of four columns on: a channel's are the 64 bits of a number. */
static void shift_fours(uint16_t *window, const uint16_t *column, int64_t channels)
{
    for (int64_t c = 0; c < channels; c++) {
        uint64_t four;
        memcpy(&four, window + 4 * c, sizeof four);
        four = four >> 16 | (uint64_t)column[c] << 48;
        memcpy(window + 4 * c, &four, sizeof four);
    }
}

/* The same for windows of four columns, all of which count. */
static void move_on_by_fours(int64_t channels, const uint16_t *column, uint16_t *window,
                             const uint16_t *weight, const uint16_t *bias, uint16_t *output)
{
    shift_fours(window, column, channels);
    for (int64_t c = 0; c < channels; c += 8) {
        Eight products[4];
        for (int i = 0; i < 4; i++)
            products[i] = multiply8(load8(window + 4 * c + 8 * i), load8(weight + 4 * c + 8 * i));
        Eight sums = sums_of_fours8(products);
        if (bias)
            sums = add8(sums, load8(bias + c));
        store8(output + c, rounded8(sums));
    }
}

static void silu(uint16_t *numbers, int64_t count)
{
    const Eight one = same8(1.0f);
    for (int64_t i = 0; i < count; i += 8) {
        Eight x = load8(numbers + i);
        Eight below = add8(one, exp8(subtract8(zero8(), x)));
        store8(numbers + i, rounded8(divide8(x, below)));
    }
}

/* The convolution of one new column [sequences, channels] behind those of a window [sequences, channels,
 * columns], which moves on; of weight [channels, width] the last column is the new one's. Sums are rounded
 * before silu, if that is asked for, and after it. output [sequences, channels]; channels are a multiple of
 * 8, and columns at least width - 1. */
EXPORT void convolve(const uint16_t *column, uint16_t *window, const uint16_t *weight,
                     const uint16_t *bias, uint16_t *output, const int64_t *sizes, int with_silu)
{
    const Sizes *z = (const Sizes *)sizes;
    const int by_fours = z->columns == 4 && z->width == 4 && z->channel_step == 1;
    for (int64_t s = 0; s < z->sequences; s++) {
        const uint16_t *own = column + s * z->step;
        uint16_t *kept = window + s * z->channels * z->columns, *made = output + s * z->channels;
        if (by_fours)
            move_on_by_fours(z->channels, own, kept, weight, bias, made);
        else
            move_on(z, own, kept, weight, bias, made);
        if (with_silu)
            silu(made, z->channels);
    }
}
EIGHTS_END
