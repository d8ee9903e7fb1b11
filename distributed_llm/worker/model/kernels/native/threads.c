#include "threads.h"

#include <stddef.h>

typedef void Parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

static Parallel *parallel;

/* Sets what starts threads: GOMP_parallel of the library whose threads torch computes with. */
EXPORT void use_threads(Parallel *function) { parallel = function; }

void in_threads(void (*function)(void *), void *data, int threads)
{
    if (threads > 1 && parallel != NULL)
        parallel(function, data, (unsigned)threads, 0);
    else
        function(data);
}
