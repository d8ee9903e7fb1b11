/* Products with weights that each row of states has chosen: those of experts. */
#include "products.h"

#include "instructions.h"
#include "replay.h"
#include "threads.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What a call computes; see `expert_products`. */
typedef struct {
    const uint16_t *states;
    uint16_t *output;
    const Weight *weights;
    const int64_t *chosen;
    int64_t num_weights, choices, sharing, inputs, group;
    int form, threads, instructions;
} Experts;

static int multiply(const Experts *e, const uint16_t *states, uint16_t *output, const Weight *weights,
                    int count, int64_t rows)
{
    switch (e->form) {
    case INT8_FORM:
        return int8_products(states, output, weights, count, rows, e->inputs, BFLOAT16, e->threads,
                             e->instructions);
    case INT4_FORM:
        return int4_products(states, output, weights, count, rows, e->inputs, e->group, BFLOAT16,
                             e->threads, e->instructions);
    default:
        return row_products(states, output, weights, count, rows, e->inputs, e->threads,
                            e->instructions);
    }
}

/* All choices are of one row. */
static int multiply_one(const Experts *e)
{
    Weight *own = malloc((size_t)e->choices * sizeof *own);
    if (!own)
        return 1;
    for (int64_t n = 0; n < e->choices; n++)
        own[n] = e->weights[e->chosen[n]];
    int failed = multiply(e, e->states, e->output, own, (int)e->choices, 1);
    free(own);
    return failed;
}

/* Each weight is read once for all rows that have chosen it. */
static int multiply_each(const Experts *e)
{
    const int64_t inputs = e->inputs, channels = e->weights->channels;
    uint16_t *states = malloc((size_t)(e->choices * (inputs + channels)) * sizeof *states);
    int64_t *own = malloc((size_t)e->choices * sizeof *own);
    uint16_t *output = states + e->choices * inputs;
    int failed = !states || !own;
    for (int64_t weight = 0; weight < e->num_weights && !failed; weight++) {
        int64_t rows = 0;
        for (int64_t n = 0; n < e->choices; n++)
            if (e->chosen[n] == weight) {
                memcpy(states + rows * inputs, e->states + n / e->sharing * inputs,
                       (size_t)inputs * sizeof *states);
                own[rows++] = n;
            }
        if (!rows)
            continue;
        failed = multiply(e, states, output, e->weights + weight, 1, rows);
        for (int64_t row = 0; row < rows; row++)
            memcpy(e->output + own[row] * channels, output + row * channels,
                   (size_t)channels * sizeof *output);
    }
    free(own);
    free(states);
    return failed;
}

/* For each choice the product of a row of states [choices / sharing, inputs] with the weight that was
 * chosen: output [choices, channels]. So many choices, one after another, are of the same row. All weights
 * are of one form and size. Returns 0, or 1 if there is no memory. */
EXPORT int expert_products(const uint16_t *states, uint16_t *output, const Weight *weights,
                           const int64_t *chosen, int64_t num_weights, int64_t choices,
                           int64_t sharing, int64_t inputs, int64_t group, int form, int threads,
                           int instructions)
{
    Experts e = {states, output, weights, chosen, num_weights, choices, sharing, inputs, group,
                 form, threads, instructions};
    for (int64_t n = 0; n < choices; n++)
        if (chosen[n] < 0 || chosen[n] >= num_weights) { /* there is no such weight: NaN */
            memset(output, 0xff, (size_t)(choices * weights->channels) * sizeof *output);
            return 0;
        }
    return choices == sharing ? multiply_one(&e) : multiply_each(&e);
}
