/* Where keys and values of a sequence are. */
#ifndef DISTRIBUTED_LLM_PARTS_H
#define DISTRIBUTED_LLM_PARTS_H

#include <stdint.h>

/* Consecutive positions in one place; strides in bytes. attention.py makes tables of them. */
typedef struct {
    const uint8_t *keys, *values; /* of the first position and the first head */
    int64_t positions, key_head, key_position, value_head, value_position;
} Part;

#endif
