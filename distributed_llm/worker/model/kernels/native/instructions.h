/* Lets the functions between INSTRUCTIONS("...") and INSTRUCTIONS_END use these instructions. */
#ifndef DISTRIBUTED_LLM_INSTRUCTIONS_H
#define DISTRIBUTED_LLM_INSTRUCTIONS_H

#define PRAGMA(content) _Pragma(#content)

#ifdef __clang__
#define INSTRUCTIONS(list)                                                                         \
    PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define INSTRUCTIONS_END PRAGMA(clang attribute pop)
#else
#define INSTRUCTIONS(list) PRAGMA(GCC push_options) PRAGMA(GCC target(list))
#define INSTRUCTIONS_END PRAGMA(GCC pop_options)
#endif

/* Before a loop over registers: they are none while the compiler keeps the loop. */
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

#define INLINE static inline __attribute__((always_inline))

#endif
