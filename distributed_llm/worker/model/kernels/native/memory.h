/* Memory that begins where a line of the caches does. */
#ifndef DISTRIBUTED_LLM_MEMORY_H
#define DISTRIBUTED_LLM_MEMORY_H

#include <stdint.h>

#define LINE 64 /* bytes */

/* Returns the first line in memory that was asked for with LINE more bytes than are needed. */
static inline void *at_line(void *memory)
{
    return (char *)memory + (LINE - (uintptr_t)memory % LINE) % LINE;
}

#endif
