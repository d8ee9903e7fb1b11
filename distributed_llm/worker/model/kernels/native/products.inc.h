/* The products for one set of instructions; included once for each, with these defined:
 *
 *   NAME(x)           x with the name of the instructions
 *   VECTORS           registers that hold LANES int32 or float32
 *   integer, real     registers of int32 and float32
 *   UNSIGNED_CODES    1 if int8 codes are multiplied as they are stored, 0 if as signed numbers
 *   ROWS_AT_ONCE, BLOCKS_AT_ONCE   what the registers have room for
 *   multiply_codes8, multiply_codes4   add products of four codes with four states to sums
 *   load_codes, zero_integer, set_integer, broadcast_states, low_codes, high_codes, to_real,
 *   zero_real, set_real, load_half, multiply, multiply_add, store_real
 */

/* Rounds one row: codes, the scale of each run, and the sum of each run's codes. A NaN or an infinite
 * state makes its run's scale NaN or infinite, so that the output tells. */
static void NAME(round_row)(const Product *p, int64_t row, int64_t group, int8_t *codes,
                            float *scales, int32_t *sums)
{
    const uint16_t *narrow = (const uint16_t *)p->states + row * p->inputs;
    const float *wide = (const float *)p->states + row * p->inputs;
    float values[MOST_GROUP];
    int64_t run = 0;
    for (int64_t start = 0; start < p->inputs; start += group, run++) {
        int size = (int)(p->inputs - start < group ? p->inputs - start : group);
        uint32_t largest = 0;
        for (int i = 0; i < size; i++) {
            uint32_t bits;
            if (p->dtype == BFLOAT16) {
                bits = (uint32_t)narrow[start + i] << 16;
                memcpy(&values[i], &bits, sizeof bits);
            } else {
                values[i] = wide[start + i];
                memcpy(&bits, &values[i], sizeof bits);
            }
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        float most, factor;
        memcpy(&most, &largest, sizeof most);
        scales[run] = most / 127.0f;
        sums[run] = 0;
        if (largest >= 0x7f800000) { /* not finite; so is 0 times the scale */
            memset(codes + start, 0, (size_t)size);
            continue;
        }
        factor = most > 1e-30f ? 127.0f / most : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < size; i++) {
            /* adding 1.5 * 2**23 rounds to the nearest integer */
            int32_t code = (int32_t)(values[i] * factor + 12582912.0f) - 12582912;
            codes[start + i] = (int8_t)code;
            sum += code;
        }
        sums[run] = sum;
    }
}

/* Writes the sums of some rows and blocks, times `factors` of the channels (or one for all). */
INLINE void NAME(write_sums)(const Product *p, int64_t row, int64_t block, int rows, int blocks,
                             real sums[][MOST_BLOCKS][VECTORS], const float *factors, int factor_of_each)
{
    float values[LANES];
    for (int b = 0; b < blocks; b++) {
        int64_t channel = (block + b) * LANES;
        int size = (int)(p->weight.channels - channel < LANES ? p->weight.channels - channel : LANES);
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < VECTORS; v++)
                store_real(values + v * (LANES / VECTORS), sums[r][b][v]);
            int64_t at = (row + r) * p->weight.channels + channel;
            if (p->dtype == BFLOAT16) {
                uint16_t *output = (uint16_t *)p->output + at;
                for (int i = 0; i < size; i++)
                    output[i] = narrowed(values[i] * factors[factor_of_each ? channel + i : 0]);
            } else {
                float *output = (float *)p->output + at;
                for (int i = 0; i < size; i++)
                    output[i] = values[i] * factors[factor_of_each ? channel + i : 0];
            }
        }
    }
}

INLINE void NAME(clear)(real sums[][MOST_BLOCKS][VECTORS], int rows, int blocks)
{
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            for (int v = 0; v < VECTORS; v++)
                sums[r][b][v] = zero_real();
}

INLINE void NAME(int8_tile)(const Product *p, const Rounded *x, int64_t row, int64_t block,
                            const int rows, const int blocks)
{
    real sums[MOST_ROWS][MOST_BLOCKS][VECTORS];
    const int8_t *states = x->codes + row * p->inputs;
    NAME(clear)(sums, rows, blocks);
    const uint8_t *weight = (const uint8_t *)p->weight.codes + block * p->inputs * LANES;
    int64_t run = 0;
    for (int64_t start = 0; start < p->inputs; start += p->group, run++) {
        int64_t stop = start + p->group < p->inputs ? start + p->group : p->inputs;
        integer products[MOST_ROWS][MOST_BLOCKS][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < blocks; b++)
                for (int v = 0; v < VECTORS; v++)
                    products[r][b][v] =
                        UNSIGNED_CODES ? set_integer(-128 * x->sums[(row + r) * x->runs + run])
                                       : zero_integer();
        for (int64_t k = start; k < stop; k += 4) {
            integer codes[MOST_BLOCKS][VECTORS];
            for (int b = 0; b < blocks; b++)
                for (int v = 0; v < VECTORS; v++)
                    codes[b][v] = load_codes(weight + (b * p->inputs + k) * LANES +
                                             v * (4 * LANES / VECTORS));
            for (int r = 0; r < rows; r++) {
                integer four = broadcast_states(states + r * p->inputs + k);
                for (int b = 0; b < blocks; b++)
                    for (int v = 0; v < VECTORS; v++)
                        products[r][b][v] = multiply_codes8(products[r][b][v], codes[b][v], four);
            }
        }
        for (int r = 0; r < rows; r++) {
            real scale = set_real(x->scales[(row + r) * x->runs + run]);
            for (int b = 0; b < blocks; b++)
                for (int v = 0; v < VECTORS; v++)
                    sums[r][b][v] = multiply_add(to_real(products[r][b][v]), scale, sums[r][b][v]);
        }
    }
    NAME(write_sums)(p, row, block, rows, blocks, sums, p->weight.scales, 1);
}

