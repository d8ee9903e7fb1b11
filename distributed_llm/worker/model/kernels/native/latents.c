/* What latent attention multiplies queries and results by, instead of making keys and values of latents: of
 * each head's rows of a weight [heads, key_dim + value_dim, rank] the first make keys, the others values.
 * The weight is read once for all tokens. Sums are float32 and go through the inputs in an order that is the
 * same for every number of tokens. */
#include "replay.h"

#include "floats.h"
#include "instructions.h"
#include "memory.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

EIGHTS
#include "eights.h"

#define ROWS_AT_ONCE 4   /* of the weight */
#define TOKENS_AT_ONCE 4 /* for which there are registers beside */
#define AHEAD 2          /* how many times so many rows further memory is asked for what comes */

/* In the order of latents.py; steps are in elements. */
typedef struct {
    int64_t heads, tokens, key_dim, shared_dim, value_dim, rank;
    int64_t head_step, step; /* of what is multiplied: from head to head, and from token to token */
} Sizes;

typedef struct Work {
    const Sizes *sizes;
    const uint16_t *states, *weight;
    uint16_t *output;
    void (*multiply)(const struct Work *, int64_t head, float *memory);
    int64_t numbers; /* of memory that a head takes for each token */
    atomic_llong next;
    atomic_int failed;
} Work;

static void widen(const uint16_t *from, float *to, int64_t count)
{
    for (int64_t i = 0; i < count; i += 8)
        store_floats8(to + i, load8(from + i));
}

/* Adds a few rows of the weight, times a number of each token, to the tokens' sums. */
INLINE void add_rows(int64_t rank, const uint16_t *rows, int64_t key_dim, const float *factors,
                     float *sums, const int tokens)
{
    for (int64_t i = 0; i < rank; i += 8) {
        Eight own[ROWS_AT_ONCE];
        PREFETCH(rows + ROWS_AT_ONCE * (AHEAD * rank + i));
        for (int n = 0; n < ROWS_AT_ONCE; n++)
            own[n] = load8(rows + n * rank + i);
        for (int t = 0; t < tokens; t++) {
            Eight sum = load_floats8(sums + t * rank + i);
            for (int n = 0; n < ROWS_AT_ONCE; n++)
                sum = multiply_add8(same8(factors[t * key_dim + n]), own[n], sum);
            store_floats8(sums + t * rank + i, sum);
        }
    }
}

static void absorb_head(const Work *w, int64_t head, float *memory)
{
    const Sizes *z = w->sizes;
    const uint16_t *weight = w->weight + head * (z->key_dim + z->value_dim) * z->rank;
    const uint16_t *queries = w->states + head * z->head_step;
    uint16_t *output = w->output + head * z->tokens * (z->shared_dim + z->rank);
    float *sums = memory, *wide = memory + z->tokens * z->rank;
    memset(sums, 0, (size_t)(z->tokens * z->rank) * sizeof *sums);
    for (int64_t t = 0; t < z->tokens; t++)
        widen(queries + t * z->step, wide + t * z->key_dim, z->key_dim);
    for (int64_t k = 0; k < z->key_dim; k += ROWS_AT_ONCE) {
        const uint16_t *rows = weight + k * z->rank;
        int64_t t = 0;
        for (; t + TOKENS_AT_ONCE <= z->tokens; t += TOKENS_AT_ONCE)
            add_rows(z->rank, rows, z->key_dim, wide + t * z->key_dim + k, sums + t * z->rank,
                     TOKENS_AT_ONCE);
        for (; t < z->tokens; t++)
            add_rows(z->rank, rows, z->key_dim, wide + t * z->key_dim + k, sums + t * z->rank, 1);
    }
    for (int64_t t = 0; t < z->tokens; t++, output += z->shared_dim + z->rank) {
        memcpy(output, queries + t * z->step + z->key_dim, (size_t)z->shared_dim * sizeof *output);
        for (int64_t i = 0; i < z->rank; i += 8)
            store8(output + z->shared_dim + i, rounded8(load_floats8(sums + t * z->rank + i)));
    }
}

