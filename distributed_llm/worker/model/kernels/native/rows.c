/* Products of bfloat16 states with bfloat16 weights that lie as they do in files, row by row.
 *
 * Each sum is float32, of one output, and goes through the inputs in their order: a row of states gives the
 * same whatever stands beside it. Sums of some rows with some channels are made together, in registers, so
 * that what is read is used several times. */
#include "products.h"

#include "floats.h"
#include "instructions.h"
#include "processor.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdlib.h>

#define CHANNELS_AT_ONCE 4 /* with several rows of states */
#define MOST_CHANNELS 8    /* with one */
#define ROWS_AT_ONCE 4
#define ROWS_OF_BLOCK 96 /* that stay in the caches while some channels pass */
#define AHEAD 256        /* inputs that are asked of memory before they are needed */

/* One weight of a call. */
typedef struct {
    const uint16_t *states; /* [rows, inputs] */
    const float *wide;      /* the same as float32, for `multiply_wide`; see `widen` */
    const uint16_t *weight; /* [channels, inputs] */
    const uint16_t *bias;   /* [channels], or NULL */
    uint16_t *output;       /* [rows, channels] */
    int64_t rows, inputs, channels;
} Rows;

static inline void put(const Rows *p, int64_t row, int64_t channel, float sum)
{
    float bias = p->bias ? widened(p->bias[channel]) : 0.0f;
    p->output[row * p->channels + channel] = narrowed(sum + bias);
}

/* The products of inputs that fill no register. */
static inline float rest(const Rows *p, int64_t row, int64_t channel, int64_t from)
{
    float sum = 0.0f;
    for (int64_t k = from; k < p->inputs; k++)
        sum += widened(p->states[row * p->inputs + k]) * widened(p->weight[channel * p->inputs + k]);
    return sum;
}

#if defined(X86) && defined(GNU)
#define WITH_BFLOAT16
INSTRUCTIONS("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
INLINE void tile512(const Rows *p, int64_t row, int64_t channel, const int rows, const int channels)
{
    __m512 sums[ROWS_AT_ONCE][MOST_CHANNELS];
    float kept[ROWS_AT_ONCE][MOST_CHANNELS][16];
    const uint16_t *states = p->states + row * p->inputs;
    const uint16_t *weight = p->weight + channel * p->inputs;
    const int64_t whole = p->inputs / 32 * 32;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            sums[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < whole; k += 32) {
        __m512i weights[MOST_CHANNELS];
        for (int c = 0; c < channels; c++)
            weights[c] = _mm512_loadu_si512(weight + c * p->inputs + k);
        /* Of the same channels, or of the next ones. */
        const int64_t further = k + AHEAD < p->inputs ? 0 : (channels - 1) * p->inputs;
        for (int c = 0; c < channels; c++)
            PREFETCH(weight + c * p->inputs + k + AHEAD + further);
        for (int r = 0; r < rows; r++) {
            __m512i own = _mm512_loadu_si512(states + r * p->inputs + k);
            for (int c = 0; c < channels; c++)
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums[r][c]) : "v"(weights[c]), "v"(own));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            _mm512_storeu_ps(kept[r][c], sums[r][c]);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            put(p, row + r, channel + c,
                _mm512_reduce_add_ps(_mm512_loadu_ps(kept[r][c])) +
                    rest(p, row + r, channel + c, whole));
}

static void multiply_narrow(const Rows *p, int64_t row, int64_t stop, int64_t channel, int64_t last)
{
    int64_t r;
    if (stop - row == 1)
        for (; channel + 8 <= last; channel += 8)
            tile512(p, row, channel, 1, 8);
    for (; channel + 4 <= last; channel += 4) {
        for (r = row; r + 4 <= stop; r += 4)
            tile512(p, r, channel, 4, 4);
        for (; r + 2 <= stop; r += 2)
            tile512(p, r, channel, 2, 4);
        for (; r < stop; r++)
            tile512(p, r, channel, 1, 4);
    }
    for (; channel < last; channel++)
        for (r = row; r < stop; r++)
            tile512(p, r, channel, 1, 1);
}
INSTRUCTIONS_END
#endif

EIGHTS
#include "eights.h"

/* Sixteen states as float32: those at even places, then those at odd ones. */
static void widen(const uint16_t *states, float *wide, int64_t count)
{
    for (int64_t i = 0; i + 16 <= count; i += 16)
        for (int k = 0; k < 8; k++) {
            wide[i + k] = widened(states[i + 2 * k]);
            wide[i + 8 + k] = widened(states[i + 2 * k + 1]);
        }
}

INLINE void tile8(const Rows *p, int64_t row, int64_t channel, const int rows, const int channels)
{
    Eight sums[ROWS_AT_ONCE][2];
    const int64_t whole = p->inputs / 16 * 16;
    const float *states = p->wide + row * whole;
    const uint16_t *weight = p->weight + channel * p->inputs;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            sums[r][c] = zero8();
    for (int64_t k = 0; k < whole; k += 16) {
        Eight even[2], odd[2];
        for (int c = 0; c < channels; c++)
            load_pairs8(weight + c * p->inputs + k, even + c, odd + c);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < channels; c++)
                sums[r][c] = multiply_add8(load_floats8(states + r * whole + k), even[c], sums[r][c]);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < channels; c++)
                sums[r][c] = multiply_add8(load_floats8(states + r * whole + k + 8), odd[c], sums[r][c]);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            put(p, row + r, channel + c,
                sum8(sums[r][c]) + rest(p, row + r, channel + c, whole));
}

