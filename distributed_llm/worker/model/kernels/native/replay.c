/* A list of operations on fixed memory, carried out in one call. Numbers are bfloat16; each operation
 * rounds what it computes in float32, as torch does, so the results are the same to the last bit. */
#include "replay.h"

#include "floats.h"
#include "instructions.h"
#include "products.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

EIGHTS
#include "eights.h"

#define DIMENSIONS 4

enum {
    INPUT,
    COPY,
    ADD,
    MULTIPLY,
    LOOK_UP,
    NORM,
    INT8_PRODUCTS,
    INT4_PRODUCTS,
    ROW_PRODUCTS,
    ATTENTION,
    EXPERT_PRODUCTS,
    CONVOLUTION,
    DELTA_RULE,
    SELECTIVE_UPDATE,
    ABSORB_QUERIES,
    LATENT_VALUES
};

/* One operation; replay.py makes them. What `sizes` and `places` hold depends on the kind. */
typedef struct {
    int64_t kind;
    void *output;
    const void *first, *second; /* second NULL: the operand is `number` */
    int64_t sizes[DIMENSIONS + 1];
    int64_t strides[3][DIMENSIONS]; /* of output, first, second, in elements */
    const void *places[4];
    double number, other;
} Operation;

/* What differs from run to run. */
typedef struct {
    void *const *given;
    const void *parts;     /* of attention */
    const int64_t *starts; /* likewise */
    int threads;
} Run;

typedef struct {
    const Operation *operation;
    int64_t rows, pieces; /* pieces of each row */
    atomic_llong next;
} Work;

#define PIECE 4096 /* elements of a row that are computed at a time */

INLINE Eight compute8(int64_t kind, Eight first, Eight second)
{
    return kind == ADD ? add8(first, second) : multiply8(first, second);
}

INLINE float compute(int64_t kind, float first, float second)
{
    return kind == ADD ? first + second : first * second;
}

/* Sums or products of a row; those of one with a number if `second` stays where it is. */
INLINE void combine(int64_t kind, uint16_t *output, int64_t to, const uint16_t *first, int64_t from,
                    const uint16_t *second, int64_t by, float number, int64_t count)
{
    int64_t i = 0;
    if (to == 1 && from == 1 && (by == 1 || by == 0)) {
        Eight same = same8(number);
        for (; i + 8 <= count; i += 8) {
            Eight other = by ? load8(second + i) : same;
            store8(output + i, rounded8(compute8(kind, load8(first + i), other)));
        }
    }
    for (; i < count; i++) {
        float other = by ? widened(second[i * by]) : number;
        output[i * to] = narrowed(compute(kind, widened(first[i * from]), other));
    }
}

static void compute_row(const Operation *o, uint16_t *output, const uint16_t *first,
                        const uint16_t *second, int64_t count)
{
    const int last = DIMENSIONS - 1;
    int64_t to = o->strides[0][last], from = o->strides[1][last];
    int64_t by = second ? o->strides[2][last] : 0;
    float number = second ? widened(*second) : (float)o->number;
    switch (o->kind) {
    case COPY:
        if (to == 1 && from == 1)
            memcpy(output, first, (size_t)count * sizeof *output);
        else
            for (int64_t i = 0; i < count; i++)
                output[i * to] = first[i * from];
        return;
    case LOOK_UP:
        for (int64_t i = 0; i < count; i++)
            output[i * to] = ((const uint16_t *)o->places[0])[first[i * from]];
        return;
    case ADD:
        combine(ADD, output, to, first, from, second, by, number, count);
        return;
    case MULTIPLY:
        combine(MULTIPLY, output, to, first, from, second, by, number, count);
        return;
    }
}

static void compute_pieces(void *data)
{
    Work *w = data;
    const Operation *o = w->operation;
    for (;;) {
        int64_t piece = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (piece >= w->rows * w->pieces)
            return;
        int64_t row = piece / w->pieces, start = piece % w->pieces * PIECE;
        int64_t count = o->sizes[DIMENSIONS - 1] - start;
        int64_t at[3];
        for (int n = 0; n < 3; n++)
            at[n] = start * o->strides[n][DIMENSIONS - 1];
        for (int d = DIMENSIONS - 2; d >= 0; d--) {
            int64_t index = row % o->sizes[d];
            row /= o->sizes[d];
            for (int n = 0; n < 3; n++)
                at[n] += index * o->strides[n][d];
        }
        compute_row(o, (uint16_t *)o->output + at[0], (const uint16_t *)o->first + at[1],
                    o->second ? (const uint16_t *)o->second + at[2] : NULL,
                    count < PIECE ? count : PIECE);
    }
}

