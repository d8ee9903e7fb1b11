/* Attention of single tokens over keys and values in bfloat16 or 8 bits, which lie in several places, and
 * whose newest position is written first: one pass over the positions, with the softmax as it stands so far [1].
 *
 * [1] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
 *     2022. */
#include "floats.h"
#include "instructions.h"
#include "memory.h"
#include "threads.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

EIGHTS
#include "eights.h"

#define POSITIONS 32 /* that are computed together: their keys as float32 stay in the first cache */
#define MOST_SCORED 2 /* heads for which a key is read once, and the registers have room */
#define MOST_ADDED 4  /* heads for which a value is */

/* How the numbers of a row are kept: as they are, or as codes, behind which their scale is; coding.py. */
enum { BFLOAT16, INT8, FP8 };

/* Consecutive positions that a token attends to, in one place; strides in bytes. The last position of a
 * token's last part is its own, and not written yet. */
typedef struct {
    const uint8_t *keys, *values; /* of the first position and the first head */
    int64_t positions, key_head, key_position, value_head, value_position;
} Part;

typedef struct {
    const uint16_t *queries; /* [tokens] of [heads, dim], with these strides */
    const uint16_t *keys, *values; /* of the tokens themselves: of [kv_heads, dim], likewise */
    const float *rotation;   /* [dim, dim], for queries and keys; or NULL */
    uint16_t *output;        /* [tokens, heads, value_dim] */
    const float *sinks;      /* [heads]: logits that take part without a value; or NULL */
    const Part *parts;
    const int64_t *starts; /* [tokens + 1]: where each token's parts begin */
    int64_t tokens, heads, kv_heads, dim, value_dim;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    float scale, softcap; /* softcap 0: none */
    int kept;             /* how keys and values are */
    atomic_llong next;
    atomic_int failed;
} Work;

INLINE Eight scale8(const uint8_t *from, float factor)
{
    uint16_t narrow;
    memcpy(&narrow, from, sizeof narrow);
    return same8(widened(narrow) * factor);
}

static void widen_rows(float *to, const uint8_t *from, int64_t rows, int64_t stride, int64_t columns,
                       int kept)
{
    for (int64_t row = 0; row < rows; row++, from += stride, to += columns) {
        /* Positions that come next often begin a page, at which the processor stops reading ahead. */
        for (int64_t i = 0; i < columns * (kept == BFLOAT16 ? 2 : 1); i += 64)
            PREFETCH(from + POSITIONS * stride + i);
        if (kept == INT8) {
            Eight scale = scale8(from + columns, 1.0f);
            for (int64_t i = 0; i < columns; i += 8)
                store_floats8(to + i, multiply8(load_signed8(from + i), scale));
        } else if (kept == FP8) {
            Eight scale = scale8(from + columns, 256.0f);
            for (int64_t i = 0; i < columns; i += 8)
                store_floats8(to + i, multiply8(load_fp8(from + i), scale));
        } else {
            for (int64_t i = 0; i < columns; i += 8)
                store_floats8(to + i, load8((const uint16_t *)from + i));
        }
    }
}

/* scores[h][p] = queries[h] . keys[p] for a few heads and POSITIONS rows, of which the last ones need
 * not be there. */
INLINE void score_heads(float *scores, const float *queries, const float *keys, int64_t dim,
                        const int heads)
{
    for (int p = 0; p < POSITIONS; p += 4) {
        const float *k = keys + p * dim;
        Eight sums[MOST_SCORED][4];
        for (int h = 0; h < heads; h++)
            for (int n = 0; n < 4; n++)
                sums[h][n] = zero8();
        for (int64_t i = 0; i < dim; i += 8)
            for (int h = 0; h < heads; h++) {
                Eight query = load_floats8(queries + h * dim + i);
                for (int n = 0; n < 4; n++)
                    sums[h][n] = multiply_add8(query, load_floats8(k + n * dim + i), sums[h][n]);
            }
        for (int h = 0; h < heads; h++)
            store_sums8(scores + h * POSITIONS + p, sums[h]);
    }
}

/* Makes weights of one head's scores, as the softmax stands now; returns what earlier sums fade by. */
INLINE float weigh(float *scores, int64_t count, float softcap, float *largest, float *total)
{
    if (softcap != 0.0f)
        for (int64_t p = 0; p < count; p++)
            scores[p] = softcap * tanhf(scores[p] / softcap);
    for (int64_t p = count; p < POSITIONS; p++)
        scores[p] = scores[0];
    Eight highest = load_floats8(scores);
    for (int p = 8; p < POSITIONS; p += 8)
        highest = higher8(highest, load_floats8(scores + p));
    float most = fmaxf(*largest, largest8(highest));
    for (int64_t p = count; p < POSITIONS; p++)
        scores[p] = most - 87.0f; /* adds 1e-38 to the total */
    Eight sum = zero8();
    for (int p = 0; p < POSITIONS; p += 8) {
        Eight weight = exp8(subtract8(load_floats8(scores + p), same8(most)));
        store_floats8(scores + p, weight);
        sum = add8(sum, weight);
    }
    float fade = *largest == most ? 1.0f : expf(*largest - most);
    *total = *total * fade + sum8(sum);
    *largest = most;
    return fade;
}

