/* What differs between processors and compilers.
 *
 * X86 and ARM are defined on processors of 64 bits of these kinds: there, vectors are made with the intrinsics
 * of AVX2 and of NEON. Elsewhere compilers make them of loops; so they do here with PLAIN_C, for tests. */
#ifndef DISTRIBUTED_LLM_INSTRUCTIONS_H
#define DISTRIBUTED_LLM_INSTRUCTIONS_H

#if defined(PLAIN_C)
#elif defined(__x86_64__) || defined(_M_X64)
#define X86
#include <immintrin.h>
#elif (defined(__aarch64__) && !defined(__AARCH64EB__)) || defined(_M_ARM64)
#define ARM
#include <arm_neon.h>
#endif

/* The words of GCC and Clang; other compilers are taken for Microsoft's. */
#if defined(__clang__) || defined(__GNUC__)
#define GNU
#endif

/* Lets the functions between INSTRUCTIONS("...") and INSTRUCTIONS_END use these instructions. Microsoft's
 * compiler lets any function use any. */
#if defined(__clang__)
#define PRAGMA(content) _Pragma(#content)
#define INSTRUCTIONS(list)                                                                         \
    PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define INSTRUCTIONS_END PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define PRAGMA(content) _Pragma(#content)
#define INSTRUCTIONS(list) PRAGMA(GCC push_options) PRAGMA(GCC target(list))
#define INSTRUCTIONS_END PRAGMA(GCC pop_options)
#else
#define INSTRUCTIONS(list)
#define INSTRUCTIONS_END
#endif

/* Before a loop over registers: they are none while the compiler keeps the loop. */
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#elif defined(GNU)
#define UNROLLED _Pragma("GCC unroll 8")
#else
#define UNROLLED
#endif

/* The name of ARM's products of bytes among INSTRUCTIONS. */
#ifdef __clang__
#define DOTPROD_NAME "dotprod"
#else
#define DOTPROD_NAME "arch=armv8.2-a+dotprod"
#endif

/* What functions of eights.h need. */
#ifdef X86
#define EIGHTS INSTRUCTIONS("avx2,fma,f16c")
#define EIGHTS_END INSTRUCTIONS_END
#else
#define EIGHTS
#define EIGHTS_END
#endif

#ifdef GNU
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

/* Asks memory for what stands at an address before it is needed. */
#if defined(X86)
#define PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
#elif defined(GNU)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) __prefetch(address)
#endif

#endif
