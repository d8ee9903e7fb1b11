/* RMS norms of bfloat16 states [1] in one pass, instead of one for each of six operations. What
 * transformers rounds to bfloat16 in between is rounded here too.
 *
 * [1] B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019. */
#include "floats.h"
#include "instructions.h"
#include "threads.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

EIGHTS
#include "eights.h"

typedef struct {
    const uint16_t *states, *weight;
    uint16_t *output;
    int64_t rows, columns, step;
    float epsilon;
    int kind;
    atomic_llong next;
} Work;

/* What transformers' models compute: weight * round(x / rms), round(weight * x / rms), or
 * round((1 + weight) * x / rms). */
enum { ROUNDED_BEFORE, ROUNDED_AFTER, PLUS_ONE };

static void norm_row(const Work *w, int64_t row)
{
    const uint16_t *states = w->states + row * w->columns;
    uint16_t *output = w->output + row * w->columns;
    Eight squares[4] = {zero8(), zero8(), zero8(),
                         zero8()};
    for (int64_t i = 0; i < w->columns; i += 8) {
        Eight x = load8(states + i);
        squares[i / 8 % 4] = multiply_add8(x, x, squares[i / 8 % 4]);
    }
    float sum = sum8(add8(add8(squares[0], squares[1]),
                                   add8(squares[2], squares[3])));
    Eight factor = same8(1.0f / sqrtf(sum / (float)w->columns + w->epsilon));
    for (int64_t i = 0; i < w->columns; i += 8) {
        Eight x = multiply8(load8(states + i), factor);
        Eight weight = load8(w->weight + i);
        if (w->kind == PLUS_ONE)
            weight = add8(weight, same8(1.0f));
        else if (w->kind == ROUNDED_BEFORE)
            x = rounded8(x);
        store8(output + i, rounded8(multiply8(x, weight)));
    }
}

static void norm_rows(void *data)
{
    Work *w = data;
    for (;;) {
        int64_t first = atomic_fetch_add_explicit(&w->next, w->step, memory_order_relaxed);
        for (int64_t row = first; row < first + w->step && row < w->rows; row++)
            norm_row(w, row);
        if (first + w->step >= w->rows)
            return;
    }
}

/* Elements for which a second thread is worth starting. */
#define ELEMENTS_OF_THREAD 16384

/* states and output [rows, columns], weight [columns]; columns are a multiple of 8. */
EXPORT void rms_norm(const uint16_t *states, uint16_t *output, const uint16_t *weight, int64_t rows,
                     int64_t columns, float epsilon, int kind, int threads)
{
    Work w = {.states = states, .weight = weight, .output = output, .rows = rows,
              .columns = columns, .epsilon = epsilon, .kind = kind};
    int64_t most = rows * columns / ELEMENTS_OF_THREAD;
    most = most > rows ? rows : most < 1 ? 1 : most;
    threads = most < threads ? (int)most : threads;
    w.step = rows / (4 * threads) + 1;
    in_threads(norm_rows, &w, threads);
}
EIGHTS_END
