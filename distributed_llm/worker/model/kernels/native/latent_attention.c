/* Attention of one token's heads over latents, by instructions that multiply pairs of bfloat16: keys and
 * values are read as they are kept. */
#include "floats.h"
#include "instructions.h"
#include "processor.h"

#if defined(X86) && defined(GNU)
INSTRUCTIONS("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "attention.h"

#define HEADS 4   /* that are computed together, as registers have room for */
#define KEYS 4    /* with which they are scored at once */
#define COLUMNS 4 /* registers of sums, each of 16, that values are added to at once */
#define PAIRS (POSITIONS / 2)

/* Written out, because GCC copies sums to other registers around the intrinsic. */
INLINE __m512 multiply_pairs(__m512 sum, __m512i a, __m512i b)
{
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

int can_attend_latents(const Work *w)
{
    return w->instructions == AVX512VNNI && has_bfloat16() && w->kept == BFLOAT16 && w->width > w->dim && w->dim % 32 == 0 && w->value_dim % (16 * COLUMNS) == 0;
}

/* What some positions are scored with, and their values: keys[p] are numbers [dim], values[p] [value_dim]. */
typedef struct {
    const uint16_t *keys[POSITIONS], *values[POSITIONS];
} Rows;

INLINE __m256 halves_added(__m512 sum)
{
    return _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
}

INLINE void score_some(const Work *w, const Rows *rows, int first, const uint16_t *queries, float *scores,
                       const int heads)
{
    __m512 sums[HEADS][KEYS];
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < KEYS; n++)
            sums[h][n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < w->width; i += 32) {
        __m512i keys[KEYS];
        for (int n = 0; n < KEYS; n++)
            keys[n] = _mm512_loadu_si512(i < w->dim ? rows->keys[first + n] + i
                                                    : rows->values[first + n] + i - w->dim);
        for (int h = 0; h < heads; h++) {
            __m512i query = _mm512_loadu_si512(queries + h * w->query_head + i);
            for (int n = 0; n < KEYS; n++)
                sums[h][n] = multiply_pairs(sums[h][n], query, keys[n]);
        }
    }
    for (int h = 0; h < heads; h++) {
        __m256 pairs = _mm256_hadd_ps(
            _mm256_hadd_ps(halves_added(sums[h][0]), halves_added(sums[h][1])),
            _mm256_hadd_ps(halves_added(sums[h][2]), halves_added(sums[h][3])));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
        _mm_store_ps(scores + h * POSITIONS + first, _mm_mul_ps(four, _mm_set1_ps(w->scale)));
    }
}

/* Values of two positions side by side, of 32 columns in two registers: in each four lanes of one position's
 * pairs, first those of columns 0-3, 8-11, 16-19 and 24-27, then the others. */
static void pair_values(const Work *w, const Rows *rows, uint16_t *pairs)
{
    for (int p = 0; p < POSITIONS; p += 2)
        for (int64_t i = 0; i < w->value_dim; i += 32, pairs += 64) {
            __m512i one = _mm512_loadu_si512(rows->values[p] + i);
            __m512i other = _mm512_loadu_si512(rows->values[p + 1] + i);
            _mm512_storeu_si512(pairs, _mm512_unpacklo_epi16(one, other));
            _mm512_storeu_si512(pairs + 32, _mm512_unpackhi_epi16(one, other));
        }
}

/* sums = sums * fade + weights . values of some columns; sums stay in the order of `pair_values`. */
INLINE void add_some(const Work *w, const Memory *m, const uint16_t *pairs, int64_t head, int64_t column,
                     const int heads)
{
    __m512 sums[HEADS][COLUMNS];
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < COLUMNS; n++)
            sums[h][n] = _mm512_mul_ps(
                _mm512_loadu_ps(m->sums + (head + h) * w->value_dim + column + 16 * n),
                _mm512_set1_ps(m->fades[head + h]));
    for (int pair = 0; pair < PAIRS; pair++) {
        __m512i values[COLUMNS];
        for (int n = 0; n < COLUMNS; n++)
            values[n] = _mm512_loadu_si512(pairs + 2 * (pair * w->value_dim + column + 16 * n));
        for (int h = 0; h < heads; h++) {
            int both;
            memcpy(&both, m->scores + (head + h) * POSITIONS + pair, sizeof both);
            __m512i weights = _mm512_set1_epi32(both);
            for (int n = 0; n < COLUMNS; n++)
                sums[h][n] = multiply_pairs(sums[h][n], values[n], weights);
        }
    }
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < COLUMNS; n++)
            _mm512_storeu_ps(m->sums + (head + h) * w->value_dim + column + 16 * n, sums[h][n]);
}

