#include "products.h"

#include "floats.h"
#include "instructions.h"
#include "memory.h"
#include "processor.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define MOST_GROUP 1024
#define MOST_ROWS 8
#define MOST_BLOCKS 4
#define FEWEST_ROWS 16 /* for which panels are faster */

/* States rounded to integers. */
typedef struct {
    int8_t *codes;  /* [rows, inputs] */
    float *scales;  /* [rows, runs] */
    int32_t *sums;  /* [rows, runs] */
    int64_t runs;
} Rounded;

static inline int32_t four_bytes(const int8_t *from)
{
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}


#if defined(X86)
INSTRUCTIONS("avx2,fma,f16c")
#define NAME(x) x##_avx2
#define VECTORS 2
#define integer __m256i
#define real __m256
#define UNSIGNED_CODES 0
#define ROWS_AT_ONCE 4
#define BLOCKS_AT_ONCE 1
#include "vectors256.h"
INLINE integer add_pairs(integer sum, integer pairs)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE integer multiply_codes8_avx2(integer sum, integer codes, integer states)
{
    integer code = _mm256_xor_si256(codes, _mm256_set1_epi8((char)128)); /* as a signed number */
    /* 128 * 127 * 2 has room in 16 bits */
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(states, code)));
}
INLINE integer multiply_codes4_avx2(integer sum, integer codes, integer states)
{
    return add_pairs(sum, _mm256_maddubs_epi16(codes, states)); /* as 15 * 127 * 2 has */
}
#define multiply_codes8 multiply_codes8_avx2
#define multiply_codes4 multiply_codes4_avx2
#include "products.inc.h"
#undef multiply_codes4
#undef multiply_codes8
#undef NAME
#undef UNSIGNED_CODES
INSTRUCTIONS_END

INSTRUCTIONS("avx2,fma,f16c,avxvnni")
#define NAME(x) x##_avxvnni
#define UNSIGNED_CODES 1
#define multiply_codes4(sum, codes, states) _mm256_dpbusd_avx_epi32(sum, codes, states)
#define multiply_codes8(sum, codes, states) _mm256_dpbusd_avx_epi32(sum, codes, states)
#include "products.inc.h"
#include "undefine.h"
INSTRUCTIONS_END

INSTRUCTIONS("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define NAME(x) x##_avx512
#define VECTORS 1
#define integer __m512i
#define real __m512
#define UNSIGNED_CODES 1
#define ROWS_AT_ONCE 4
#define BLOCKS_AT_ONCE 4
#include "vectors512.h"
#include "products.inc.h"
#include "panels.h"
#include "undefine.h"
INSTRUCTIONS_END

#elif defined(ARM)
#define VECTORS 4
#define integer int32x4_t
#define real float32x4_t
#define UNSIGNED_CODES 0
#define ROWS_AT_ONCE 4
#define BLOCKS_AT_ONCE 1
#include "vectors128.h"
/* Codes of 8 bits as signed numbers. */
INLINE integer signed_codes(integer codes) { return veorq_s32(codes, vdupq_n_s32((int32_t)0x80808080)); }

#define NAME(x) x##_neon
INLINE integer multiply_codes_neon(integer sum, integer codes, integer states)
{
    int8x16_t code = vreinterpretq_s8_s32(codes), state = vreinterpretq_s8_s32(states);
    int16x8_t low = vmull_s8(vget_low_s8(code), vget_low_s8(state));
    int16x8_t high = vmull_s8(vget_high_s8(code), vget_high_s8(state));
    return vpadalq_s16(sum, vpaddq_s16(low, high)); /* 128 * 127 * 2 has room in 16 bits */
}
#define multiply_codes4 multiply_codes_neon
#define multiply_codes8(sum, codes, states) multiply_codes_neon(sum, signed_codes(codes), states)
#include "products.inc.h"
#undef multiply_codes4
#undef multiply_codes8
#undef NAME

INSTRUCTIONS(DOTPROD_NAME)
#define NAME(x) x##_dotprod
INLINE integer multiply_codes_dotprod(integer sum, integer codes, integer states)
{
#ifdef GNU /* older compilers have no intrinsic unless all functions may use it */
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(codes), "w"(states));
    return sum;
#else
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(states));
#endif
}
#define multiply_codes4 multiply_codes_dotprod
#define multiply_codes8(sum, codes, states) multiply_codes_dotprod(sum, signed_codes(codes), states)
#include "products.inc.h"
#include "undefine.h"
INSTRUCTIONS_END

#else
#include "vectors_plain.h"
#define NAME(x) x##_plain
#define VECTORS 4
#define integer FourIntegers
#define real FourReals
#define UNSIGNED_CODES 0
#define ROWS_AT_ONCE 4
#define BLOCKS_AT_ONCE 1
#define multiply_codes4(sum, codes, states) multiply_codes_plain(sum, codes, states, 0)
#define multiply_codes8(sum, codes, states) multiply_codes_plain(sum, codes, states, 0x80808080u)
#include "products.inc.h"
#include "undefine.h"
#endif

typedef void Rows(const Product *, const Rounded *, int64_t block, int blocks);
typedef void Panels(const Product *, const Rounded *, int64_t block);
typedef void RoundRow(const Product *, int64_t row, int64_t group, int8_t *, float *, int32_t *);

/* The functions of one set of instructions. */
typedef struct {
    RoundRow *round_row;
    Rows *int8, *int4;
    Panels *int8_panels; /* NULL: they are not faster */
    int blocks;          /* that are fastest together, and those of a panel */
} Instructions;

