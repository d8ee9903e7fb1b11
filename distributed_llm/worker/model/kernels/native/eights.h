/* Functions of eight float32 at once; to be included after EIGHTS.
 *
 * `Eight` holds them. What a header for one kind of processor defines:
 *
 *   zero8, same8, load_floats8, store_floats8
 *   load8, store8            bfloat16; what is stored has been rounded by `rounded8`
 *   load_pairs8              sixteen bfloat16, those at even places apart from those at odd ones
 *   load_halves8, store_halves8   float16
 *   load_signed8             bytes as numbers from -128 to 127
 *   load_fp8                 as 1/256 of what they stand for, see attention.c
 *   store_codes8             whole numbers from 0 to 255 as bytes; a NaN as 0
 *   rounded8                 each rounded to the nearest bfloat16, still as float32; a NaN stays one
 *   add8, subtract8, multiply8, divide8
 *   multiply_add8(a, b, c)   a * b + c, rounded once; minus_product8(c, a, b)   c - a * b, likewise
 *   lower8, higher8          of a NaN and another, the second is taken
 *   whole8                   to the nearest integer, ties to even
 *   magnitude8
 *   larger_bits8(a, b)       the one whose bits, as an integer, are larger
 *   flipped8(a, bits)        with these bits of each flipped
 *   power_of_two8            2**n of whole numbers n from -126 to 127
 *   more8(a, b)              a mask of the lanes of which a > b; choose8(mask, a, b)   of these a, else b
 *   sum8, largest8
 *   store_sums8              the sums of four registers
 *   sums_of_fours8           the sums of the first four lanes and of the last four, of four registers
 *   exchange8                the eight lanes of each of eight registers, as eight registers
 *   begins_with8(from, distance, wanted)   a bit for each of eight integers, if it is `wanted`, shifted
 *                            right by so many bits
 */
#ifndef DISTRIBUTED_LLM_EIGHTS_H
#define DISTRIBUTED_LLM_EIGHTS_H

#include "instructions.h"

#include <stdint.h>

#if defined(X86)
#include "eights256.h"
#elif defined(ARM)
#include "eights128.h"
#else
#include "eights_plain.h"
#endif

/* e**x to a relative error of 2e-7, for x in [-87, 88]; beyond, that of the nearest bound; a NaN stays
 * one. By Cephes' polynomial (S. L. Moshier). */
INLINE Eight exp8(Eight x)
{
    x = higher8(same8(-87.3f), x); /* of a NaN and another, the second is taken */
    x = lower8(same8(88.3f), x);
    Eight n = whole8(multiply8(x, same8(1.44269504f)));
    x = minus_product8(x, n, same8(0.693359375f));
    x = minus_product8(x, n, same8(-2.12194440e-4f));
    Eight y = same8(1.9875691500e-4f);
    y = multiply_add8(y, x, same8(1.3981999507e-3f));
    y = multiply_add8(y, x, same8(8.3334519073e-3f));
    y = multiply_add8(y, x, same8(4.1665795894e-2f));
    y = multiply_add8(y, x, same8(1.6666665459e-1f));
    y = multiply_add8(y, x, same8(5.0000001201e-1f));
    y = multiply_add8(y, multiply8(x, x), add8(x, same8(1.0f)));
    return multiply8(y, power_of_two8(n));
}

#endif
