/* What products.inc.h computes with, in registers of 512 bits. */
#define load_codes(from) _mm512_loadu_si512((const __m512i *)(from))
#define zero_integer() _mm512_setzero_si512()
#define set_integer(value) _mm512_set1_epi32(value)
#define broadcast_states(from) _mm512_set1_epi32(four_bytes(from))
#define low_codes(both) _mm512_and_si512(both, _mm512_set1_epi8(15))
#define high_codes(both) _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15))
#define to_real(value) _mm512_cvtepi32_ps(value)
#define zero_real() _mm512_setzero_ps()
#define set_real(value) _mm512_set1_ps(value)
#define load_half(from) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from)))
#define multiply(a, b) _mm512_mul_ps(a, b)
#define multiply_add(a, b, c) _mm512_fmadd_ps(a, b, c)
#define store_real(to, value) _mm512_storeu_ps(to, value)
#ifdef GNU
/* Written out, because GCC copies sums to other registers around the intrinsic and runs out of them. */
INLINE __m512i multiply_codes_512(__m512i sum, __m512i codes, __m512i states)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(states));
    return sum;
}
#else
#define multiply_codes_512(sum, codes, states) _mm512_dpbusd_epi32(sum, codes, states)
#endif
#define multiply_codes4 multiply_codes_512
#define multiply_codes8 multiply_codes_512