INLINE void NAME(int4_tile)(const Product *p, const Rounded *x, int64_t row, int64_t block,
                            const int rows, const int blocks)
{
    real sums[MOST_ROWS][MOST_BLOCKS][VECTORS];
    const int8_t *states = x->codes + row * p->inputs;
    NAME(clear)(sums, rows, blocks);
    const int64_t group_bytes = 4 * LANES + p->group * LANES / 2;
    const int64_t block_bytes = x->runs * group_bytes;
    const uint8_t *weight = (const uint8_t *)p->weight.codes + block * block_bytes;
    for (int64_t run = 0; run < x->runs; run++) {
        const uint8_t *group = weight + run * group_bytes;
        integer products[MOST_ROWS][MOST_BLOCKS][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < blocks; b++)
                for (int v = 0; v < VECTORS; v++)
                    products[r][b][v] = zero_integer();
        for (int64_t k = 0; k < p->group; k += 8) {
            integer low[MOST_BLOCKS][VECTORS], high[MOST_BLOCKS][VECTORS];
            for (int b = 0; b < blocks; b++)
                for (int v = 0; v < VECTORS; v++) {
                    integer both = load_codes(group + b * block_bytes + 4 * LANES +
                                              k * (LANES / 2) + v * (4 * LANES / VECTORS));
                    low[b][v] = low_codes(both);
                    high[b][v] = high_codes(both);
                }
            for (int r = 0; r < rows; r++) {
                const int8_t *own = states + r * p->inputs + run * p->group + k;
                integer first = broadcast_states(own), second = broadcast_states(own + 4);
                for (int b = 0; b < blocks; b++)
                    for (int v = 0; v < VECTORS; v++) {
                        products[r][b][v] = multiply_codes4(products[r][b][v], low[b][v], first);
                        products[r][b][v] = multiply_codes4(products[r][b][v], high[b][v], second);
                    }
            }
        }
        real totals[MOST_ROWS]; /* of the rounded states */
        for (int r = 0; r < rows; r++)
            totals[r] = to_real(set_integer(x->sums[(row + r) * x->runs + run]));
        for (int b = 0; b < blocks; b++)
            for (int v = 0; v < VECTORS; v++) {
                const uint8_t *halves = group + b * block_bytes + v * (2 * LANES / VECTORS);
                real scale = load_half(halves), offset = load_half(halves + 2 * LANES);
                for (int r = 0; r < rows; r++) {
                    int64_t at = (row + r) * x->runs + run;
                    /* (codes . states) * scale + (sum of states) * offset, of rounded states */
                    real own = multiply_add(to_real(products[r][b][v]), scale,
                                            multiply(totals[r], offset));
                    sums[r][b][v] = multiply_add(own, set_real(x->scales[at]), sums[r][b][v]);
                }
            }
    }
    NAME(write_sums)(p, row, block, rows, blocks, sums, p->weight.scales, 0);
}

/* `fewest`: rows from which on blocks are multiplied together. One row of int4 reads one block after the
 * other, which is one piece of memory, quicker than some at once, each of which begins anew so often; int8,
 * whose blocks are twice as long, gains nothing by that. */
#define TILES(form, fewest)                                                                        \
    static void NAME(form##_rows)(const Product *p, const Rounded *x, int64_t block, int blocks)   \
    {                                                                                              \
        int64_t row = 0;                                                                           \
        if (blocks == BLOCKS_AT_ONCE && p->rows >= fewest) {                                       \
            for (; row + ROWS_AT_ONCE <= p->rows; row += ROWS_AT_ONCE)                             \
                NAME(form##_tile)(p, x, row, block, ROWS_AT_ONCE, BLOCKS_AT_ONCE);                 \
            for (; row + 4 <= p->rows; row += 4)                                                   \
                NAME(form##_tile)(p, x, row, block, 4, BLOCKS_AT_ONCE);                            \
            for (; row + 2 <= p->rows; row += 2)                                                   \
                NAME(form##_tile)(p, x, row, block, 2, BLOCKS_AT_ONCE);                            \
            for (; row < p->rows; row++)                                                           \
                NAME(form##_tile)(p, x, row, block, 1, BLOCKS_AT_ONCE);                            \
            return;                                                                                \
        }                                                                                          \
        for (; blocks; block++, blocks--) {                                                        \
            for (row = 0; row + 4 <= p->rows; row += 4)                                            \
                NAME(form##_tile)(p, x, row, block, 4, 1);                                         \
            for (; row < p->rows; row++)                                                           \
                NAME(form##_tile)(p, x, row, block, 1, 1);                                         \
        }                                                                                          \
    }
TILES(int8, 1)
TILES(int4, 2)
#undef TILES
