/* Weights brought into the orders that products read them in; products.h describes them. */
#include "instructions.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* rows of a block */
#define SIDE 8   /* rows and columns that are exchanged at once */
#define HIGHEST_BITS 0x80808080u /* of four bytes: a code of 8 bits is kept as code + 128 */

EIGHTS
#include "eights.h"

/* What the threads of one call share. */
typedef struct {
    const void *rows;
    uint32_t *blocks;
    int64_t num_rows, columns; /* of units of four bytes */
    int64_t groups, group;     /* of codes of 4 bits */
    const float *scales, *offsets;
    float factor;
    atomic_llong next;
} Work;

/* Writes 8 rows of 8 units as 8 columns of a block. */
INLINE void exchange_units(const uint32_t *from, int64_t stride, uint32_t *to)
{
    Eight rows[SIDE], columns[SIDE];
    for (int i = 0; i < SIDE; i++)
        rows[i] = load_floats8((const float *)(from + i * stride));
    exchange8(rows, columns);
    for (int i = 0; i < SIDE; i++)
        store_floats8((float *)(to + i * LANES), flipped8(columns[i], HIGHEST_BITS));
}

static void pack_block8(const Work *w, int64_t block)
{
    const uint32_t *rows = (const uint32_t *)w->rows + block * LANES * w->columns;
    uint32_t *to = w->blocks + block * LANES * w->columns;
    int64_t here = w->num_rows - block * LANES;
    int64_t whole = (here < LANES ? here : LANES) / SIDE * SIDE, pieces = w->columns / SIDE * SIDE;
    for (int64_t column = 0; column < pieces; column += 2 * SIDE)
        for (int64_t lane = 0; lane < whole; lane += SIDE)
            for (int64_t own = column; own < pieces && own < column + 2 * SIDE; own += SIDE)
                exchange_units(rows + lane * w->columns + own, w->columns, to + own * LANES + lane);
    for (int64_t lane = 0; lane < LANES; lane++)
        for (int64_t column = lane < whole ? pieces : 0; column < w->columns; column++)
            to[column * LANES + lane] =
                HIGHEST_BITS ^ (lane < here ? rows[lane * w->columns + column] : 0);
}

/* Scales or offsets of a block's rows, of one group, as float16. */
INLINE void pack_numbers(const Work *w, const float *numbers, int64_t block, int64_t group, uint16_t *to)
{
    float own[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t row = block * LANES + lane;
        own[lane] = row < w->num_rows ? numbers[row * w->groups + group] / w->factor : 0.0f;
    }
    for (int half = 0; half < LANES; half += 8)
        store_halves8(to + half, load_floats8(own + half));
}

static void pack_block4(const Work *w, int64_t block)
{
    int64_t units = w->group / 8, each = LANES + units * LANES;
    uint32_t *blocks = w->blocks + block * w->groups * each;
    for (int64_t group = 0; group < w->groups; group++) {
        uint16_t *numbers = (uint16_t *)(blocks + group * each);
        pack_numbers(w, w->scales, block, group, numbers);
        pack_numbers(w, w->offsets, block, group, numbers + LANES);
    }
    for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t row = block * LANES + lane;
        const uint8_t *codes = (const uint8_t *)w->rows + row * w->groups * w->group;
        for (int64_t group = 0; group < w->groups; group++, codes += w->group) {
            uint32_t *to = blocks + group * each + LANES + lane;
            for (int64_t unit = 0; unit < units; unit++) {
                uint32_t low = 0, high = 0;
                if (row < w->num_rows) {
                    memcpy(&low, codes + 8 * unit, sizeof low);
                    memcpy(&high, codes + 8 * unit + 4, sizeof high);
                }
                to[unit * LANES] = low | high << 4;
            }
        }
    }
}

static void pack_some8(void *data)
{
    Work *w = data;
    for (;;) {
        int64_t block = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (block * LANES >= w->num_rows)
            return;
        pack_block8(w, block);
    }
}

static void pack_some4(void *data)
{
    Work *w = data;
    for (;;) {
        int64_t block = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (block * LANES >= w->num_rows)
            return;
        pack_block4(w, block);
    }
}

/* Packs codes of 8 bits, [num_rows, columns] of units of four, as products.h says of int8. */
EXPORT void pack_int8(const void *codes, void *blocks, int64_t num_rows, int64_t columns, int threads)
{
    Work w = {.rows = codes, .blocks = blocks, .num_rows = num_rows, .columns = columns};
    in_threads(pack_some8, &w, threads);
}

/* Packs codes [num_rows, groups * group], a byte each, and scales and offsets [num_rows, groups], divided
 * by `factor`, as products.h says of int4. */
EXPORT void pack_int4(const void *codes, const float *scales, const float *offsets, void *blocks,
                      int64_t num_rows, int64_t groups, int64_t group, float factor, int threads)
{
    Work w = {.rows = codes, .scales = scales, .offsets = offsets, .blocks = blocks, .num_rows = num_rows,
              .groups = groups, .group = group, .factor = factor};
    in_threads(pack_some4, &w, threads);
}

/* The largest magnitude of some numbers; a NaN if there is one. */
EXPORT float largest_magnitude(const float *numbers, int64_t count)
{
    uint32_t largest = 0; /* magnitudes are in the order of their bits */
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, numbers + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float most;
    memcpy(&most, &largest, sizeof most);
    return most;
}
EIGHTS_END
