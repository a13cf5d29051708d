/* Ranks as threads with one set of shared flags, whose rows are ordinary memory: for ThreadSanitizer, which reports a row
 * that is read before, or overwritten while, its flag orders it. Each row holds its transfer, sender and receiver.
 */
#include "shared_flags.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3, TRANSFERS = 2000, MOST_ROWS = 5, SLOT_ROWS = RANKS * MOST_ROWS };

static _Alignas(64) char words[4 * RANKS * RANKS * WORDS * sizeof(word)];
static int64_t slots[2 * RANKS * SLOT_ROWS];

static int64_t num_rows(int64_t number, int64_t sender, int64_t receiver) {
    return (number * 7 + sender * 3 + receiver) % (MOST_ROWS + 1);
}

static int64_t value(int64_t number, int64_t sender, int64_t receiver) {
    return (number * RANKS + sender) * RANKS + receiver;
}

static void transfer(flags *f, int64_t number) {
    int parity = number % 2;
    int64_t sent[RANKS], received[RANKS], *row = slots + (2 * f->own + parity) * SLOT_ROWS;
    while (!f->free[parity] && !flags_slot_is_free(f, parity))
        sched_yield();
    for (int64_t peer = 0; peer < RANKS; peer++) {
        sent[peer] = num_rows(number, f->own, peer);
        received[peer] = num_rows(number, peer, f->own);
        for (int64_t i = 0; i < sent[peer]; i++)
            *row++ = value(number, f->own, peer);
    }
    flags_signal(f, parity, 1, sent);
    flags_expect(f, parity, received);
    while (flags_poll(f, parity) != ALL_IN_SLOTS)
        sched_yield();
    const int64_t *found = f->rows[parity];
    for (int64_t peer = 0; peer < RANKS; peer++)
        for (int64_t i = 0; i < received[peer]; i++)
            if (slots[*found++] != value(number, peer, f->own)) {
                fprintf(stderr, "flags_race: transfer %ld: a row from rank %ld is another's\n", (long)number, (long)peer);
                exit(1);
            }
    flags_release(f, parity);
}

static void *run_rank(void *own) {
    int64_t ranks[RANKS], state[4][2 * RANKS] = {{0}}, is_free[2] = {1, 1}, rows[2][RANKS * MOST_ROWS];
    for (int64_t rank = 0; rank < RANKS; rank++)
        ranks[rank] = rank;
    flags f = {
        RANKS, (intptr_t)own, SLOT_ROWS, {0, -1}, ranks, words, state[0], state[1], state[2], state[3], is_free,
        {RANKS * MOST_ROWS, RANKS * MOST_ROWS}, {rows[0], rows[1]}};
    for (int64_t number = 1; number <= TRANSFERS; number++)
        transfer(&f, number);
    return NULL;
}

int main(void) {
    pthread_t threads[RANKS];
    for (intptr_t own = 0; own < RANKS; own++)
        pthread_create(&threads[own], NULL, run_rank, (void *)own);
    for (int own = 0; own < RANKS; own++)
        pthread_join(threads[own], NULL);
    return 0;
}
