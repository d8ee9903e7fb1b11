/* What a list of operations consists of, beside sums, products and copies of numbers. */
#ifndef DISTRIBUTED_LLM_REPLAY_H
#define DISTRIBUTED_LLM_REPLAY_H

#include "products.h"
#include "threads.h"

#include <stdint.h>

EXPORT int int8_products(const void *states, void *output, const Weight *weights, int num_weights,
                         int64_t rows, int64_t inputs, int dtype, int threads, int instructions);

EXPORT int int4_products(const void *states, void *output, const Weight *weights, int num_weights,
                         int64_t rows, int64_t inputs, int64_t group, int dtype, int threads,
                         int instructions);

EXPORT int row_products(const uint16_t *states, uint16_t *output, const Weight *weights, int num_weights,
                        int64_t rows, int64_t inputs, int threads, int instructions);

EXPORT int expert_products(const uint16_t *states, uint16_t *output, const Weight *weights,
                           const int64_t *chosen, int64_t num_weights, int64_t choices, int64_t sharing,
                           int64_t inputs, int64_t group, int form, int threads, int instructions);

EXPORT void rms_norm(const uint16_t *states, uint16_t *output, const uint16_t *weight, int64_t rows,
                     int64_t columns, float epsilon, int kind, int threads);

EXPORT int attend_tokens(const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
                         uint16_t *output, const float *sinks, const float *biases,
                         const float *rotation, const void *parts, const int64_t *starts,
                         const int64_t *sizes, float scale, float softcap, int kept, int threads);

EXPORT int absorb_queries(const uint16_t *queries, const uint16_t *weight, uint16_t *output,
                          const int64_t *sizes, int threads);

EXPORT int latent_values(const uint16_t *latents, const uint16_t *weight, uint16_t *output,
                         const int64_t *sizes, int threads);

EXPORT void delta_rule(const uint16_t *query, const uint16_t *key, const uint16_t *value,
                       const float *fading, const uint16_t *beta, const float *state, float *made,
                       uint16_t *output, const int64_t *sizes, int threads);

EXPORT void selective_update(const uint16_t *inputs, const uint16_t *times, const uint16_t *writing,
                             const uint16_t *reading, const uint16_t *gates, const float *fading,
                             const float *bias, const float *passing, const float *state, float *made,
                             uint16_t *output, const int64_t *sizes, int threads);

EXPORT void convolve(const uint16_t *column, uint16_t *window, const uint16_t *weight, const uint16_t *bias,
                     uint16_t *output, const int64_t *sizes, int with_silu);

#endif