static const Instructions sets[SETS] = {
#if defined(X86)
    [AVX2] = {round_row_avx2, int8_rows_avx2, int4_rows_avx2, NULL, 1},
    [AVXVNNI] = {round_row_avxvnni, int8_rows_avxvnni, int4_rows_avxvnni, NULL, 1},
    [AVX512VNNI] = {round_row_avx512, int8_rows_avx512, int4_rows_avx512, int8_panels, 4},
#elif defined(ARM)
    [NEON] = {round_row_neon, int8_rows_neon, int4_rows_neon, NULL, 1},
    [DOTPROD] = {round_row_dotprod, int8_rows_dotprod, int4_rows_dotprod, NULL, 1},
#else
    [PLAIN] = {round_row_plain, int8_rows_plain, int4_rows_plain, NULL, 1},
#endif
};

/* What the threads of one call share. The blocks of all weights are numbered through. */
typedef struct {
    const Product *states; /* a product but for weight and output */
    const Weight *weights;
    const Instructions *set;
    Rounded *rounded;
    char *output;
    int is_int4, num_weights;
    int64_t blocks, step;
    atomic_llong next_row, next_block;
} Work;

static void round_some(void *data)
{
    Work *work = data;
    const Product *p = work->states;
    Rounded *x = work->rounded;
    for (;;) {
        int64_t row = atomic_fetch_add_explicit(&work->next_row, 1, memory_order_relaxed);
        if (row >= p->rows)
            return;
        work->set->round_row(p, row, p->group, x->codes + row * p->inputs,
                             x->scales + row * x->runs, x->sums + row * x->runs);
    }
}

static int64_t blocks_of(const Weight *weight) { return (weight->channels + LANES - 1) / LANES; }

/* Multiplies by as many of the blocks [first, last) as panels have; returns the first that is left. */
static int64_t multiply_panels(const Work *work, const Product *p, int64_t first, int64_t last)
{
    const int64_t whole = p->weight.channels / LANES; /* the last block may lack channels */
    last = last < whole ? last : whole;
    if (work->set->int8_panels && !work->is_int4 && p->rows >= FEWEST_ROWS)
        for (; first + work->set->blocks <= last; first += work->set->blocks)
            work->set->int8_panels(p, work->rounded, first);
    return first;
}

static void multiply_blocks(const Work *work, int64_t first, int64_t last)
{
    Rows *rows = work->is_int4 ? work->set->int4 : work->set->int8;
    Product p = *work->states;
    char *output = work->output;
    int64_t start = 0; /* the number of the weight's first block */
    for (int n = 0; n < work->num_weights; n++) {
        p.weight = work->weights[n];
        p.output = output;
        int64_t stop = start + blocks_of(&p.weight);
        int64_t block = first > start ? first : start, end = last < stop ? last : stop;
        block = start + multiply_panels(work, &p, block - start, end - start);
        for (; block < end; block += work->set->blocks)
            rows(&p, work->rounded, block - start,
                 (int)(end - block < work->set->blocks ? end - block : work->set->blocks));
        start = stop;
        output += p.rows * p.weight.channels * (p.dtype == BFLOAT16 ? 2 : 4);
    }
}

static void multiply_some(void *data)
{
    Work *work = data;
    for (;;) {
        int64_t first =
            atomic_fetch_add_explicit(&work->next_block, work->step, memory_order_relaxed);
        if (first >= work->blocks)
            return;
        int64_t last = first + work->step;
        multiply_blocks(work, first, last < work->blocks ? last : work->blocks);
    }
}

static int multiply(Product p, void *output, const Weight *weights, int num_weights, int is_int4,
                    int threads, int instructions)
{
    int64_t runs = (p.inputs + p.group - 1) / p.group;
    size_t codes = ((size_t)(p.rows * p.inputs) + LINE - 1) / LINE * LINE;
    size_t each = ((size_t)(p.rows * runs) * 4 + LINE - 1) / LINE * LINE;
    char *own = malloc(codes + 2 * each + LINE);
    if (!own)
        return 1;
    char *memory = at_line(own);
    Rounded rounded = {(int8_t *)memory, (float *)(memory + codes),
                       (int32_t *)(memory + codes + each), runs};
    Work work = {.states = &p, .weights = weights, .set = &sets[instructions], .rounded = &rounded,
                 .output = output, .is_int4 = is_int4, .num_weights = num_weights};
    for (int n = 0; n < num_weights; n++)
        work.blocks += blocks_of(weights + n);
    /* Pieces so small that a slow core does not keep the others waiting. */
    int64_t each_time = work.set->blocks;
    work.step = work.blocks / (8 * threads) / each_time * each_time;
    work.step = work.step < each_time ? each_time : work.step > 8 ? 8 : work.step;
    in_threads(round_some, &work, p.rows >= 4 * threads ? threads : 1);
    in_threads(multiply_some, &work, threads);
    free(own);
    return 0;
}

/* The products of states [rows, inputs] with weights [channels, inputs], one after another in `output`.
 * Both return 0, or 1 if there is no memory for the rounded states. */
EXPORT int int8_products(const void *states, void *output, const Weight *weights, int num_weights,
                         int64_t rows, int64_t inputs, int dtype, int threads, int instructions)
{
    Product p = {.states = states, .rows = rows, .inputs = inputs, .group = INT8_RUN, .dtype = dtype};
    return multiply(p, output, weights, num_weights, 0, threads, instructions);
}

EXPORT int int4_products(const void *states, void *output, const Weight *weights, int num_weights,
                         int64_t rows, int64_t inputs, int64_t group, int dtype, int threads,
                         int instructions)
{
    Product p = {.states = states, .rows = rows, .inputs = inputs, .group = group, .dtype = dtype};
    return multiply(p, output, weights, num_weights, 1, threads, instructions);
}
