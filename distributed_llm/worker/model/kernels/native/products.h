/* Products of states with weights that are integers.
 *
 * Orders of weights (all in blocks of 16 output channels, padded with zeros):
 *
 *   int8   [channels / 16][inputs / 4][16][4]      a byte is code + 128
 *   int4   [channels / 16][groups] of { float16 scales[16], float16 offsets[16],
 *                                       [group / 8][16][4] }
 *          byte i of a channel holds the codes of inputs i (low half) and i + 4 (high half)
 *
 * Weights that are multiplied by the same states share a call: the states are rounded once, and threads are
 * started once.
 *
 * Integer products round states to 8 bits, each run of `group` inputs (64 for int8) of each row by its own
 * largest magnitude, so that neither another row nor a few very large states make the others coarse.
 */
#ifndef DISTRIBUTED_LLM_PRODUCTS_H
#define DISTRIBUTED_LLM_PRODUCTS_H

#include <stdint.h>

#define LANES 16   /* output channels of a block */

#define INT8_RUN 64 /* states that are rounded together before int8 products */

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* What weights are: of integers as above, or bfloat16 row by row. In the order of experts.py. */
enum { INT8_FORM, INT4_FORM, ROWS_FORM };

/* A weight; layouts.py makes tables of them. */
typedef struct {
    const void *codes;
    const float *scales; /* int8: [channels]; int4: one factor for all; rows: a bias */
    int64_t channels;
} Weight;

typedef struct {
    const void *states; /* [rows, inputs], rows one after another */
    void *output;       /* [rows, channels], of the states' dtype */
    Weight weight;
    int64_t rows, inputs, group;
    int32_t dtype; /* of states and output */
} Product;

#endif