static void multiply_wide(const Rows *p, int64_t row, int64_t stop, int64_t channel, int64_t last)
{
    int64_t r;
    for (; channel + 2 <= last; channel += 2) {
        for (r = row; r + 4 <= stop; r += 4)
            tile8(p, r, channel, 4, 2);
        for (; r < stop; r++)
            tile8(p, r, channel, 1, 2);
    }
    for (; channel < last; channel++)
        for (r = row; r < stop; r++)
            tile8(p, r, channel, 1, 1);
}
EIGHTS_END

/* What the threads of one call share. The channels of all weights are numbered through. */
typedef struct {
    Rows states; /* a product but for weight and output */
    const Weight *weights;
    uint16_t *output;
    void (*multiply)(const Rows *, int64_t row, int64_t stop, int64_t channel, int64_t last);
    int num_weights;
    int64_t channels, step;
    atomic_llong next;
} Work;

static void multiply_channels(const Work *w, int64_t first, int64_t last)
{
    Rows p = w->states;
    int64_t start = 0; /* the number of the weight's first channel */
    p.output = w->output;
    for (int n = 0; n < w->num_weights; n++) {
        p.weight = w->weights[n].codes;
        p.bias = (const uint16_t *)w->weights[n].scales;
        p.channels = w->weights[n].channels;
        int64_t from = (first > start ? first : start) - start;
        int64_t to = (last < start + p.channels ? last : start + p.channels) - start;
        for (int64_t row = 0; row < p.rows && from < to; row += ROWS_OF_BLOCK) {
            int64_t stop = row + ROWS_OF_BLOCK < p.rows ? row + ROWS_OF_BLOCK : p.rows;
            w->multiply(&p, row, stop, from, to);
        }
        start += p.channels;
        p.output += p.rows * p.channels;
    }
}

static void multiply_some(void *data)
{
    Work *w = data;
    for (;;) {
        int64_t first = atomic_fetch_add_explicit(&w->next, w->step, memory_order_relaxed);
        if (first >= w->channels)
            return;
        multiply_channels(w, first, first + w->step);
    }
}

/* The products of states [rows, inputs] with weights [channels, inputs], one after another in `output`.
 * Weights have a bias where others have scales, or NULL. Returns 0, or 1 if there is no memory. */
EXPORT int row_products(const uint16_t *states, uint16_t *output, const Weight *weights,
                        int num_weights, int64_t rows, int64_t inputs, int threads, int instructions)
{
    Work w = {.states = {.states = states, .rows = rows, .inputs = inputs}, .weights = weights,
              .output = output, .multiply = multiply_wide, .num_weights = num_weights};
    float *wide = NULL;
#ifdef WITH_BFLOAT16
    if (instructions == AVX512VNNI && has_bfloat16())
        w.multiply = multiply_narrow;
#else
    (void)instructions;
#endif
    if (w.multiply == multiply_wide) {
        int64_t whole = inputs / 16 * 16;
        if (!(wide = malloc((size_t)(rows * whole + 1) * sizeof *wide)))
            return 1;
        for (int64_t row = 0; row < rows; row++)
            widen(states + row * inputs, wide + row * whole, whole);
        w.states.wide = wide;
    }
    for (int n = 0; n < num_weights; n++)
        w.channels += weights[n].channels;
    /* Pieces so small that a slow core does not keep the others waiting. */
    w.step = w.channels / (8 * threads) / MOST_CHANNELS * MOST_CHANNELS;
    w.step = w.step < MOST_CHANNELS ? MOST_CHANNELS : w.step > 64 ? 64 : w.step;
    in_threads(multiply_some, &w, threads);
    free(wide);
    return 0;
}