/* Elements for which a second thread is worth starting. */
#define ELEMENTS_OF_THREAD 16384

static void compute_elements(const Operation *o, int threads)
{
    Work w = {.operation = o, .rows = 1};
    for (int d = 0; d < DIMENSIONS - 1; d++)
        w.rows *= o->sizes[d];
    w.pieces = (o->sizes[DIMENSIONS - 1] + PIECE - 1) / PIECE;
    int64_t most = w.rows * o->sizes[DIMENSIONS - 1] / ELEMENTS_OF_THREAD;
    most = most > w.rows * w.pieces ? w.rows * w.pieces : most;
    in_threads(compute_pieces, &w, most > threads ? threads : most > 1 ? (int)most : 1);
}

static int carry_out(const Operation *o, const Run *run)
{
    const int64_t *sizes = o->sizes;
    const void *const *read = o->first;
    switch (o->kind) {
    case INPUT: /* bytes, which input */
        memcpy(o->output, run->given[sizes[1]], (size_t)sizes[0]);
        return 0;
    case NORM: /* rows, columns, kind */
        rms_norm(o->first, o->output, o->second, sizes[0], sizes[1], (float)o->number,
                 (int)sizes[2], run->threads);
        return 0;
    case INT8_PRODUCTS: /* weights, rows, inputs, instructions */
        return int8_products(o->first, o->output, o->second, (int)sizes[0], sizes[1], sizes[2],
                             BFLOAT16, run->threads, (int)sizes[3]);
    case INT4_PRODUCTS: /* weights, rows, inputs, instructions, group */
        return int4_products(o->first, o->output, o->second, (int)sizes[0], sizes[1], sizes[2],
                             sizes[4], BFLOAT16, run->threads, (int)sizes[3]);
    case ROW_PRODUCTS: /* weights, rows, inputs, instructions */
        return row_products(o->first, o->output, o->second, (int)sizes[0], sizes[1], sizes[2],
                            run->threads, (int)sizes[3]);
    case ATTENTION: /* how keys and values are kept */
        return attend_tokens(o->first, o->second, o->places[0], o->output, o->places[1], NULL,
                             o->places[2], run->parts, run->starts, o->places[3],
                             (float)o->number, (float)o->other, (int)sizes[0], run->threads);
    case EXPERT_PRODUCTS: /* choices, sharing, inputs, group, instructions; weights, form */
        return expert_products(o->first, o->output, o->second, o->places[0], (int64_t)o->number,
                               sizes[0], sizes[1], sizes[2], sizes[3], (int)o->other, run->threads,
                               (int)sizes[4]);
    case CONVOLUTION: /* silu; weight, bias, how it lies */
        convolve(o->first, (uint16_t *)o->second, o->places[0], o->places[1], o->output, o->places[2],
                 (int)sizes[0]);
        return 0;
    case DELTA_RULE: /* which are the states before and after */
        delta_rule(read[0], read[1], read[2], read[3], read[4], run->given[sizes[0]],
                   run->given[sizes[1]], o->output, o->second, run->threads);
        return 0;
    case SELECTIVE_UPDATE: /* likewise */
        selective_update(read[0], read[1], read[2], read[3], read[4], read[5], read[6], read[7],
                         run->given[sizes[0]], run->given[sizes[1]], o->output, o->second,
                         run->threads);
        return 0;
    case ABSORB_QUERIES: /* how they lie */
        return absorb_queries(o->first, o->second, o->output, o->places[0], run->threads);
    case LATENT_VALUES: /* likewise */
        return latent_values(o->first, o->second, o->output, o->places[0], run->threads);
    default:
        compute_elements(o, run->threads);
        return 0;
    }
}

/* Carries out operations one after another. Returns 0, or 1 if there is no memory. */
EXPORT int replay(const Operation *operations, int64_t count, void *const *given, const void *parts,
                  const int64_t *starts, int threads)
{
    const Run run = {.given = given, .parts = parts, .starts = starts, .threads = threads};
    for (int64_t n = 0; n < count; n++)
        if (carry_out(operations + n, &run))
            return 1;
    return 0;
}
EIGHTS_END
