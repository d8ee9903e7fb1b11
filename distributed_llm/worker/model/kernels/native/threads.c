/* Threads of the OpenMP library that torch computes with, by what compilers call of it: GCC of its own
 * (libgomp) and of the others where they stand in for it, Clang and Intel of theirs (libomp, libiomp). */
#include "threads.h"

#include <stddef.h>
#include <stdint.h>

typedef void Function(void *data);

/* GOMP_parallel. */
typedef void Parallel(Function *, void *data, unsigned threads, unsigned flags);

/* Where in a program threads are started: `ident_t` of LLVM's kmp.h. */
typedef struct {
    int32_t reserved, flags, more, length;
    const char *source;
} Place;

/* __kmpc_fork_call, __kmpc_push_num_threads and __kmpc_global_thread_num; what the first one calls is given
 * two numbers of the thread, and then the arguments. */
typedef void Forked(int32_t *, int32_t *, ...);
typedef void Fork(const Place *, int32_t arguments, Forked *, ...);
typedef void Push(const Place *, int32_t thread, int32_t threads);
typedef int32_t Number(const Place *);

static const Place here = {0, 2, 0, 0, ";unknown;unknown;0;0;;"};

static Parallel *parallel;
static Fork *fork_call;
static Push *push;
static Number *number;

/* Sets what starts threads; NULL: nothing does. */
EXPORT void use_parallel(Parallel *function) { parallel = function; }

/* The same, for libraries without that function. */
EXPORT void use_fork(Fork *starting, Push *pushing, Number *numbering)
{
    fork_call = starting;
    push = pushing;
    number = numbering;
}

static void call(int32_t *thread, int32_t *bound, Function *function, void *data)
{
    (void)thread;
    (void)bound;
    function(data);
}

void in_threads(Function *function, void *data, int threads)
{
    if (threads > 1 && parallel != NULL) {
        parallel(function, data, (unsigned)threads, 0);
    } else if (threads > 1 && fork_call != NULL) {
        push(&here, number(&here), threads);
        fork_call(&here, 2, (Forked *)call, function, data);
    } else {
        function(data);
    }
}
