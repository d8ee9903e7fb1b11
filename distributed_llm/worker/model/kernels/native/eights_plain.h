/* What eights.h says, in plain C, which compilers make vectors of where a processor has some. */
#include "floats.h"

#include <math.h>

typedef struct {
    float lane[8];
} Eight;

typedef struct {
    int lane[8];
} Mask8;

#define EACH_OF_8 for (int i = 0; i < 8; i++)

INLINE Eight same8(float value)
{
    Eight made;
    EACH_OF_8 made.lane[i] = value;
    return made;
}

INLINE Eight zero8(void) { return same8(0.0f); }

INLINE Eight load_floats8(const float *from)
{
    Eight made;
    memcpy(made.lane, from, sizeof made.lane);
    return made;
}

INLINE void store_floats8(float *to, Eight values) { memcpy(to, values.lane, sizeof values.lane); }

#define FUNCTION_OF_8(name, expression)                                                            \
    INLINE Eight name(Eight a, Eight b)                                                            \
    {                                                                                              \
        EACH_OF_8 a.lane[i] = expression;                                                          \
        return a;                                                                                  \
    }
FUNCTION_OF_8(add8, a.lane[i] + b.lane[i])
FUNCTION_OF_8(subtract8, a.lane[i] - b.lane[i])
FUNCTION_OF_8(multiply8, a.lane[i] * b.lane[i])
FUNCTION_OF_8(divide8, a.lane[i] / b.lane[i])
FUNCTION_OF_8(lower8, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
FUNCTION_OF_8(higher8, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
#undef FUNCTION_OF_8

/* Rounded twice where the processor has no instruction for it: a library's function takes far longer. */
INLINE float fused(float a, float b, float c)
{
#ifdef FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE Eight multiply_add8(Eight a, Eight b, Eight c)
{
    EACH_OF_8 c.lane[i] = fused(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}

INLINE Eight minus_product8(Eight c, Eight a, Eight b)
{
    EACH_OF_8 c.lane[i] = fused(-a.lane[i], b.lane[i], c.lane[i]);
    return c;
}

INLINE Mask8 more8(Eight a, Eight b)
{
    Mask8 mask;
    EACH_OF_8 mask.lane[i] = a.lane[i] > b.lane[i];
    return mask;
}

INLINE Eight choose8(Mask8 mask, Eight a, Eight b)
{
    EACH_OF_8 a.lane[i] = mask.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}

INLINE Eight whole8(Eight values)
{
    EACH_OF_8 values.lane[i] = rintf(values.lane[i]);
    return values;
}

INLINE Eight magnitude8(Eight values)
{
    EACH_OF_8 values.lane[i] = fabsf(values.lane[i]);
    return values;
}

INLINE Eight larger_bits8(Eight a, Eight b)
{
    EACH_OF_8 a.lane[i] = bits_of(a.lane[i]) > bits_of(b.lane[i]) ? a.lane[i] : b.lane[i];
    return a;
}

INLINE Eight flipped8(Eight values, uint32_t bits)
{
    EACH_OF_8 values.lane[i] = float_of(bits_of(values.lane[i]) ^ bits);
    return values;
}

INLINE Eight power_of_two8(Eight n)
{
    EACH_OF_8 n.lane[i] = n.lane[i] == n.lane[i] ? float_of((uint32_t)((int32_t)n.lane[i] + 127) << 23)
                                                 : n.lane[i];
    return n;
}

INLINE Eight load8(const uint16_t *from)
{
    Eight made;
    EACH_OF_8 made.lane[i] = widened(from[i]);
    return made;
}

INLINE void load_pairs8(const uint16_t *from, Eight *even, Eight *odd)
{
    EACH_OF_8 {
        even->lane[i] = widened(from[2 * i]);
        odd->lane[i] = widened(from[2 * i + 1]);
    }
}

INLINE Eight load_halves8(const uint16_t *from)
{
    Eight made;
    EACH_OF_8 made.lane[i] = half_widened(from[i]);
    return made;
}

INLINE void store_halves8(uint16_t *to, Eight values)
{
    EACH_OF_8 to[i] = half_narrowed(values.lane[i]);
}

INLINE Eight load_signed8(const uint8_t *from)
{
    Eight made;
    EACH_OF_8 made.lane[i] = (float)(int8_t)from[i];
    return made;
}

INLINE Eight load_fp8(const uint8_t *from)
{
    Eight made;
    EACH_OF_8 made.lane[i] = half_widened((uint16_t)((from[i] & 0x80) << 8 | (from[i] & 0x7f) << 7));
    return made;
}

INLINE Eight rounded8(Eight values)
{
    EACH_OF_8 values.lane[i] = widened(narrowed(values.lane[i]));
    return values;
}

INLINE void store8(uint16_t *to, Eight rounded)
{
    EACH_OF_8 to[i] = (uint16_t)(bits_of(rounded.lane[i]) >> 16);
}

INLINE void store_codes8(uint8_t *to, Eight codes)
{
    EACH_OF_8 to[i] = codes.lane[i] > 0.0f && codes.lane[i] < 256.0f ? (uint8_t)codes.lane[i] : 0;
}

INLINE float sum8(Eight values)
{
    float fours[4];
    for (int i = 0; i < 4; i++)
        fours[i] = values.lane[i] + values.lane[i + 4];
    return fours[0] + fours[2] + (fours[1] + fours[3]);
}

INLINE float largest8(Eight values)
{
    float most = values.lane[0];
    EACH_OF_8 most = values.lane[i] > most ? values.lane[i] : most;
    return most;
}

INLINE void store_sums8(float *to, const Eight values[4])
{
    for (int n = 0; n < 4; n++)
        to[n] = sum8(values[n]);
}

INLINE Eight sums_of_fours8(const Eight values[4])
{
    Eight made;
    EACH_OF_8 {
        const float *four = values[i / 2].lane + i % 2 * 4;
        made.lane[i] = four[0] + four[1] + (four[2] + four[3]);
    }
    return made;
}

INLINE void exchange8(const Eight rows[8], Eight columns[8])
{
    for (int row = 0; row < 8; row++)
        EACH_OF_8 columns[i].lane[row] = rows[row].lane[i];
}

INLINE unsigned begins_with8(const float *from, int distance, uint32_t wanted)
{
    uint32_t numbers[8];
    unsigned found = 0;
    memcpy(numbers, from, sizeof numbers);
    EACH_OF_8 found |= (unsigned)(numbers[i] >> distance == wanted) << i;
    return found;
}
#undef EACH_OF_8
