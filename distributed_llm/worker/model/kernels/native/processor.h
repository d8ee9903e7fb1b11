/* What the processor can do. */
#ifndef DISTRIBUTED_LLM_PROCESSOR_H
#define DISTRIBUTED_LLM_PROCESSOR_H

#include "threads.h"

/* Sets of instructions, in the order of library.py. All functions of the library need the first one of a kind
 * of processor; others make products of integers faster. */
enum { NONE, PLAIN, NEON, DOTPROD, AVX2, AVXVNNI, AVX512VNNI, SETS };

EXPORT int has_instructions(int number);

/* Whether the processor multiplies bfloat16 (AVX512-BF16), beside the instructions of a set. */
int has_bfloat16(void);

#endif