/* Makes pairs of bfloat16, in the first half of its memory, of a head's weights. */
INLINE void narrow_weights(float *weights)
{
    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(weights + 16), _mm512_loadu_ps(weights));
    memcpy(weights, &both, sizeof both);
}

/* Scores, weighs and adds POSITIONS rows, of which `count` are there and the others are the last again. */
static void attend_rows(const Work *w, const Memory *m, const Rows *rows, int64_t count,
                        const uint16_t *queries, int64_t heads)
{
    uint16_t *pairs = (uint16_t *)m->keys;
    int64_t h;
    for (int p = 0; p < POSITIONS; p += KEYS) {
        for (h = 0; h + HEADS <= heads; h += HEADS)
            score_some(w, rows, p, queries + h * w->query_head, m->scores + h * POSITIONS, HEADS);
        for (; h < heads; h++)
            score_some(w, rows, p, queries + h * w->query_head, m->scores + h * POSITIONS, 1);
    }
    for (h = 0; h < heads; h++) {
        float *scores = m->scores + h * POSITIONS;
        m->fades[h] = weigh(scores, count, w->softcap, m->largest + h, m->totals + h);
        narrow_weights(scores);
    }
    pair_values(w, rows, pairs);
    for (int64_t column = 0; column < w->value_dim; column += 16 * COLUMNS) {
        for (h = 0; h + HEADS <= heads; h += HEADS)
            add_some(w, m, pairs, h, column, HEADS);
        for (; h < heads; h++)
            add_some(w, m, pairs, h, column, 1);
    }
}

static void finish_head(const Work *w, const float *sums, float total, uint16_t *output)
{
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m256 factor = _mm256_set1_ps(1.0f / total);
    float ordered[32];
    for (int64_t i = 0; i < w->value_dim; i += 32) {
        __m512 low = _mm512_loadu_ps(sums + i), high = _mm512_loadu_ps(sums + i + 16);
        _mm512_storeu_ps(ordered, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(ordered + 16, _mm512_permutex2var_ps(low, second, high));
        for (int n = 0; n < 32; n += 8)
            store8(output + i + n, rounded8(_mm256_mul_ps(_mm256_loadu_ps(ordered + n), factor)));
    }
}

void attend_latents(const Work *w, const Memory *m, int64_t token, int64_t kv_head, int64_t first_head,
                    int64_t heads)
{
    const uint16_t *queries = w->queries + token * w->query_token + first_head * w->query_head;
    memset(m->sums, 0, (size_t)(heads * w->value_dim) * sizeof(float));
    for (int64_t h = 0; h < heads; h++) {
        m->largest[h] = w->sinks ? w->sinks[first_head + h] : -INFINITY;
        m->totals[h] = w->sinks ? 1.0f : 0.0f;
    }
    for (int64_t number = w->starts[token]; number < w->starts[token + 1]; number++) {
        const Part *part = w->parts + number;
        const uint8_t *keys = part->keys + kv_head * part->key_head;
        const uint8_t *values = part->values + kv_head * part->value_head;
        for (int64_t first = 0; first < part->positions; first += POSITIONS) {
            int64_t count = part->positions - first < POSITIONS ? part->positions - first : POSITIONS;
            Rows rows;
            for (int64_t p = 0; p < POSITIONS; p++) {
                int64_t position = first + (p < count ? p : count - 1);
                rows.keys[p] = (const uint16_t *)(keys + position * part->key_position);
                rows.values[p] = (const uint16_t *)(values + position * part->value_position);
            }
            attend_rows(w, m, &rows, count, queries, heads);
        }
    }
    for (int64_t h = 0; h < heads; h++)
        finish_head(w, m->sums + h * w->value_dim, m->totals[h],
                    w->output + (token * w->heads + first_head + h) * w->value_dim);
}
INSTRUCTIONS_END
#endif
