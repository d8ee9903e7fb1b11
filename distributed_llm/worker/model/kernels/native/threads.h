/* How work is spread over threads. */
#ifndef DISTRIBUTED_LLM_THREADS_H
#define DISTRIBUTED_LLM_THREADS_H

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Calls `function(data)` in so many threads at once; returns when it has returned in all. Each call
 * takes pieces of the work from a counter that they share. */
void in_threads(void (*function)(void *), void *data, int threads);

#endif
