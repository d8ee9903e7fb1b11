/* What products.inc.h computes with, in plain C: four numbers at a time. */
typedef struct {
    uint32_t lane[4]; /* of codes or states four bytes each, or an int32 */
} FourIntegers;

typedef struct {
    float lane[4];
} FourReals;

#define EACH_OF_4 for (int i = 0; i < 4; i++)

INLINE FourIntegers load_codes_plain(const void *from)
{
    FourIntegers made;
    memcpy(made.lane, from, sizeof made.lane);
    return made;
}

INLINE FourIntegers set_integer_plain(uint32_t value)
{
    FourIntegers made;
    EACH_OF_4 made.lane[i] = value;
    return made;
}

INLINE FourIntegers low_codes_plain(FourIntegers both, int shift)
{
    EACH_OF_4 both.lane[i] = both.lane[i] >> shift & 0x0f0f0f0fu;
    return both;
}

/* Adds products of four signed codes, from which bits were `flipped`, with four states. */
INLINE FourIntegers multiply_codes_plain(FourIntegers sum, FourIntegers codes, FourIntegers states,
                                         uint32_t flipped)
{
    for (int i = 0; i < 4; i++) {
        uint32_t four = codes.lane[i] ^ flipped;
        int32_t own = 0;
        for (int k = 0; k < 32; k += 8)
            own += (int8_t)(four >> k & 0xff) * (int8_t)(states.lane[i] >> k & 0xff);
        sum.lane[i] += (uint32_t)own;
    }
    return sum;
}

INLINE FourReals to_real_plain(FourIntegers values)
{
    FourReals made;
    EACH_OF_4 made.lane[i] = (float)(int32_t)values.lane[i];
    return made;
}

INLINE FourReals set_real_plain(float value)
{
    FourReals made;
    EACH_OF_4 made.lane[i] = value;
    return made;
}

INLINE FourReals load_half_plain(const uint8_t *from)
{
    uint16_t halves[4];
    FourReals made;
    memcpy(halves, from, sizeof halves);
    EACH_OF_4 made.lane[i] = half_widened(halves[i]);
    return made;
}

INLINE FourReals multiply_plain(FourReals a, FourReals b)
{
    EACH_OF_4 a.lane[i] *= b.lane[i];
    return a;
}

INLINE FourReals multiply_add_plain(FourReals a, FourReals b, FourReals c)
{
    EACH_OF_4 c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}

#undef EACH_OF_4
#define load_codes(from) load_codes_plain(from)
#define zero_integer() set_integer_plain(0)
#define set_integer(value) set_integer_plain((uint32_t)(value))
#define broadcast_states(from) set_integer_plain((uint32_t)four_bytes(from))
#define low_codes(both) low_codes_plain(both, 0)
#define high_codes(both) low_codes_plain(both, 4)
#define to_real(value) to_real_plain(value)
#define zero_real() set_real_plain(0.0f)
#define set_real(value) set_real_plain(value)
#define load_half(from) load_half_plain(from)
#define multiply(a, b) multiply_plain(a, b)
#define multiply_add(a, b, c) multiply_add_plain(a, b, c)
#define store_real(to, value) memcpy(to, (value).lane, sizeof(value).lane)
