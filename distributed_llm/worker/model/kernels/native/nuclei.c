/* Cuts the probabilities of tokens at top-p [1] and min-p, without sorting them.
 *
 * Floats that are not negative are ordered like their bits. So the least likely token that stays is
 * found by its leading bits, then by the next ones, then by the last: each time the probabilities are
 * added up by these bits, and the sum tells between which of them it is.
 *
 * [1] A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019. */
#include "instructions.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

EIGHTS
#include "eights.h"

/* What a row is cut by. */
typedef struct {
    double top_p; /* above 1: all stay */
    float min_p;
} Cut;

typedef struct {
    float *probabilities;
    double *sums;
    const Cut *cuts;
    int64_t rows, columns, group;
    atomic_llong next;
} Work;

#define LEADING 13 /* bits by which probabilities are told apart first */
#define NEXT 10
#define LAST 9
#define BINS (1 << 11) /* for the first two bits of what is below 2 are zeros */
#define AT_ONCE 4 /* sums of the same bits, so that no addition waits for the one before */

/* The last token that stays, as far as it is known. */
typedef struct {
    uint32_t bits; /* of its probability, the leading ones */
    double missing; /* what the tokens with these bits have to reach */
} Border;

/* Moves the border to the bin that it is in; bins are in the order of `bits`. */
static void find_bin(Border *border, const double *bins, int count)
{
    int last = 0;
    double before = 0.0, before_last = 0.0;
    for (int bin = count - 1; bin >= 0 && (before < border->missing || before == 0.0); bin--) {
        if (bins[bin] == 0.0)
            continue;
        last = bin;
        before_last = before;
        before += bins[bin];
    }
    border->bits = border->bits * (uint32_t)count + (uint32_t)last;
    border->missing -= before_last;
}

static void find_leading_bits(Border *border, const float *probabilities, int64_t columns)
{
    double bins[AT_ONCE][BINS];
    memset(bins, 0, sizeof bins);
    const int shift = 32 - LEADING;
    int64_t i = 0;
    for (; i + AT_ONCE <= columns; i += AT_ONCE) {
        uint32_t bits[AT_ONCE];
        memcpy(bits, probabilities + i, sizeof bits);
        for (int k = 0; k < AT_ONCE; k++)
            bins[k][bits[k] >> shift & (BINS - 1)] += (double)probabilities[i + k];
    }
    for (; i < columns; i++) {
        uint32_t bits;
        memcpy(&bits, probabilities + i, sizeof bits);
        bins[0][bits >> shift & (BINS - 1)] += (double)probabilities[i];
    }
    for (int k = 1; k < AT_ONCE; k++)
        for (int bin = 0; bin < BINS; bin++)
            bins[0][bin] += bins[k][bin];
    find_bin(border, bins[0], BINS);
}

/* Goes on with `count` more bits among the probabilities that begin with those of the border, after
 * which `shift` bits are left. */
static void find_more_bits(Border *border, const float *probabilities, int64_t columns, int more,
                           int shift)
{
    double bins[1 << NEXT];
    memset(bins, 0, sizeof bins);
    const uint32_t begin = border->bits, mask = (1u << more) - 1;
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        unsigned found = begins_with8(probabilities + i, more + shift, begin);
        for (const float *value = probabilities + i; found; found >>= 1, value++)
            if (found & 1) {
                uint32_t bits;
                memcpy(&bits, value, sizeof bits);
                bins[bits >> shift & mask] += (double)*value;
            }
    }
    for (; i < columns; i++) {
        uint32_t bits;
        memcpy(&bits, probabilities + i, sizeof bits);
        if (bits >> (more + shift) == begin)
            bins[bits >> shift & mask] += (double)probabilities[i];
    }
    find_bin(border, bins, 1 << more);
}

/* Drops the last ones of those that are as likely as the last token that stays, until those that are
 * left only just reach what is missing. */
static void drop_surplus(float *probabilities, int64_t columns, float least, double missing)
{
    int64_t equal = 0;
    for (int64_t i = 0; i < columns; i++)
        equal += probabilities[i] == least;
    int64_t kept = 1;
    while (kept < equal && (double)kept * (double)least < missing)
        kept++;
    for (int64_t i = columns - 1; kept < equal; i--)
        if (probabilities[i] == least) {
            probabilities[i] = 0.0f;
            equal--;
        }
}

static void drop_below(float *probabilities, int64_t columns, float least)
{
    for (int64_t i = 0; i < columns; i++)
        probabilities[i] = probabilities[i] < least ? 0.0f : probabilities[i];
}

static void cut_row(float *probabilities, int64_t columns, const Cut *cut)
{
    float least = 0.0f;
    if (cut->top_p < 1.0) {
        Border border = {.missing = cut->top_p};
        find_leading_bits(&border, probabilities, columns);
        find_more_bits(&border, probabilities, columns, NEXT, LAST);
        find_more_bits(&border, probabilities, columns, LAST, 0);
        memcpy(&least, &border.bits, sizeof least);
        drop_surplus(probabilities, columns, least, border.missing);
    }
    if (cut->min_p > 0.0f) {
        float most = 0.0f;
        for (int64_t i = 0; i < columns; i++)
            most = probabilities[i] > most ? probabilities[i] : most;
        least = cut->min_p * most > least ? cut->min_p * most : least;
    }
    if (least > 0.0f)
        drop_below(probabilities, columns, least);
}

static double sum_of(const float *values, int64_t count)
{
    double sums[8] = {0.0}, sum = 0.0; /* so many that no addition waits for the one before */
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 8; k++)
            sums[k] += (double)values[i + k];
    for (; i < count; i++)
        sum += (double)values[i];
    for (int k = 0; k < 4; k++)
        sums[k] += sums[k + 4];
    return sums[0] + sums[1] + sums[2] + sums[3] + sum;
}

static void cut_rows(void *data)
{
    Work *w = data;
    int64_t groups = (w->columns + w->group - 1) / w->group;
    for (;;) {
        int64_t row = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (row >= w->rows)
            return;
        float *probabilities = w->probabilities + row * w->columns;
        cut_row(probabilities, w->columns, w->cuts + row);
        for (int64_t n = 0; n < groups; n++) {
            int64_t left = w->columns - n * w->group;
            w->sums[row * groups + n] =
                sum_of(probabilities + n * w->group, left < w->group ? left : w->group);
        }
    }
}

/* Makes zeros of the probabilities [rows, columns] that are cut off, and adds up those that stay, `group`
 * after `group`: sums [rows, groups]. In each row some probability is above 0. */
EXPORT void cut_probabilities(float *probabilities, double *sums, const Cut *cuts, int64_t rows,
                              int64_t columns, int64_t group, int threads)
{
    Work w = {.probabilities = probabilities, .sums = sums, .cuts = cuts, .rows = rows,
              .columns = columns, .group = group};
    in_threads(cut_rows, &w, rows < threads ? (int)rows : threads);
}
EIGHTS_END
