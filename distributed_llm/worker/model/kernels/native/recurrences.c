/* One token's step of what layers keep of a text as a state: the gated delta rule [1], and the selective
 * update of Mamba [2, 3]. A state is float32 and is read once and written once; all sums are made in
 * float32, in an order that does not depend on what stands beside.
 *
 * [1] S. Yang, J. Kautz, A. Hatamizadeh, "Gated Delta Networks", 2024.
 * [2] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
 * [3] T. Dao, A. Gu, "Transformers are SSMs", 2024. */
#include "replay.h"

#include "floats.h"
#include "instructions.h"
#include "threads.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

EIGHTS
#include "eights.h"

#define MOST_DIM 256 /* of keys */
#define COLUMNS_AT_ONCE 4 /* eights of values whose sums are in registers */

/* In the order of recurrences.py; steps are in elements. */
typedef struct {
    int64_t sequences, key_heads, heads, key_dim, value_dim;
    int64_t query_step, key_step, value_step; /* from a sequence to the next */
    int64_t fades;                            /* of a head: 1, or one for each of its keys' numbers */
} DeltaSizes;

typedef struct {
    const uint16_t *query, *key, *value, *beta;
    const float *fading, *state;
    float *made;
    uint16_t *output;
    const DeltaSizes *sizes;
    atomic_llong next;
} DeltaWork;

/* Numbers divided by their length, times `scale`. */
static void normalize(const uint16_t *from, float *to, int64_t count, float scale)
{
    Eight sum = zero8();
    for (int64_t i = 0; i < count; i += 8)
        sum = multiply_add8(load8(from + i), load8(from + i), sum);
    Eight factor = same8(scale / sqrtf(sum8(sum) + 1e-6f));
    for (int64_t i = 0; i < count; i += 8)
        store_floats8(to + i, multiply8(load8(from + i), factor));
}

/* Some columns of a head's state [keys, width], from `state` on. */
INLINE void delta_columns(const float *state, float *made, const float *query, const float *key,
                          const float *fade, const uint16_t *value, float beta, uint16_t *output,
                          int64_t keys, int64_t width, const int columns)
{
    Eight known[COLUMNS_AT_ONCE], read[COLUMNS_AT_ONCE];
    for (int c = 0; c < columns; c++)
        known[c] = read[c] = zero8();
    for (int64_t i = 0; i < keys; i++) {
        Eight factor = same8(fade[i] * key[i]);
        for (int c = 0; c < columns; c++)
            known[c] = multiply_add8(load_floats8(state + i * width + 8 * c), factor, known[c]);
    }
    for (int c = 0; c < columns; c++)
        known[c] = multiply8(subtract8(load8(value + 8 * c), known[c]),
                                 same8(beta));
    for (int64_t i = 0; i < keys; i++) {
        Eight fading = same8(fade[i]), written = same8(key[i]);
        Eight asked = same8(query[i]);
        for (int c = 0; c < columns; c++) {
            Eight now = multiply8(load_floats8(state + i * width + 8 * c), fading);
            now = multiply_add8(written, known[c], now);
            store_floats8(made + i * width + 8 * c, now);
            read[c] = multiply_add8(now, asked, read[c]);
        }
    }
    for (int c = 0; c < columns; c++)
        store8(output + 8 * c, rounded8(read[c]));
}

static void delta_head(const DeltaWork *w, int64_t sequence, int64_t head)
{
    const DeltaSizes *z = w->sizes;
    float query[MOST_DIM], key[MOST_DIM], fade[MOST_DIM];
    int64_t keys = z->key_dim, width = z->value_dim, at = sequence * z->heads + head;
    int64_t key_head = head / (z->heads / z->key_heads);
    normalize(w->query + sequence * z->query_step + key_head * keys, query, keys,
              1.0f / sqrtf((float)keys));
    normalize(w->key + sequence * z->key_step + key_head * keys, key, keys, 1.0f);
    for (int64_t i = 0; i < keys; i++)
        fade[i] = i < z->fades ? expf(w->fading[at * z->fades + i]) : fade[0];
    const float *state = w->state + at * keys * width;
    float *made = w->made + at * keys * width;
    const uint16_t *value = w->value + sequence * z->value_step + head * width;
    uint16_t *output = w->output + at * width;
    float beta = widened(w->beta[at]);
    int64_t v = 0;
    for (; v + 8 * COLUMNS_AT_ONCE <= width; v += 8 * COLUMNS_AT_ONCE)
        delta_columns(state + v, made + v, query, key, fade, value + v, beta, output + v, keys, width,
                      COLUMNS_AT_ONCE);
    for (; v < width; v += 8)
        delta_columns(state + v, made + v, query, key, fade, value + v, beta, output + v, keys, width, 1);
}

static void delta_heads(void *data)
{
    DeltaWork *w = data;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (at >= w->sizes->sequences * w->sizes->heads)
            return;
        delta_head(w, at / w->sizes->heads, at % w->sizes->heads);
    }
}

/* Numbers of a state for which a second thread is worth starting. */
#define NUMBERS_OF_THREAD 65536

