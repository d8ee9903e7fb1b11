/* int8 products of many rows with AVX-512; for products.c, which includes it after the tiles of few rows.
 *
 * All rows pass over a panel, PANEL_INPUTS inputs of PANEL_BLOCKS blocks, which stay in the first cache
 * meanwhile; a tile reads all inputs of its blocks from the second one. Sums, [rows][PANEL_BLOCKS][16],
 * wait in memory for the next panel. Each is made in a tile's order, so it is the same to the last bit.
 */
#define PANEL_INPUTS 256 /* whole runs */
#define PANEL_BLOCKS 4
#define PANEL_ROWS 4     /* whose sums with these blocks the registers have room for */
#define ROWS_OF_PART 128 /* whose sums are kept at once */

/* A panel, and the sums of the rows from `row` on, for which it is there. */
typedef struct {
    const Product *p;
    const Rounded *x;
    int64_t block, row;
    int64_t first, last; /* inputs of the panel */
    float *sums;
} Panel;

/* Adds the products of some rows with one run, which begins at input `start`, to their sums. */
INLINE void multiply_run(const Panel *panel, int64_t row, int64_t start, const int rows)
{
    const Rounded *x = panel->x;
    const int64_t inputs = panel->p->inputs;
    const int64_t size = panel->last - start < INT8_RUN ? panel->last - start : INT8_RUN;
    const int8_t *states = x->codes + row * inputs + start;
    const uint8_t *codes =
        (const uint8_t *)panel->p->weight.codes + (panel->block * inputs + start) * LANES;
    __m512i products[PANEL_ROWS][PANEL_BLOCKS];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int b = 0; b < PANEL_BLOCKS; b++)
            products[r][b] = set_integer(-128 * x->sums[(row + r) * x->runs + start / INT8_RUN]);
    for (int64_t k = 0; k < size; k += 4) {
        __m512i own[PANEL_BLOCKS];
        UNROLLED for (int b = 0; b < PANEL_BLOCKS; b++)
            own[b] = load_codes(codes + (b * inputs + k) * LANES);
        UNROLLED for (int r = 0; r < rows; r++) {
            __m512i four = broadcast_states(states + r * inputs + k);
            UNROLLED for (int b = 0; b < PANEL_BLOCKS; b++)
                products[r][b] = multiply_codes8(products[r][b], own[b], four);
        }
    }
    float *sums = panel->sums + (row - panel->row) * PANEL_BLOCKS * LANES;
    UNROLLED for (int r = 0; r < rows; r++) {
        __m512 scale = set_real(x->scales[(row + r) * x->runs + start / INT8_RUN]);
        UNROLLED for (int b = 0; b < PANEL_BLOCKS; b++) {
            float *sum = sums + (r * PANEL_BLOCKS + b) * LANES;
            store_real(sum, multiply_add(to_real(products[r][b]), scale, _mm512_loadu_ps(sum)));
        }
    }
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
INLINE void store_narrow(uint16_t *to, __m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i cut = _mm512_srli_epi32(up, 16);
    cut = _mm512_mask_mov_epi32(cut, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q),
                                _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(cut));
}

/* Writes the sums of a row, times the scales of the channels, which are all there. */
INLINE void write_row(const Panel *panel, int64_t row)
{
    const Product *p = panel->p;
    const float *sums = panel->sums + (row - panel->row) * PANEL_BLOCKS * LANES;
    for (int64_t b = 0; b < PANEL_BLOCKS; b++, sums += LANES) {
        const int64_t channel = (panel->block + b) * LANES, at = row * p->weight.channels + channel;
        __m512 value = multiply(_mm512_loadu_ps(sums), _mm512_loadu_ps(p->weight.scales + channel));
        if (p->dtype == BFLOAT16)
            store_narrow((uint16_t *)p->output + at, value);
        else
            store_real((float *)p->output + at, value);
    }
}

/* Adds the products of some rows with a panel to their sums, and writes these after the last panel. */
INLINE void multiply_panel(const Panel *panel, int64_t row, const int rows)
{
    for (int64_t start = panel->first; start < panel->last; start += INT8_RUN)
        multiply_run(panel, row, start, rows);
    if (panel->last == panel->p->inputs)
        for (int r = 0; r < rows; r++)
            write_row(panel, row + r);
}

/* The products of all rows with PANEL_BLOCKS blocks, which lack no channels. */
static void int8_panels(const Product *p, const Rounded *x, int64_t block)
{
    _Alignas(64) float sums[ROWS_OF_PART * PANEL_BLOCKS * LANES];
    Panel panel = {.p = p, .x = x, .block = block, .sums = sums};
    for (panel.row = 0; panel.row < p->rows; panel.row += ROWS_OF_PART) {
        const int64_t left = p->rows - panel.row;
        const int64_t stop = panel.row + (left < ROWS_OF_PART ? left : ROWS_OF_PART);
        memset(sums, 0, sizeof sums);
        for (panel.first = 0; panel.first < p->inputs; panel.first = panel.last) {
            panel.last = panel.first + PANEL_INPUTS;
            panel.last = panel.last < p->inputs ? panel.last : p->inputs;
            int64_t row = panel.row;
            for (; row + PANEL_ROWS <= stop; row += PANEL_ROWS)
                multiply_panel(&panel, row, PANEL_ROWS);
            for (; row < stop; row++)
                multiply_panel(&panel, row, 1);
        }
    }
}
