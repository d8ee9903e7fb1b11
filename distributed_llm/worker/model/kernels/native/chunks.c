/* Attention of a chunk of one sequence, the last of its positions, over keys and values in bfloat16 that lie in
 * several places: blocks of rows pass over blocks of keys, with the softmax as it stands so far [1].
 *
 * A row is a token with one of the heads that share a key. Scores of a row with KEYS keys, and its sums of
 * values, are products of bfloat16 matrices, whose right one is packed so that pairs of numbers lie beside
 * those of the next column: keys [dim / 2][KEYS][2], values [KEYS / 2][value_dim][2].
 *
 * [1] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
 *     2022. */
#include "floats.h"
#include "instructions.h"
#include "memory.h"
#include "parts.h"
#include "processor.h"
#include "threads.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

/* Other compilers keep no sums of so many in registers, without the words of GCC. */
#if defined(X86) && defined(GNU)
INSTRUCTIONS("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "eights.h"

#define LANES 16
#define KEYS 64          /* that are computed together */
#define MOST_VECTORS 4   /* of a row of sums in registers */
#define ROWS_AT_ONCE 4   /* of a tile */
#define ROWS_OF_ITEM 256 /* or more: of one token */

typedef struct {
    const uint16_t *queries; /* [heads][tokens][dim], with these strides */
    uint16_t *output;        /* [tokens, heads, value_dim] */
    const float *sinks;      /* [heads]: logits that take part without a value; or NULL */
    const Part *parts;       /* of all positions, in order; the chunk's are the last */
    int64_t num_parts, positions, tokens, heads, kv_heads, dim, value_dim;
    int64_t query_head, query_token, window; /* window 0: all */
    float scale, softcap;                    /* softcap 0: none */
    int64_t items_of_head, tokens_of_item;
    atomic_llong next;
    atomic_int failed;
} Work;

/* Some tokens with one head of keys, and memory for them. Rows are in the order of tokens, then heads. */
typedef struct {
    int64_t kv_head, token, group, rows, width; /* first token; numbers of a row of sums */
    uint16_t *queries;                          /* [rows, dim] */
    float *sums, *largest, *totals;             /* [rows, width], [rows], [rows] */
    uint32_t *keys, *values;                    /* packed */
    float *scores;                              /* [ROWS_AT_ONCE, KEYS] */
    uint16_t *weights;                          /* likewise */
} Item;

/* e**x, as `exp8` computes it. */
INLINE __m512 exp16(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x); /* of a NaN and another, the second is taken */
    x = _mm512_min_ps(_mm512_set1_ps(88.3f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(x, x), _mm512_add_ps(x, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

INLINE __m512 tanh16(__m512 x)
{
    __m512 power = exp16(_mm512_add_ps(x, x));
    __m512 above = _mm512_sub_ps(power, _mm512_set1_ps(1.0f));
    return _mm512_div_ps(above, _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
}

INLINE __m512i two_numbers(const uint16_t *from)
{
    int32_t two;
    memcpy(&two, from, sizeof two);
    return _mm512_set1_epi32(two);
}

/* sums[r][i] = sums[r][i] * fades[r] + left[r] . column i of `right`, for a few rows and vectors of columns;
 * without `fades`, what was there does not count. */
INLINE void multiply_tile(float *sums, int64_t next_sum, const float *fades, const uint16_t *left,
                          int64_t next_left, const uint32_t *right, int64_t next_right, int64_t pairs,
                          const int vectors)
{
    __m512 own[ROWS_AT_ONCE][MOST_VECTORS];
    UNROLLED for (int r = 0; r < ROWS_AT_ONCE; r++)
        UNROLLED for (int v = 0; v < vectors; v++)
            own[r][v] = fades ? _mm512_mul_ps(_mm512_loadu_ps(sums + r * next_sum + v * LANES),
                                              _mm512_set1_ps(fades[r]))
                              : _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; i++) {
        __m512i columns[MOST_VECTORS];
        UNROLLED for (int v = 0; v < vectors; v++)
            columns[v] = _mm512_loadu_si512(right + i * next_right + v * LANES);
        UNROLLED for (int r = 0; r < ROWS_AT_ONCE; r++) {
            __m512i two = two_numbers(left + r * next_left + 2 * i);
            UNROLLED for (int v = 0; v < vectors; v++)
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(own[r][v]) : "v"(columns[v]), "v"(two));
        }
    }
    UNROLLED for (int r = 0; r < ROWS_AT_ONCE; r++)
        UNROLLED for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(sums + r * next_sum + v * LANES, own[r][v]);
}

/* Packs `count` keys; where there are fewer than KEYS, the last one stands for others. */
static void pack_keys(uint32_t *to, const uint8_t *from, int64_t stride, int64_t count, int64_t dim)
{
    const int64_t whole = dim / 16 * 16;
    for (int64_t p = 0; p < KEYS; p += 8) {
        const uint8_t *keys[8];
        for (int64_t n = 0; n < 8; n++)
            keys[n] = from + (p + n < count ? p + n : count - 1) * stride;
        for (int64_t i = 0; i < whole; i += 16) { /* eight pairs of eight keys */
            Eight rows[8], columns[8];
            UNROLLED for (int n = 0; n < 8; n++)
                rows[n] = load_floats8((const float *)(keys[n] + 2 * i));
            exchange8(rows, columns);
            UNROLLED for (int n = 0; n < 8; n++)
                store_floats8((float *)(to + (i / 2 + n) * KEYS + p), columns[n]);
        }
        for (int64_t i = whole; i < dim; i += 2)
            for (int64_t n = 0; n < 8; n++)
                memcpy(to + i / 2 * KEYS + p + n, keys[n] + 2 * i, 4);
    }
}

/* Packs `count` values; an odd one is beside zeros. */
static void pack_values(uint32_t *to, const uint8_t *from, int64_t stride, int64_t count, int64_t dim,
                        int64_t width)
{
    for (int64_t p = 0; p < count; p += 2, to += width) {
        const uint16_t *first = (const uint16_t *)(from + p * stride);
        const uint16_t *second = (const uint16_t *)(from + (p + 1) * stride);
        if (p + 1 < count)
            for (int64_t i = 0; i < dim; i++)
                to[i] = first[i] | (uint32_t)second[i] << 16;
        else
            for (int64_t i = 0; i < dim; i++)
                to[i] = first[i];
    }
}

/* Makes weights of the scores of a row, of which the keys [first, last) count, as the softmax stands now;
 * returns what earlier sums fade by. */
INLINE float weigh(const Work *w, const float *scores, uint16_t *weights, int64_t first, int64_t last,
                   float *largest, float *total)
{
    uint64_t shown = last <= first ? 0 : ~0ull >> (KEYS - (last - first)) << first;
    __m512 own[KEYS / LANES], highest = _mm512_set1_ps(*largest);
    UNROLLED for (int n = 0; n < KEYS / LANES; n++) {
        own[n] = _mm512_mul_ps(_mm512_loadu_ps(scores + n * LANES), _mm512_set1_ps(w->scale));
        if (w->softcap != 0.0f)
            own[n] = _mm512_mul_ps(tanh16(_mm512_div_ps(own[n], _mm512_set1_ps(w->softcap))),
                                   _mm512_set1_ps(w->softcap));
        highest = _mm512_mask_max_ps(highest, (__mmask16)(shown >> n * LANES), own[n], highest);
    }
    float most = _mm512_reduce_max_ps(highest);
    __m512 sum = _mm512_setzero_ps();
    UNROLLED for (int n = 0; n < KEYS / LANES; n++) {
        __m512 weight = exp16(_mm512_sub_ps(own[n], _mm512_set1_ps(most)));
        own[n] = _mm512_maskz_mov_ps((__mmask16)(shown >> n * LANES), weight);
        sum = _mm512_add_ps(sum, own[n]);
    }
    UNROLLED for (int n = 0; n < KEYS / LANES; n += 2)
        _mm512_storeu_si512(weights + n * LANES, (__m512i)_mm512_cvtne2ps_pbh(own[n + 1], own[n]));
    float fade = *largest == most ? 1.0f : expf(*largest - most);
    *total = *total * fade + _mm512_reduce_add_ps(sum);
    *largest = most;
    return fade;
}

/* Attention of a few rows over `count` packed keys, which are positions from `start` on. */
static void attend_tile(const Work *w, const Item *item, int64_t row, int64_t start, int64_t count)
{
    const int64_t before = w->positions - w->tokens + item->token;
    float *sums = item->sums + row * item->width, fades[ROWS_AT_ONCE];
    if (start > before + (row + ROWS_AT_ONCE - 1) / item->group)
        return; /* these rows see none of them */
    multiply_tile(item->scores, KEYS, NULL, item->queries + row * w->dim, w->dim, item->keys, KEYS,
                  w->dim / 2, KEYS / LANES);
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        int64_t position = before + (row + r) / item->group, last = position + 1 - start;
        int64_t first = w->window ? position + 1 - w->window - start : 0;
        fades[r] = weigh(w, item->scores + r * KEYS, item->weights + r * KEYS, first < 0 ? 0 : first,
                         last < count ? last : count, item->largest + row + r, item->totals + row + r);
    }
    int64_t column = 0;
    for (; column + MOST_VECTORS * LANES <= item->width; column += MOST_VECTORS * LANES)
        multiply_tile(sums + column, item->width, fades, item->weights, KEYS, item->values + column,
                      item->width, (count + 1) / 2, MOST_VECTORS);
    for (; column < item->width; column += LANES)
        multiply_tile(sums + column, item->width, fades, item->weights, KEYS, item->values + column,
                      item->width, (count + 1) / 2, 1);
}

/* Copies the queries of an item, and sets its sums to those of no keys. */
static void begin_item(const Work *w, const Item *item)
{
    for (int64_t row = 0; row < item->rows; row++) {
        const int64_t head = item->kv_head * item->group + row % item->group;
        const int64_t token = item->token + row / item->group;
        uint16_t *own = item->queries + row * w->dim;
        if (token < w->tokens)
            memcpy(own, w->queries + head * w->query_head + token * w->query_token,
                   (size_t)w->dim * sizeof *own);
        else
            memset(own, 0, (size_t)w->dim * sizeof *own); /* rows that fill a tile */
        item->largest[row] = w->sinks ? w->sinks[head] : -INFINITY;
        item->totals[row] = w->sinks ? 1.0f : 0.0f;
    }
    memset(item->sums, 0, (size_t)(item->rows * item->width) * sizeof *item->sums);
}

static void write_item(const Work *w, const Item *item, int64_t tokens)
{
    for (int64_t row = 0; row < tokens * item->group; row++) {
        const int64_t head = item->kv_head * item->group + row % item->group;
        uint16_t *output =
            w->output + ((item->token + row / item->group) * w->heads + head) * w->value_dim;
        Eight factor = same8(1.0f / item->totals[row]);
        for (int64_t i = 0; i < w->value_dim; i += 8)
            store8(output + i, rounded8(multiply8(
                                   load_floats8(item->sums + row * item->width + i), factor)));
    }
}

static void attend_item(const Work *w, Item *item)
{
    const int64_t left = w->tokens - item->token;
    const int64_t tokens = left < w->tokens_of_item ? left : w->tokens_of_item;
    const int64_t before = w->positions - w->tokens + item->token;
    const int64_t lowest = w->window ? before + 1 - w->window : 0;
    item->rows = (tokens * item->group + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    begin_item(w, item);
    int64_t part_start = 0;
    for (int64_t n = 0; n < w->num_parts; part_start += w->parts[n++].positions) {
        const Part *part = w->parts + n;
        int64_t start = lowest > part_start ? lowest : part_start;
        int64_t stop = part_start + part->positions;
        stop = stop < before + tokens ? stop : before + tokens;
        for (; start < stop; start += KEYS) {
            int64_t count = stop - start < KEYS ? stop - start : KEYS, at = start - part_start;
            pack_keys(item->keys, part->keys + item->kv_head * part->key_head + at * part->key_position,
                      part->key_position, count, w->dim);
            pack_values(item->values,
                        part->values + item->kv_head * part->value_head + at * part->value_position,
                        part->value_position, count, w->value_dim, item->width);
            for (int64_t row = 0; row < item->rows; row += ROWS_AT_ONCE)
                attend_tile(w, item, row, start, count);
        }
    }
    write_item(w, item, tokens);
}

/* Sets where so many bytes begin in memory, `at` bytes in; returns where they end. */
static size_t take(char *memory, size_t at, void **begin, size_t nbytes)
{
    *begin = memory ? memory + at : NULL;
    return at + (nbytes + LINE - 1) / LINE * LINE;
}

/* Sets where an item's numbers are in memory, or returns how many bytes that takes. */
static size_t lay_out(const Work *w, Item *item, char *memory)
{
    const size_t rows = (size_t)(w->tokens_of_item * item->group + ROWS_AT_ONCE);
    size_t at = take(memory, 0, (void **)&item->queries, rows * (size_t)w->dim * 2);
    at = take(memory, at, (void **)&item->sums, rows * (size_t)item->width * 4);
    at = take(memory, at, (void **)&item->largest, rows * 4);
    at = take(memory, at, (void **)&item->totals, rows * 4);
    at = take(memory, at, (void **)&item->keys, (size_t)w->dim * KEYS * 2);
    at = take(memory, at, (void **)&item->values, (size_t)item->width * KEYS * 2);
    at = take(memory, at, (void **)&item->scores, ROWS_AT_ONCE * KEYS * 4);
    return take(memory, at, (void **)&item->weights, ROWS_AT_ONCE * KEYS * 2);
}

static void attend_some(void *data)
{
    Work *w = data;
    Item item = {.group = w->heads / w->kv_heads,
                 .width = (w->value_dim + LANES - 1) / LANES * LANES};
    size_t nbytes = lay_out(w, &item, NULL);
    char *memory = calloc(nbytes + LINE, 1); /* columns that fill a vector are multiplied too */
    if (!memory) {
        atomic_store(&w->failed, 1);
        return;
    }
    lay_out(w, &item, at_line(memory));
    for (;;) {
        int64_t number = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (number >= w->kv_heads * w->items_of_head)
            break;
        item.kv_head = number % w->kv_heads;
        /* The last tokens take the longest. */
        item.token = (w->items_of_head - 1 - number / w->kv_heads) * w->tokens_of_item;
        attend_item(w, &item);
    }
    free(memory);
}

EXPORT int can_attend_chunks(void) { return has_bfloat16(); }

/* dim and value_dim are multiples of 8. Returns 0, or 1 if there is no memory. */
EXPORT int attend_chunk(const uint16_t *queries, uint16_t *output, const float *sinks, const void *parts,
                        const int64_t *sizes, float scale, float softcap, int threads)
{
    Work w = {.queries = queries, .output = output, .sinks = sinks, .parts = parts,
              .num_parts = sizes[0], .positions = sizes[1], .tokens = sizes[2], .heads = sizes[3],
              .kv_heads = sizes[4], .dim = sizes[5], .value_dim = sizes[6], .query_head = sizes[7],
              .query_token = sizes[8], .window = sizes[9], .scale = scale, .softcap = softcap};
    w.tokens_of_item = ROWS_OF_ITEM / (w.heads / w.kv_heads);
    w.tokens_of_item = w.tokens_of_item < 1 ? 1 : w.tokens_of_item;
    w.items_of_head = (w.tokens + w.tokens_of_item - 1) / w.tokens_of_item;
    in_threads(attend_some, &w, threads);
    return atomic_load(&w.failed);
}
INSTRUCTIONS_END
#else
EXPORT int can_attend_chunks(void) { return 0; }

EXPORT int attend_chunk(const uint16_t *queries, uint16_t *output, const float *sinks, const void *parts,
                        const int64_t *sizes, float scale, float softcap, int threads)
{
    (void)queries, (void)output, (void)sinks, (void)parts, (void)sizes, (void)scale, (void)softcap,
        (void)threads;
    return 1;
}
#endif
