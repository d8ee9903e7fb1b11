/* float32 as bits, as bfloat16 and as float16, one at a time. */
#ifndef DISTRIBUTED_LLM_FLOATS_H
#define DISTRIBUTED_LLM_FLOATS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
static inline uint16_t narrowed(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

static inline float widened(uint16_t narrow) { return float_of((uint32_t)narrow << 16); }

/* float16: exponents are biased by 15, and the largest one is of what is not finite. */
static inline float half_widened(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = (uint32_t)(half & 0x7fff) << 13;
    float wide = float_of(size) * 0x1p112f; /* also of those that are not normal */
    if (size >= 0x7c00 << 13)
        wide = float_of(size | 0x7f800000);
    return float_of(sign | bits_of(wide));
}

/* To the nearest float16, ties to even; what has no room becomes infinite, a NaN stays one. */
static inline uint16_t half_narrowed(float value)
{
    uint32_t sign = bits_of(value) >> 16 & 0x8000, size = bits_of(value) & 0x7fffffff;
    if (size > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000)
        return (uint16_t)(sign | 0x7c00);
    if (size < 113u << 23) /* below 2**-14 they are multiples of 2**-24: the addition rounds to these */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    size += 0xfff + (size >> 13 & 1);
    return (uint16_t)(sign | ((size >> 13) - (112 << 10)));
}

#endif
