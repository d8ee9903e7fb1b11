/* What eights.h says, with NEON. */

typedef struct {
    float32x4_t low, high;
} Eight;

typedef struct {
    uint32x4_t low, high;
} Mask8;

INLINE Eight joined8(float32x4_t low, float32x4_t high)
{
    Eight both = {low, high};
    return both;
}

INLINE Eight zero8(void) { return joined8(vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)); }
INLINE Eight same8(float value) { return joined8(vdupq_n_f32(value), vdupq_n_f32(value)); }
INLINE Eight load_floats8(const float *from) { return joined8(vld1q_f32(from), vld1q_f32(from + 4)); }

INLINE void store_floats8(float *to, Eight values)
{
    vst1q_f32(to, values.low);
    vst1q_f32(to + 4, values.high);
}

INLINE Eight add8(Eight a, Eight b)
{
    return joined8(vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high));
}

INLINE Eight subtract8(Eight a, Eight b)
{
    return joined8(vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high));
}

INLINE Eight multiply8(Eight a, Eight b)
{
    return joined8(vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high));
}

INLINE Eight divide8(Eight a, Eight b)
{
    return joined8(vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high));
}

INLINE Eight multiply_add8(Eight a, Eight b, Eight c)
{
    return joined8(vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high));
}

INLINE Eight minus_product8(Eight c, Eight a, Eight b)
{
    return joined8(vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high));
}

INLINE Mask8 more8(Eight a, Eight b)
{
    Mask8 mask = {vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)};
    return mask;
}

INLINE Eight choose8(Mask8 mask, Eight a, Eight b)
{
    return joined8(vbslq_f32(mask.low, a.low, b.low), vbslq_f32(mask.high, a.high, b.high));
}

INLINE Eight lower8(Eight a, Eight b) { return choose8(more8(b, a), a, b); }
INLINE Eight higher8(Eight a, Eight b) { return choose8(more8(a, b), a, b); }
INLINE Eight whole8(Eight a) { return joined8(vrndnq_f32(a.low), vrndnq_f32(a.high)); }
INLINE Eight magnitude8(Eight a) { return joined8(vabsq_f32(a.low), vabsq_f32(a.high)); }

INLINE float32x4_t larger_bits4(float32x4_t a, float32x4_t b)
{
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}

INLINE Eight larger_bits8(Eight a, Eight b)
{
    return joined8(larger_bits4(a.low, b.low), larger_bits4(a.high, b.high));
}

INLINE float32x4_t flipped4(float32x4_t values, uint32_t bits)
{
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(values), vdupq_n_u32(bits)));
}

INLINE Eight flipped8(Eight values, uint32_t bits)
{
    return joined8(flipped4(values.low, bits), flipped4(values.high, bits));
}

INLINE float32x4_t power_of_two4(float32x4_t n)
{
    int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}

INLINE Eight power_of_two8(Eight n) { return joined8(power_of_two4(n.low), power_of_two4(n.high)); }

INLINE Eight load8(const uint16_t *from)
{
    uint16x8_t narrow = vld1q_u16(from);
    return joined8(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(narrow), 16)),
                   vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(narrow), 16)));
}

INLINE void load_pairs8(const uint16_t *from, Eight *even, Eight *odd)
{
    uint32x4_t low = vreinterpretq_u32_u16(vld1q_u16(from));
    uint32x4_t high = vreinterpretq_u32_u16(vld1q_u16(from + 8)), mask = vdupq_n_u32(0xffff0000);
    *even = joined8(vreinterpretq_f32_u32(vshlq_n_u32(low, 16)),
                    vreinterpretq_f32_u32(vshlq_n_u32(high, 16)));
    *odd = joined8(vreinterpretq_f32_u32(vandq_u32(low, mask)),
                   vreinterpretq_f32_u32(vandq_u32(high, mask)));
}

INLINE Eight halves8(uint16x8_t halves)
{
    return joined8(vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))),
                   vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves))));
}

INLINE Eight load_halves8(const uint16_t *from) { return halves8(vld1q_u16(from)); }

INLINE void store_halves8(uint16_t *to, Eight values)
{
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(values.low)));
    vst1_u16(to + 4, vreinterpret_u16_f16(vcvt_f16_f32(values.high)));
}

INLINE Eight load_signed8(const uint8_t *from)
{
    int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(from)));
    return joined8(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))),
                   vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide))));
}

