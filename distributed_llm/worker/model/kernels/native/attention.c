/* Attention of single tokens over keys and values in bfloat16 or 8 bits, which lie in several places, and
 * whose newest position is written first: one pass over the positions, with the softmax as it stands so far [1].
 *
 * [1] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
 *     2022. */
#include "floats.h"
#include "instructions.h"
#include "memory.h"
#include "threads.h"

#include <stdlib.h>

EIGHTS
#include "attention.h"

#define MOST_SCORED 2 /* heads for which a key is read once, and the registers have room */
#define MOST_ADDED 4  /* heads for which a value is */
#define FEWEST_HEADS 4 /* of one key that are worth a thread of their own, which reads the key again */

INLINE Eight scale8(const uint8_t *from, float factor)
{
    uint16_t narrow;
    memcpy(&narrow, from, sizeof narrow);
    return same8(widened(narrow) * factor);
}

/* Rows of `columns` numbers, of which each is `width` behind the one before. */
static void widen_rows(float *to, int64_t width, const uint8_t *from, int64_t rows, int64_t stride,
                       int64_t columns, int kept)
{
    for (int64_t row = 0; row < rows; row++, from += stride, to += width) {
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

/* scores[h][p] = queries[h] . keys[p] for a few heads and four rows. */
INLINE void score_heads(float *scores, const float *queries, const float *keys, int64_t width,
                        const int heads)
{
    Eight sums[MOST_SCORED][4];
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < 4; n++)
            sums[h][n] = zero8();
    for (int64_t i = 0; i < width; i += 8)
        for (int h = 0; h < heads; h++) {
            Eight query = load_floats8(queries + h * width + i);
            for (int n = 0; n < 4; n++)
                sums[h][n] = multiply_add8(query, load_floats8(keys + n * width + i), sums[h][n]);
        }
    for (int h = 0; h < heads; h++)
        store_sums8(scores + h * POSITIONS, sums[h]);
}

/* The scores of `heads` heads and POSITIONS rows, of which the last ones need not be there. */
static void score(float *scores, const float *queries, const float *keys, int64_t width, int64_t heads)
{
    for (int p = 0; p < POSITIONS; p += 4) { /* these keys stay in the first cache */
        int64_t h = 0;
        for (; h + MOST_SCORED <= heads; h += MOST_SCORED)
            score_heads(scores + h * POSITIONS + p, queries + h * width, keys + p * width, width,
                        MOST_SCORED);
        for (; h < heads; h++)
            score_heads(scores + h * POSITIONS + p, queries + h * width, keys + p * width, width, 1);
    }
}

/* Adds what scores are biased by to those of some heads, of positions of which `left` are seen from the first
 * one on. */
static void add_biases(const Work *w, float *scores, int64_t first_head, int64_t heads, int64_t left,
                       int64_t count)
{
    for (int64_t h = 0; h < heads; h++) {
        const float *biases = w->biases + (first_head + h + 1) * w->reach - left;
        for (int64_t p = 0; p < count; p++)
            scores[h * POSITIONS + p] += biases[p];
    }
}

/* sums[h] = sums[h] * fades[h] + weights[h][p] * values[p] for a few heads and all positions, whose values
 * are `stride` apart. */
INLINE void add_values(float *sums, const float *weights, const float *fades, const float *values,
                       int64_t stride, int64_t dim, int64_t positions, const int heads)
{
    for (int64_t i = 0; i < dim; i += 8) {
        Eight own[MOST_ADDED], other[MOST_ADDED];
        for (int h = 0; h < heads; h++) {
            own[h] = multiply8(load_floats8(sums + h * dim + i), same8(fades[h]));
            other[h] = zero8();
        }
        int64_t p = 0;
        for (; p + 2 <= positions; p += 2) {
            Eight value = load_floats8(values + p * stride + i);
            Eight next = load_floats8(values + (p + 1) * stride + i);
            for (int h = 0; h < heads; h++) {
                const float *weight = weights + h * POSITIONS + p;
                own[h] = multiply_add8(same8(*weight), value, own[h]);
                other[h] = multiply_add8(same8(weight[1]), next, other[h]);
            }
        }
        if (p < positions)
            for (int h = 0; h < heads; h++)
                own[h] = multiply_add8(same8(weights[h * POSITIONS + p]),
                                       load_floats8(values + p * stride + i), own[h]);
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

/* Returns the numbers of float32 that so many heads take, and sets where each is in `memory`, if any. */
static int64_t divide(Memory *m, const Work *w, int64_t heads, float *memory)
{
    float *next = memory;
    m->keys = next, next += POSITIONS * w->width;
    m->values = w->width > w->dim ? m->keys + w->dim : next;
    m->stride = w->width > w->dim ? w->width : w->value_dim;
    next += w->width > w->dim ? 0 : POSITIONS * w->value_dim;
    m->queries = next, next += heads * w->width;
    m->sums = next, next += heads * w->value_dim;
    m->scores = next, next += heads * POSITIONS;
    m->largest = next, next += heads;
    m->totals = next, next += heads;
    m->fades = next, next += heads;
    return next - memory;
}

/* What one token's heads [first, first + count) score with. */
static void begin_heads(const Work *w, const Memory *m, int64_t token, int64_t first, int64_t count)
{
    for (int64_t h = 0; h < count; h++) {
        const uint16_t *query = w->queries + token * w->query_token + (first + h) * w->query_head;
        float *own = m->queries + h * w->width;
        if (w->rotation)
            rotate(own, query, w->rotation, w->dim);
        for (int64_t i = 0; i < w->width; i++)
            own[i] = (w->rotation && i < w->dim ? own[i] : widened(query[i])) * w->scale;
        memset(m->sums + h * w->value_dim, 0, (size_t)w->value_dim * sizeof(float));
        m->largest[h] = w->sinks ? w->sinks[first + h] : -INFINITY;
        m->totals[h] = w->sinks ? 1.0f : 0.0f;
    }
}

/* Attention of some of one token's heads of one key. */
static void attend_heads(const Work *w, const Memory *m, int64_t token, int64_t kv_head,
                         int64_t first_head, int64_t heads)
{
    int64_t left = 0;
    for (int64_t number = w->starts[token]; number < w->starts[token + 1]; number++)
        left += w->parts[number].positions;
    begin_heads(w, m, token, first_head, heads);
    for (int64_t number = w->starts[token]; number < w->starts[token + 1]; number++) {
        const Part *part = w->parts + number;
        const uint8_t *own_keys = part->keys + kv_head * part->key_head;
        const uint8_t *own_values = part->values + kv_head * part->value_head;
        for (int64_t first = 0; first < part->positions; first += POSITIONS) {
            int64_t count = part->positions - first < POSITIONS ? part->positions - first : POSITIONS;
            widen_rows(m->keys, w->width, own_keys + first * part->key_position, count,
                       part->key_position, w->dim, w->kept);
            widen_rows(m->values, m->stride, own_values + first * part->value_position, count,
                       part->value_position, w->value_dim, w->kept);
            score(m->scores, m->queries, m->keys, w->width, heads);
            if (w->biases)
                add_biases(w, m->scores, first_head, heads, left, count);
            left -= count;
            int64_t h = 0;
            for (; h < heads; h++)
                m->fades[h] = weigh(m->scores + h * POSITIONS, count, w->softcap, m->largest + h,
                                    m->totals + h);
            for (h = 0; h + MOST_ADDED <= heads; h += MOST_ADDED)
                add_values(m->sums + h * w->value_dim, m->scores + h * POSITIONS, m->fades + h,
                           m->values, m->stride, w->value_dim, count, MOST_ADDED);
            for (; h < heads; h++)
                add_values(m->sums + h * w->value_dim, m->scores + h * POSITIONS, m->fades + h,
                           m->values, m->stride, w->value_dim, count, 1);
        }
    }
    for (int64_t h = 0; h < heads; h++) {
        uint16_t *output = w->output + (token * w->heads + first_head + h) * w->value_dim;
        Eight factor = same8(1.0f / m->totals[h]);
        for (int64_t i = 0; i < w->value_dim; i += 8)
            store8(output + i, rounded8(multiply8(
                                   load_floats8(m->sums + h * w->value_dim + i), factor)));
    }
}

/* Heads of one key that are computed together at most. */
static int64_t heads_of_piece(const Work *w)
{
    return (w->heads / w->kv_heads + w->pieces - 1) / w->pieces;
}

static void attend_some(void *data)
{
    Work *w = data;
    const int64_t group = w->heads / w->kv_heads, most = heads_of_piece(w);
    Attend *attend = attend_heads;
#ifdef WITH_PAIRS
    if (can_attend_latents(w))
        attend = attend_latents;
#endif
    Memory m;
    size_t bytes = (size_t)divide(&m, w, most, NULL) * sizeof(float);
    char *memory = malloc(bytes + LINE);
    if (!memory) {
        atomic_store(&w->failed, 1);
        return;
    }
    divide(&m, w, most, at_line(memory));
    /* Rows of keys that are not there yet are scored. */
    memset(m.keys, 0, (size_t)(POSITIONS * w->width) * sizeof(float));
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (item >= w->tokens * w->kv_heads * w->pieces)
            break;
        int64_t token = item / w->pieces / w->kv_heads, kv_head = item / w->pieces % w->kv_heads;
        int64_t first = item % w->pieces * most, count = group - first < most ? group - first : most;
        if (w->pieces == 1 && w->keys)
            keep_newest(w, token, kv_head, m.keys, m.values);
        if (count > 0)
            attend(w, &m, token, kv_head, kv_head * group + first, count);
    }
    free(memory);
}

/* Has more threads than there are keys compute each some heads of one, which is kept before. */
static void cut_heads(Work *w, int threads)
{
    const int64_t group = w->heads / w->kv_heads, items = w->tokens * w->kv_heads;
    int64_t pieces = (threads + items - 1) / items, most = group / FEWEST_HEADS;
    w->pieces = pieces < most ? pieces : most > 1 ? most : 1;
    if (w->pieces == 1 || !w->keys)
        return;
    float *memory = malloc((size_t)(w->dim + w->value_dim) * sizeof(float));
    if (!memory) {
        atomic_store(&w->failed, 1);
        return;
    }
    for (int64_t item = 0; item < items; item++)
        keep_newest(w, item / w->kv_heads, item % w->kv_heads, memory, memory + w->dim);
    free(memory);
}

/* dim and value_dim are multiples of 8; width is dim, or dim + value_dim where queries score values too,
 * behind the keys, as with latents, and no biases are added. Returns 0, or 1 if there is no memory. */
EXPORT int attend_tokens(const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
                         uint16_t *output, const float *sinks, const float *biases,
                         const float *rotation, const void *parts, const int64_t *starts, const int64_t *sizes, float scale,
                         float softcap, int kept, int threads)
{
    Work w = {.queries = queries, .keys = keys, .values = values, .output = output, .sinks = sinks,
              .rotation = rotation, .parts = parts, .starts = starts, .tokens = sizes[0],
              .heads = sizes[1], .kv_heads = sizes[2], .dim = sizes[3], .value_dim = sizes[4],
              .width = sizes[5], .query_token = sizes[6], .query_head = sizes[7],
              .key_token = sizes[8], .key_head = sizes[9], .value_token = sizes[10],
              .value_head = sizes[11], .scale = scale, .softcap = softcap, .kept = kept,
              .instructions = (int)sizes[12], .biases = biases, .reach = sizes[13]};
    cut_heads(&w, threads);
    if (!atomic_load(&w.failed))
        in_threads(attend_some, &w, threads);
    return atomic_load(&w.failed);
}
EIGHTS_END
