/* A pool of threads that share the tasks of one call. */
#pragma once

/* Use `count` threads, the calling one among them, from the next call on: all of the pool, or none but the caller.
 *
 * Returns 0, or an errno if a thread cannot start; then the caller computes alone.
 */
int use_threads(int count);

/* Call task(argument, i) once for each i in [0, count), in any order and on any thread; returns when all are done. */
void share_tasks(void (*task)(const void *argument, long i), const void *argument, long count);

/* The number of threads that the next call uses. */
int thread_count(void);
