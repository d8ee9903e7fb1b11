/* What the ways to compute attention of single tokens have in common; to be included after EIGHTS. */
#ifndef DISTRIBUTED_LLM_ATTENTION_H
#define DISTRIBUTED_LLM_ATTENTION_H

#include "eights.h"
#include "parts.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

#define POSITIONS 32 /* that are computed together */

/* How the numbers of a row are kept: as they are, or as codes, behind which their scale is; coding.py. */
enum { BFLOAT16, INT8, FP8 };

typedef struct {
    const uint16_t *queries; /* [tokens] of [heads, width], with these strides */
    const uint16_t *keys, *values; /* of the tokens themselves: of [kv_heads, dim], likewise; or NULL: they
                                    * are kept, or none are */
    const float *rotation;   /* [dim, dim], for keys and as many numbers of queries; or NULL */
    uint16_t *output;        /* [tokens, heads, value_dim] */
    const float *sinks;      /* [heads]: logits that take part without a value; or NULL */
    const float *biases;     /* [heads, reach]: added to the scores of the last positions; or NULL */
    int64_t reach;           /* at least as many as a token sees */
    const Part *parts;     /* the last position of a token's last one is its own, and not written yet */
    const int64_t *starts; /* [tokens + 1]: where each token's parts begin */
    int64_t tokens, heads, kv_heads, dim, value_dim;
    int64_t width;  /* dim; or dim + value_dim: queries score keys and, behind them, values */
    int64_t pieces; /* that the heads of one key are computed in */
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    float scale, softcap; /* softcap 0: none */
    int kept;             /* how keys and values are */
    int instructions;     /* see processor.h */
    atomic_llong next;
    atomic_int failed;
} Work;

/* Rows of float32 that one thread computes with. Values that are scored lie behind their keys. */
typedef struct {
    float *queries, *keys, *sums, *values, *scores, *largest, *totals, *fades;
    int64_t stride; /* of the values */
} Memory;

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

/* Computes attention of some of one token's heads of one key. */
typedef void Attend(const Work *w, const Memory *m, int64_t token, int64_t kv_head, int64_t first_head,
                    int64_t heads);

#if defined(X86) && defined(GNU)
#define WITH_PAIRS
/* Whether `attend_latents` computes this, and is quicker. */
int can_attend_latents(const Work *w);
Attend attend_latents;
#endif

#endif