INLINE Eight load_fp8(const uint8_t *from)
{
    uint16x8_t wide = vreinterpretq_u16_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(from))));
    return halves8(vandq_u16(vshlq_n_u16(wide, 7), vdupq_n_u16(0xbfff))); /* one sign */
}

INLINE float32x4_t rounded4(float32x4_t values)
{
    uint32x4_t bits = vreinterpretq_u32_f32(values);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    uint32x4_t cut = vandq_u32(up, vdupq_n_u32(0xffff0000));
    return vreinterpretq_f32_u32(vbslq_u32(vceqq_f32(values, values), cut, vdupq_n_u32(0x7fc00000)));
}

INLINE Eight rounded8(Eight values) { return joined8(rounded4(values.low), rounded4(values.high)); }

INLINE void store8(uint16_t *to, Eight rounded)
{
    vst1_u16(to, vshrn_n_u32(vreinterpretq_u32_f32(rounded.low), 16));
    vst1_u16(to + 4, vshrn_n_u32(vreinterpretq_u32_f32(rounded.high), 16));
}

INLINE void store_codes8(uint8_t *to, Eight codes)
{
    uint16x8_t words = vcombine_u16(vqmovn_u32(vcvtq_u32_f32(codes.low)),
                                    vqmovn_u32(vcvtq_u32_f32(codes.high)));
    vst1_u8(to, vqmovn_u16(words));
}

INLINE float sum8(Eight values) { return vaddvq_f32(vaddq_f32(values.low, values.high)); }
INLINE float largest8(Eight values) { return vmaxvq_f32(vmaxq_f32(values.low, values.high)); }

INLINE void store_sums8(float *to, const Eight values[4])
{
    float32x4_t first = vpaddq_f32(vaddq_f32(values[0].low, values[0].high),
                                   vaddq_f32(values[1].low, values[1].high));
    float32x4_t last = vpaddq_f32(vaddq_f32(values[2].low, values[2].high),
                                  vaddq_f32(values[3].low, values[3].high));
    vst1q_f32(to, vpaddq_f32(first, last));
}

INLINE Eight sums_of_fours8(const Eight values[4])
{
    return joined8(vpaddq_f32(vpaddq_f32(values[0].low, values[0].high),
                              vpaddq_f32(values[1].low, values[1].high)),
                   vpaddq_f32(vpaddq_f32(values[2].low, values[2].high),
                              vpaddq_f32(values[3].low, values[3].high)));
}

/* Four lanes of four registers. */
INLINE void exchange4(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d, float32x4_t columns[4])
{
    float32x4_t ac = vzip1q_f32(a, c), ac_last = vzip2q_f32(a, c);
    float32x4_t bd = vzip1q_f32(b, d), bd_last = vzip2q_f32(b, d);
    columns[0] = vzip1q_f32(ac, bd);
    columns[1] = vzip2q_f32(ac, bd);
    columns[2] = vzip1q_f32(ac_last, bd_last);
    columns[3] = vzip2q_f32(ac_last, bd_last);
}

INLINE void exchange8(const Eight rows[8], Eight columns[8])
{
    float32x4_t own[4][4]; /* of the four quarters */
    exchange4(rows[0].low, rows[1].low, rows[2].low, rows[3].low, own[0]);
    exchange4(rows[4].low, rows[5].low, rows[6].low, rows[7].low, own[1]);
    exchange4(rows[0].high, rows[1].high, rows[2].high, rows[3].high, own[2]);
    exchange4(rows[4].high, rows[5].high, rows[6].high, rows[7].high, own[3]);
    for (int i = 0; i < 4; i++) {
        columns[i] = joined8(own[0][i], own[1][i]);
        columns[i + 4] = joined8(own[2][i], own[3][i]);
    }
}

INLINE unsigned begins_with8(const float *from, int distance, uint32_t wanted)
{
    static const uint32_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    int32x4_t shift = vdupq_n_s32(-distance);
    uint32x4_t want = vdupq_n_u32(wanted);
    uint32x4_t first = vreinterpretq_u32_f32(vld1q_f32(from));
    uint32x4_t last = vreinterpretq_u32_f32(vld1q_f32(from + 4));
    uint32x4_t low = vandq_u32(vceqq_u32(vshlq_u32(first, shift), want), vld1q_u32(places));
    uint32x4_t high = vandq_u32(vceqq_u32(vshlq_u32(last, shift), want), vld1q_u32(places + 4));
    return vaddvq_u32(vorrq_u32(low, high));
}