/* sums[h] = sums[h] * fades[h] + weights[h][p] * values[p] for a few heads and all positions. */
INLINE void add_values(float *sums, const float *weights, const float *fades, const float *values,
                       int64_t dim, int64_t positions, const int heads)
{
    for (int64_t i = 0; i < dim; i += 8) {
        Eight own[MOST_ADDED], other[MOST_ADDED];
        for (int h = 0; h < heads; h++) {
            own[h] = multiply8(load_floats8(sums + h * dim + i), same8(fades[h]));
            other[h] = zero8();
        }
        int64_t p = 0;
        for (; p + 2 <= positions; p += 2) {
            Eight value = load_floats8(values + p * dim + i);
            Eight next = load_floats8(values + (p + 1) * dim + i);
            for (int h = 0; h < heads; h++) {
                const float *weight = weights + h * POSITIONS + p;
                own[h] = multiply_add8(same8(*weight), value, own[h]);
                other[h] = multiply_add8(same8(*(weight + 1)), next, other[h]);
            }
        }
        if (p < positions)
            for (int h = 0; h < heads; h++)
                own[h] = multiply_add8(same8(weights[h * POSITIONS + p]),
                                         load_floats8(values + p * dim + i), own[h]);
        for (int h = 0; h < heads; h++)
            store_floats8(sums + h * dim + i, add8(own[h], other[h]));
    }
}

/* to = from @ rotation; `to` has room for `dim` numbers. */
static void rotate(float *to, const uint16_t *from, const float *rotation, int64_t dim)
{
    for (int64_t column = 0; column < dim; column += 8) {
        Eight sum = zero8();
        for (int64_t i = 0; i < dim; i++)
            sum = multiply_add8(same8(widened(from[i])),
                                  load_floats8(rotation + i * dim + column), sum);
        store_floats8(to + column, sum);
    }
}

/* Returns the code of a number of at most 448: 1 + 4 + 3 bits, exponents biased by 7. */
static uint8_t fp8_code(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size < 121u << 23) /* below 2**-6 codes are multiples of 2**-9 */
        return (uint8_t)(sign | (uint32_t)nearbyintf(fabsf(value) * 512.0f));
    size += 0x7ffff + (size >> 20 & 1); /* to the nearest, ties to even */
    return (uint8_t)(sign | ((size >> 20) - (120 << 3)));
}

