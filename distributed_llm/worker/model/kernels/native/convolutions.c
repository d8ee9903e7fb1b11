/* The convolution of each channel with its latest columns, as layers with a window compute it for one token. */
#include "replay.h"

#include "floats.h"
#include "instructions.h"
#include "threads.h"

#include <stdint.h>

#if defined(__x86_64__)
INSTRUCTIONS("avx2,fma,f16c")
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

/* The same for windows of four columns, all of which count: a channel's are the 64 bits of a lane. */
static void move_on_by_fours(int64_t channels, const uint16_t *column, uint16_t *window,
                             const uint16_t *weight, const uint16_t *bias, uint16_t *output)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t c = 0; c < channels; c += 8) {
        __m256 products[4];
        for (int half = 0; half < 2; half++) {
            uint16_t *own = window + 4 * c + 16 * half;
            __m256i newest = _mm256_cvtepu16_epi64(
                _mm_loadl_epi64((const __m128i *)(column + c + 4 * half)));
            __m256i moved = _mm256_srli_epi64(_mm256_loadu_si256((const __m256i *)own), 16);
            moved = _mm256_or_si256(moved, _mm256_slli_epi64(newest, 48));
            _mm256_storeu_si256((__m256i *)own, moved);
            for (int pair = 0; pair < 2; pair++)
                products[2 * half + pair] = _mm256_mul_ps(
                    load8(own + 8 * pair), load8(weight + 4 * c + 16 * half + 8 * pair));
        }
        __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(products[0], products[1]),
                                     _mm256_hadd_ps(products[2], products[3]));
        sums = _mm256_permutevar8x32_ps(sums, order);
        if (bias)
            sums = _mm256_add_ps(sums, load8(bias + c));
        store8(output + c, rounded8(sums));
    }
}

static void silu(uint16_t *numbers, int64_t count)
{
    const __m256 one = _mm256_set1_ps(1.0f);
    for (int64_t i = 0; i < count; i += 8) {
        __m256 x = load8(numbers + i);
        __m256 below = _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), x)));
        store8(numbers + i, rounded8(_mm256_div_ps(x, below)));
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
INSTRUCTIONS_END
#endif
