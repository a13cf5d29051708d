/* The flags of the `shared` transport: which senders have signalled rows for which receivers, and which have been read.
 *
 * The words lie in memory that all ranks of a node have mapped, in lines of WORDS words. Each line has one writer:
 *   line (sender, parity, receiver)        number of the transfer, and the receiver's first row in the sender's slot
 *   line (receiver, 2 + parity, sender)    number of the transfer whose rows the receiver has read
 * `parity` is number % 2. A number is stored (release) after the data that it announces, and loaded (acquire) before
 * that data. Senders and receivers are local ranks. `sent` and `received` are rows to and from each rank of the whole
 * group. Its twin in Python is class SharedFlags in shared_flags.py.
 */
#include <stdatomic.h>
#include <stdint.h>

#define WORDS 8
#define BY_MESSAGE (-1)

enum { WAITING, ALL_IN_SLOTS, SOME_BY_MESSAGE };

typedef _Atomic int64_t word;

typedef struct {
    int64_t size, own, slot_rows;
    int64_t numbers[2];    /* of the last transfer of each parity */
    const int64_t *ranks;  /* (size) rank in the group of each local rank, ascending */
    char *words;
    int64_t *expected;     /* (2, size) number that each receiver must have read before the slot is free, or 0 */
    int64_t *missing;      /* (2, size) whether the signal of a sender has not been seen */
    int64_t *firsts;       /* (2, size) first row in the sender's slot, or BY_MESSAGE */
    int64_t *received;     /* (2, size) rows from each sender */
    int64_t *free;         /* (2) whether the slot was seen to be free since its last transfer */
    int64_t capacities[2]; /* length of each of `rows` */
    int64_t *rows[2];      /* index of each received row among the rows of all slots */
} flags;

static word *line(const flags *f, int64_t owner, int64_t kind, int64_t other) {
    return (word *)f->words + ((owner * 4 + kind) * f->size + other) * WORDS;
}

/* Whether all receivers have read the rows of the last transfer of this parity. */
int flags_slot_is_free(const flags *f, int parity) {
    for (int64_t peer = 0; peer < f->size; peer++) {
        int64_t expected = f->expected[parity * f->size + peer];
        if (expected && atomic_load_explicit(line(f, peer, 2 + parity, f->own), memory_order_acquire) != expected)
            return 0;
    }
    return f->free[parity] = 1;
}

/* Signal to the receivers where their rows are, and record which of them must read the slot. */
void flags_signal(flags *f, int parity, int fits, const int64_t *sent) {
    int64_t number = f->numbers[parity] += 2, rank = 0, row = 0;
    f->free[parity] = 0;
    for (int64_t peer = 0; peer < f->size; peer++) {
        for (; rank < f->ranks[peer]; rank++)
            row += sent[rank];
        int64_t at = parity * f->size + peer, is_own = peer == f->own;
        f->expected[at] = !is_own && sent[rank] ? number : 0;
        if (is_own)
            f->firsts[at] = fits ? row : BY_MESSAGE;
        else if (sent[rank]) {
            word *flag = line(f, f->own, parity, peer);
            atomic_store_explicit(flag + 1, fits ? row : BY_MESSAGE, memory_order_relaxed);
            atomic_store_explicit(flag, number, memory_order_release);
        }
    }
}

/* Record which senders have rows for this rank: their signals are missing. */
void flags_expect(flags *f, int parity, const int64_t *received) {
    for (int64_t peer = 0; peer < f->size; peer++) {
        int64_t at = parity * f->size + peer;
        f->received[at] = received[f->ranks[peer]];
        f->missing[at] = peer != f->own && f->received[at];
    }
}

/* Write the index of each received row, ordered by sender; 0 if some rows are sent as messages. */
static int find(const flags *f, int parity) {
    int64_t *rows = f->rows[parity], *end = rows + f->capacities[parity];
    for (int64_t peer = 0; peer < f->size; peer++) {
        int64_t at = parity * f->size + peer;
        if (!f->received[at])
            continue;
        if (f->firsts[at] == BY_MESSAGE || end - rows < f->received[at])
            return 0;
        int64_t first = (2 * peer + parity) * f->slot_rows + f->firsts[at];
        for (int64_t row = 0; row < f->received[at]; row++)
            *rows++ = first + row;
    }
    return 1;
}

/* Read the senders' flags: WAITING, or once all have signalled, ALL_IN_SLOTS or SOME_BY_MESSAGE. */
int flags_poll(flags *f, int parity) {
    int64_t number = f->numbers[parity];
    int left = 0;
    for (int64_t peer = 0; peer < f->size; peer++) {
        int64_t at = parity * f->size + peer;
        if (!f->missing[at])
            continue;
        word *flag = line(f, peer, parity, f->own);
        if (atomic_load_explicit(flag, memory_order_acquire) != number) {
            left++;
            continue;
        }
        f->firsts[at] = atomic_load_explicit(flag + 1, memory_order_relaxed);
        f->missing[at] = 0;
    }
    if (left)
        return WAITING;
    flags_slot_is_free(f, 1 - parity); /* the next transfer uses that slot */
    return find(f, parity) ? ALL_IN_SLOTS : SOME_BY_MESSAGE;
}

/* Flag the rows of the last transfer of this parity as read. */
void flags_release(const flags *f, int parity) {
    int64_t number = f->numbers[parity];
    for (int64_t peer = 0; peer < f->size; peer++)
        if (peer != f->own && f->received[parity * f->size + peer])
            atomic_store_explicit(line(f, f->own, 2 + parity, peer), number, memory_order_release);
}
