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

#define INLINE static inline __attribute__((always_inline))

#endif