static int threads_for(int64_t numbers, int threads)
{
    int64_t most = numbers / NUMBERS_OF_THREAD;
    return most > threads ? threads : most > 1 ? (int)most : 1;
}

/* query, key [sequences, key_heads, key_dim], value and output [sequences, heads, value_dim], fading
 * [sequences, heads, fades] and beta [sequences, heads]; state and made [sequences, heads, key_dim,
 * value_dim]. Dimensions are multiples of 8, and key_dim is up to MOST_DIM. */
EXPORT void delta_rule(const uint16_t *query, const uint16_t *key, const uint16_t *value,
                       const float *fading, const uint16_t *beta, const float *state, float *made,
                       uint16_t *output, const int64_t *sizes, int threads)
{
    DeltaWork w = {.query = query, .key = key, .value = value, .fading = fading, .beta = beta,
                   .state = state, .made = made, .output = output,
                   .sizes = (const DeltaSizes *)sizes};
    const DeltaSizes *z = w.sizes;
    in_threads(delta_heads, &w,
               threads_for(z->sequences * z->heads * z->key_dim * z->value_dim, threads));
}

/* In the order of recurrences.py; steps are from a sequence to the next, in elements. */
typedef struct {
    int64_t sequences, heads, channels, size, groups;
    int64_t inputs_step, times_step, writing_step, reading_step, gates_step;
    int64_t fades; /* of a head: 1, or one for each number of its states */
} SelectiveSizes;

typedef struct {
    const uint16_t *inputs, *times, *writing, *reading, *gates;
    const float *fading, *bias, *passing, *state;
    float *made;
    uint16_t *output;
    const SelectiveSizes *sizes;
    int64_t step; /* heads of a piece */
    atomic_llong next;
} SelectiveWork;

static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

static void selective_head(const SelectiveWork *w, int64_t sequence, int64_t head)
{
    const SelectiveSizes *z = w->sizes;
    int64_t size = z->size, from = sequence * z->heads + head;
    int64_t group = head / (z->heads / z->groups);
    const uint16_t *writing = w->writing + sequence * z->writing_step + group * size;
    const uint16_t *reading = w->reading + sequence * z->reading_step + group * size;
    const float *fading = w->fading + head * z->fades;
    float time = widened(w->times[sequence * z->times_step + head]);
    time = softplus(time + (w->bias ? w->bias[head] : 0.0f));
    Eight same = same8(expf(time * fading[0]));
    for (int64_t c = 0; c < z->channels; c++) {
        int64_t at = head * z->channels + c;
        const float *state = w->state + (from * z->channels + c) * size;
        float *made = w->made + (from * z->channels + c) * size;
        float input = widened(w->inputs[sequence * z->inputs_step + at]);
        Eight added = same8(time * input), sum = zero8();
        for (int64_t i = 0; i < size; i += 8) {
            Eight fade = same;
            if (z->fades > 1)
                fade = exp8(multiply8(load_floats8(fading + i), same8(time)));
            Eight now = multiply8(load_floats8(state + i), fade);
            now = multiply_add8(load8(writing + i), added, now);
            store_floats8(made + i, now);
            sum = multiply_add8(now, load8(reading + i), sum);
        }
        float output = sum8(sum) + (w->passing ? input * w->passing[head] : 0.0f);
        if (w->gates) {
            float gate = widened(w->gates[sequence * z->gates_step + at]);
            output *= gate / (1.0f + expf(-gate));
        }
        w->output[from * z->channels + c] = narrowed(output);
    }
}

static void selective_heads(void *data)
{
    SelectiveWork *w = data;
    int64_t last = w->sizes->sequences * w->sizes->heads;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&w->next, w->step, memory_order_relaxed);
        if (at >= last)
            return;
        for (int64_t n = at; n < at + w->step && n < last; n++)
            selective_head(w, n / w->sizes->heads, n % w->sizes->heads);
    }
}

/* inputs, gates (or NULL) and output [sequences, heads, channels], times [sequences, heads] before their
 * bias and softplus, writing and reading [sequences, groups, size], fading [heads, fades], bias and
 * passing [heads] or NULL; state and made [sequences, heads, channels, size], of which size is a multiple
 * of 8. */
EXPORT void selective_update(const uint16_t *inputs, const uint16_t *times, const uint16_t *writing,
                             const uint16_t *reading, const uint16_t *gates, const float *fading,
                             const float *bias, const float *passing, const float *state, float *made,
                             uint16_t *output, const int64_t *sizes, int threads)
{
    SelectiveWork w = {.inputs = inputs, .times = times, .writing = writing, .reading = reading,
                       .gates = gates, .fading = fading, .bias = bias, .passing = passing,
                       .state = state, .made = made, .output = output,
                       .sizes = (const SelectiveSizes *)sizes};
    const SelectiveSizes *z = w.sizes;
    w.step = z->channels > 64 ? 1 : 64 / z->channels;
    in_threads(selective_heads, &w,
               threads_for(z->sequences * z->heads * z->channels * z->size, threads));
}
EIGHTS_END
