/* A helper sleeps between calls that follow slowly, and spins for HELPER_SPINS rounds, some 400 us, between calls that
 * follow each other as those of a layer and of decode steps do.
 *
 * `ticket` holds the number of the call in its upper half and the number of tasks that nobody has taken in its lower
 * half: a helper that wakes late takes no task of another call than it woke for.
 */
#define _GNU_SOURCE
#include "threads.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define HELPER_SPINS 16000
#define CALLER_SPINS 4000

static void (*shared_task)(const void *, long);
static const void *shared_argument;
static _Atomic uint64_t ticket;
static _Atomic long num_undone;
static int num_helpers, num_threads = 1;
static pid_t owner;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER;

static inline void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

static void take_tasks(uint32_t call) {
    uint64_t seen = atomic_load(&ticket);
    while (seen >> 32 == call && (uint32_t)seen) {
        if (atomic_compare_exchange_weak(&ticket, &seen, seen - 1)) {
            shared_task(shared_argument, (long)(uint32_t)seen - 1);
            atomic_fetch_sub(&num_undone, 1);
            seen = atomic_load(&ticket);
        }
    }
}

static int is_current(uint32_t call) { return atomic_load(&ticket) >> 32 == call; }

static void *help(void *started_in) {
    for (uint32_t call = (uint32_t)(uintptr_t)started_in;;) {
        for (int spin = 0; spin < HELPER_SPINS && is_current(call); spin++)
            pause_core();
        if (is_current(call)) {
            pthread_mutex_lock(&mutex);
            while (is_current(call))
                pthread_cond_wait(&called, &mutex);
            pthread_mutex_unlock(&mutex);
        }
        call = (uint32_t)(atomic_load(&ticket) >> 32);
        take_tasks(call);
    }
    return NULL;
}

int use_threads(int count) {
    if (owner != getpid()) { /* a fork has none of its parent's threads, which may have held the mutex when it began */
        owner = getpid();
        num_helpers = 0;
        mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
        called = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    }
    sigset_t all, before; /* signals are the calling thread's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (; num_helpers < count - 1 && !failed; num_helpers += !failed) {
        pthread_t thread;
        failed = pthread_create(&thread, NULL, help, (void *)(uintptr_t)(atomic_load(&ticket) >> 32));
        if (!failed)
            pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    num_threads = failed ? 1 : count;
    return failed;
}

int thread_count(void) { return owner == getpid() ? num_threads : 1; }

void share_tasks(void (*task)(const void *, long), const void *argument, long count) {
    if (count < 2 || thread_count() < 2) {
        for (long i = 0; i < count; i++)
            task(argument, i);
        return;
    }
    uint32_t call = (uint32_t)(atomic_load(&ticket) >> 32) + 1;
    shared_task = task;
    shared_argument = argument;
    atomic_store(&num_undone, count);
    pthread_mutex_lock(&mutex);
    atomic_store(&ticket, (uint64_t)call << 32 | (uint32_t)count);
    pthread_cond_broadcast(&called);
    pthread_mutex_unlock(&mutex);
    take_tasks(call);
    for (int spin = 0; atomic_load(&num_undone); spin++)
        spin < CALLER_SPINS ? pause_core() : (void)sched_yield();
}