/* Makes a row of codes and a scale of bfloat16 numbers; `memory` has room for `dim` float32. */
static void keep_row(uint8_t *to, const uint16_t *from, int64_t dim, const float *rotation, int kept,
                     float *memory)
{
    if (kept == BFLOAT16) {
        memcpy(to, from, (size_t)dim * sizeof *from);
        return;
    }
    if (rotation)
        rotate(memory, from, rotation, dim);
    uint32_t largest = 0; /* bits, so that a NaN is larger than any number */
    for (int64_t i = 0; i < dim; i++) {
        memory[i] = rotation ? widened(narrowed(memory[i])) : widened(from[i]);
        uint32_t bits;
        memcpy(&bits, memory + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float most, limit = kept == INT8 ? 127.0f : 448.0f;
    memcpy(&most, &largest, sizeof most);
    uint16_t scale = narrowed(most / limit);
    if (scale < 0x80)
        scale = 0x80; /* the least normal number */
    memcpy(to + dim, &scale, sizeof scale);
    float divisor = widened(scale);
    for (int64_t i = 0; i < dim; i++) {
        float code = fminf(fmaxf(memory[i] / divisor, -limit), limit);
        to[i] = kept == INT8 ? (uint8_t)(int8_t)(int32_t)nearbyintf(code) : fp8_code(code);
    }
}

/* Writes a token's own key and value of one head where they are to be read. */
static void keep_newest(const Work *w, int64_t token, int64_t kv_head, float *for_key,
                        float *for_value)
{
    const Part *last = w->parts + w->starts[token + 1] - 1;
    uint8_t *key = (uint8_t *)last->keys + kv_head * last->key_head;
    uint8_t *value = (uint8_t *)last->values + kv_head * last->value_head;
    keep_row(key + (last->positions - 1) * last->key_position,
             w->keys + token * w->key_token + kv_head * w->key_head, w->dim, w->rotation, w->kept,
             for_key);
    keep_row(value + (last->positions - 1) * last->value_position,
             w->values + token * w->value_token + kv_head * w->value_head, w->value_dim, NULL,
             w->kept, for_value);
}

/* Attention of one token's heads of one key, in `memory` for (group + POSITIONS) rows of both. */
static void attend_item(const Work *w, int64_t token, int64_t kv_head, float *memory)
{
    const int64_t group = w->heads / w->kv_heads;
    float *queries = memory, *keys = queries + group * w->dim;
    float *sums = keys + POSITIONS * w->dim, *values = sums + group * w->value_dim;
    float *scores = values + POSITIONS * w->value_dim;
    float *largest = scores + group * POSITIONS, *totals = largest + group, *fades = totals + group;
    keep_newest(w, token, kv_head, keys, values);
    for (int64_t g = 0; g < group; g++) {
        const int64_t head = kv_head * group + g;
        const uint16_t *query = w->queries + token * w->query_token + head * w->query_head;
        float *own = queries + g * w->dim;
        if (w->rotation)
            rotate(own, query, w->rotation, w->dim);
        for (int64_t i = 0; i < w->dim; i++)
            own[i] = (w->rotation ? own[i] : widened(query[i])) * w->scale;
        memset(sums + g * w->value_dim, 0, (size_t)w->value_dim * sizeof(float));
        largest[g] = w->sinks ? w->sinks[head] : -INFINITY;
        totals[g] = w->sinks ? 1.0f : 0.0f;
    }
    for (int64_t number = w->starts[token]; number < w->starts[token + 1]; number++) {
        const Part *part = w->parts + number;
        const uint8_t *own_keys = part->keys + kv_head * part->key_head;
        const uint8_t *own_values = part->values + kv_head * part->value_head;
        for (int64_t first = 0; first < part->positions; first += POSITIONS) {
            int64_t count = part->positions - first < POSITIONS ? part->positions - first : POSITIONS;
            widen_rows(keys, own_keys + first * part->key_position, count, part->key_position,
                       w->dim, w->kept);
            widen_rows(values, own_values + first * part->value_position, count,
                       part->value_position, w->value_dim, w->kept);
            int64_t g = 0;
            for (; g + MOST_SCORED <= group; g += MOST_SCORED)
                score_heads(scores + g * POSITIONS, queries + g * w->dim, keys, w->dim, MOST_SCORED);
            for (; g < group; g++)
                score_heads(scores + g * POSITIONS, queries + g * w->dim, keys, w->dim, 1);
            for (g = 0; g < group; g++)
                fades[g] = weigh(scores + g * POSITIONS, count, w->softcap, largest + g, totals + g);
            for (g = 0; g + MOST_ADDED <= group; g += MOST_ADDED)
                add_values(sums + g * w->value_dim, scores + g * POSITIONS, fades + g, values,
                           w->value_dim, count, MOST_ADDED);
            for (; g < group; g++)
                add_values(sums + g * w->value_dim, scores + g * POSITIONS, fades + g, values,
                           w->value_dim, count, 1);
        }
    }
    for (int64_t g = 0; g < group; g++) {
        uint16_t *output = w->output + (token * w->heads + kv_head * group + g) * w->value_dim;
        Eight factor = same8(1.0f / totals[g]);
        for (int64_t i = 0; i < w->value_dim; i += 8)
            store8(output + i, rounded8(multiply8(
                                   load_floats8(sums + g * w->value_dim + i), factor)));
    }
}

static void attend_some(void *data)
{
    Work *w = data;
    int64_t group = w->heads / w->kv_heads;
    size_t numbers = (size_t)((group + POSITIONS) * (w->dim + w->value_dim) +
                              group * (POSITIONS + 3));
    char *own = malloc(numbers * sizeof(float) + LINE);
    if (!own) {
        atomic_store(&w->failed, 1);
        return;
    }
    float *memory = at_line(own);
    memset(memory, 0, numbers * sizeof(float)); /* rows of keys that are not there yet are scored */
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (item >= w->tokens * w->kv_heads)
            break;
        attend_item(w, item / w->kv_heads, item % w->kv_heads, memory);
    }
    free(own);
}

/* dim and value_dim are multiples of 8. Returns 0, or 1 if there is no memory. */
EXPORT int attend_tokens(const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
                         uint16_t *output, const float *sinks, const float *rotation,
                         const void *parts, const int64_t *starts, const int64_t *sizes, float scale,
                         float softcap, int kept, int threads)
{
    Work w = {.queries = queries, .keys = keys, .values = values, .output = output, .sinks = sinks,
              .rotation = rotation, .parts = parts, .starts = starts, .tokens = sizes[0],
              .heads = sizes[1], .kv_heads = sizes[2], .dim = sizes[3], .value_dim = sizes[4],
              .query_token = sizes[5], .query_head = sizes[6], .key_token = sizes[7],
              .key_head = sizes[8], .value_token = sizes[9], .value_head = sizes[10],
              .scale = scale, .softcap = softcap, .kept = kept};
    in_threads(attend_some, &w, threads);
    return atomic_load(&w.failed);
}
EIGHTS_END