/* The products of a few rows of the weight with latents [tokens, rank]; `step` from token to token. */
INLINE void multiply_rows(int64_t rank, const uint16_t *rows, const float *latents, uint16_t *output,
                          int64_t step, const int tokens, const int count)
{
    Eight sums[TOKENS_AT_ONCE][ROWS_AT_ONCE];
    for (int t = 0; t < tokens; t++)
        for (int n = 0; n < count; n++)
            sums[t][n] = zero8();
    for (int64_t i = 0; i < rank; i += 8) {
        Eight own[ROWS_AT_ONCE];
        PREFETCH(rows + count * (AHEAD * rank + i));
        for (int n = 0; n < count; n++)
            own[n] = load8(rows + n * rank + i);
        for (int t = 0; t < tokens; t++) {
            Eight latent = load_floats8(latents + t * rank + i);
            for (int n = 0; n < count; n++)
                sums[t][n] = multiply_add8(latent, own[n], sums[t][n]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int n = 0; n < count; n++)
            output[t * step + n] = narrowed(sum8(sums[t][n]));
}

static void make_values_of_head(const Work *w, int64_t head, float *memory)
{
    const Sizes *z = w->sizes;
    const uint16_t *weight =
        w->weight + (head * (z->key_dim + z->value_dim) + z->key_dim) * z->rank;
    const int64_t further = z->heads * z->value_dim;
    for (int64_t t = 0; t < z->tokens; t++)
        widen(w->states + head * z->head_step + t * z->step, memory + t * z->rank, z->rank);
    for (int64_t v = 0; v < z->value_dim; v += ROWS_AT_ONCE) {
        const uint16_t *rows = weight + v * z->rank;
        uint16_t *output = w->output + head * z->value_dim + v;
        int64_t t = 0;
        for (; t + TOKENS_AT_ONCE <= z->tokens; t += TOKENS_AT_ONCE)
            for (int n = 0; n < ROWS_AT_ONCE; n += 2)
                multiply_rows(z->rank, rows + n * z->rank, memory + t * z->rank,
                              output + t * further + n, further, TOKENS_AT_ONCE, 2);
        for (; t < z->tokens; t++)
            multiply_rows(z->rank, rows, memory + t * z->rank, output + t * further, further, 1,
                          ROWS_AT_ONCE);
    }
}

static void multiply_some(void *data)
{
    Work *w = data;
    char *memory = malloc((size_t)(w->numbers * w->sizes->tokens) * sizeof(float) + LINE);
    if (!memory) {
        atomic_store(&w->failed, 1);
        return;
    }
    for (;;) {
        int64_t head = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (head >= w->sizes->heads)
            break;
        w->multiply(w, head, at_line(memory));
    }
    free(memory);
}

/* What scores shared keys and latents as queries score keys made of them: [heads, tokens, shared_dim + rank],
 * of queries [heads, tokens, key_dim + shared_dim]. Dimensions are multiples of 8. Both return 0, or 1 if there
 * is no memory. */
EXPORT int absorb_queries(const uint16_t *queries, const uint16_t *weight, uint16_t *output,
                          const int64_t *sizes, int threads)
{
    const Sizes *z = (const Sizes *)sizes;
    Work w = {.sizes = z, .states = queries, .weight = weight, .output = output,
              .multiply = absorb_head, .numbers = z->key_dim + z->rank};
    in_threads(multiply_some, &w, threads);
    return atomic_load(&w.failed);
}

/* The values [tokens, heads, value_dim] of latents [tokens, heads, rank], which need not lie so. */
EXPORT int latent_values(const uint16_t *latents, const uint16_t *weight, uint16_t *output,
                         const int64_t *sizes, int threads)
{
    const Sizes *z = (const Sizes *)sizes;
    Work w = {.sizes = z, .states = latents, .weight = weight, .output = output,
              .multiply = make_values_of_head, .numbers = z->rank};
    in_threads(multiply_some, &w, threads);
    return atomic_load(&w.failed);
}
EIGHTS_END
