/* bfloat16, and functions of eight float32 at once. */
#ifndef DISTRIBUTED_LLM_FLOATS_H
#define DISTRIBUTED_LLM_FLOATS_H

#include <stdint.h>
#include <string.h>

/* To the nearest bfloat16, ties to even; a NaN stays one. */
static inline uint16_t narrowed(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

static inline float widened(uint16_t narrow)
{
    uint32_t bits = (uint32_t)narrow << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#endif
