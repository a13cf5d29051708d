/* The flags of the `shared` transport: who has signalled rows for whom, and who has read them.
 *
 * Control words lie in memory that all ranks of a node have mapped, a line of WORDS words each, with one writer:
 *   line of (owner, parity, reader)            the owner's post: number of the transfer, first row in the owner's slot
 *   line of (owner, 2 + parity, producer)      the owner has read this number of the producer's
 * `parity` is number % 2. A number is stored after what it announces (release) and read before it (acquire). Arrays by
 * parity and peer; `counts` (ranks) are rows from or to each rank of the whole group. Its twin: class SharedFlags in shared_flags.py.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define WORDS 8
#define BY_MESSAGE (-1)
#define POLLS_PER_YIELD 16

enum { WAITING, ALL_IN_SLOTS, SOME_BY_MESSAGE };

typedef _Atomic int64_t word;

typedef struct {
    int64_t size, own, slot_rows;
    int64_t numbers[2]; /* of the last transfer of each parity */
    const int64_t *ranks; /* of each peer, ascending */
    char *words;
    int64_t *expected; /* (2, size) what each reader must have read before the slot is free, 0 for nothing */
    int64_t *missing;  /* (2, size) whether rows of a peer are awaited */
    int64_t *firsts;   /* (2, size) where they begin in their owner's slot */
    int64_t *received;  /* (2, size) how many they are */
    int64_t *free;     /* (2) whether the slot was seen to be free since its last post */
    int64_t num_rows[2]; /* how many are awaited */
    int64_t *rows[2];    /* where each of them lies among all rows of all slots */
} flags;

static word *line(const flags *f, int64_t owner, int64_t kind, int64_t other) {
    return (word *)f->words + ((owner * 4 + kind) * f->size + other) * WORDS;
}

/* Whether all readers have read what was signalled the last time that it was this parity. */
int flags_slot_is_free(const flags *f, int parity) {
    for (int64_t peer = 0; peer < f->size; peer++) {
        int64_t expected = f->expected[parity * f->size + peer];
        if (expected && atomic_load_explicit(line(f, peer, 2 + parity, f->own), memory_order_acquire) != expected)
            return 0;
    }
    return f->free[parity] = 1;
}

/* Tell the readers where their rows are, and note which rows are awaited; its own rows a rank finds at once. */
void flags_signal(flags *f, int parity, int fits, const int64_t *sent, const int64_t *received) {
    int64_t number = f->numbers[parity] += 2, rank = 0, row = 0;
    f->free[parity] = 0;
    for (int64_t peer = 0; peer < f->size; peer++) {
        for (; rank < f->ranks[peer]; rank++)
            row += sent[rank];
        int64_t at = parity * f->size + peer, is_own = peer == f->own;
        f->received[at] = received[rank];
        f->missing[at] = !is_own && received[rank];
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

/* Note where each awaited row lies, by peer; 0 when some of them come as a message. */
static int find(const flags *f, int parity) {
    int64_t *rows = f->rows[parity], *end = rows + f->num_rows[parity];
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

/* At most `max_polls` polls at who has signalled. WAITING for some, or all have: ALL_IN_SLOTS are all rows, or SOME_BY_MESSAGE. */
int flags_poll(flags *f, int parity, int max_polls) {
    int64_t number = f->numbers[parity];
    for (int polls = 1;; polls++) {
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
        if (!left) {
            flags_slot_is_free(f, 1 - parity); /* the next transfer will ask */
            return find(f, parity) ? ALL_IN_SLOTS : SOME_BY_MESSAGE;
        }
        if (polls >= max_polls)
            return WAITING;
        if (polls % POLLS_PER_YIELD == 0)
            sched_yield();
    }
}

/* Tell the producers that their rows have been read. */
void flags_release(const flags *f, int parity) {
    int64_t number = f->numbers[parity];
    for (int64_t peer = 0; peer < f->size; peer++)
        if (peer != f->own && f->received[parity * f->size + peer])
            atomic_store_explicit(line(f, f->own, 2 + parity, peer), number, memory_order_release);
}
