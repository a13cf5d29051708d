/* The board of the `shared` transport: who has posted rows for whom, and who has read them.
 *
 * Control words lie in memory that all ranks of a node have mapped, a line of WORDS words each, with one writer:
 *   line of (owner, turn, reader)            the owner's post: number of the transfer, first row in the owner's room
 *   line of (owner, 2 + turn, producer)      the owner has read this number of the producer's
 * `turn` is number % 2. A number is stored after what it announces (release) and read before it (acquire). Arrays by
 * turn and place; `counts` (ranks) are rows from or to each rank of the whole group. Its twin: class Board in board.py.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define WORDS 8
#define BY_MESSAGE (-1)
#define LOOKS_A_YIELD 16

enum { WAITING, IN_ROOMS, NOT_ALL };

typedef _Atomic int64_t word;

typedef struct {
    int64_t size, own, room_rows;
    int64_t numbers[2]; /* of the last transfer of each turn */
    const int64_t *ranks; /* of each place, ascending */
    char *words;
    int64_t *expected; /* (2, size) what each reader must have read before the room is free, 0 for nothing */
    int64_t *missing;  /* (2, size) whether rows of a place are awaited */
    int64_t *firsts;   /* (2, size) where they begin in their owner's room */
    int64_t *landing;  /* (2, size) how many they are */
    int64_t *free;     /* (2) whether the room was seen to be free since its last post */
    int64_t num_rows[2]; /* how many are awaited */
    int64_t *rows[2];    /* where each of them lies among all rows of all rooms */
} board;

static word *line(const board *b, int64_t owner, int64_t kind, int64_t other) {
    return (word *)b->words + ((owner * 4 + kind) * b->size + other) * WORDS;
}

/* Whether all readers have read what was posted the last time that it was this turn. */
int is_free(const board *b, int turn) {
    for (int64_t place = 0; place < b->size; place++) {
        int64_t expected = b->expected[turn * b->size + place];
        if (expected && atomic_load_explicit(line(b, place, 2 + turn, b->own), memory_order_acquire) != expected)
            return 0;
    }
    return b->free[turn] = 1;
}

/* Tell the readers where their rows are, and note which rows are awaited; its own rows a rank finds at once. */
void post(board *b, int turn, int fits, const int64_t *sent, const int64_t *landing) {
    int64_t number = b->numbers[turn] += 2, rank = 0, row = 0;
    b->free[turn] = 0;
    for (int64_t place = 0; place < b->size; place++) {
        for (; rank < b->ranks[place]; rank++)
            row += sent[rank];
        int64_t at = turn * b->size + place, is_own = place == b->own;
        b->landing[at] = landing[rank];
        b->missing[at] = !is_own && landing[rank];
        b->expected[at] = !is_own && sent[rank] ? number : 0;
        if (is_own)
            b->firsts[at] = fits ? row : BY_MESSAGE;
        else if (sent[rank]) {
            word *posted = line(b, b->own, turn, place);
            atomic_store_explicit(posted + 1, fits ? row : BY_MESSAGE, memory_order_relaxed);
            atomic_store_explicit(posted, number, memory_order_release);
        }
    }
}

/* Note where each awaited row lies, by place; 0 when some of them come as a message. */
static int find(const board *b, int turn) {
    int64_t *rows = b->rows[turn], *end = rows + b->num_rows[turn];
    for (int64_t place = 0; place < b->size; place++) {
        int64_t at = turn * b->size + place;
        if (!b->landing[at])
            continue;
        if (b->firsts[at] == BY_MESSAGE || end - rows < b->landing[at])
            return 0;
        int64_t first = (2 * place + turn) * b->room_rows + b->firsts[at];
        for (int64_t row = 0; row < b->landing[at]; row++)
            *rows++ = first + row;
    }
    return 1;
}

/* At most `patience` looks at who has posted. WAITING for some, or all have: IN_ROOMS are all rows, or NOT_ALL. */
int look(board *b, int turn, int patience) {
    int64_t number = b->numbers[turn];
    for (int looks = 1;; looks++) {
        int left = 0;
        for (int64_t place = 0; place < b->size; place++) {
            int64_t at = turn * b->size + place;
            if (!b->missing[at])
                continue;
            word *posted = line(b, place, turn, b->own);
            if (atomic_load_explicit(posted, memory_order_acquire) != number) {
                left++;
                continue;
            }
            b->firsts[at] = atomic_load_explicit(posted + 1, memory_order_relaxed);
            b->missing[at] = 0;
        }
        if (!left) {
            is_free(b, 1 - turn); /* the next transfer will ask */
            return find(b, turn) ? IN_ROOMS : NOT_ALL;
        }
        if (looks >= patience)
            return WAITING;
        if (looks % LOOKS_A_YIELD == 0)
            sched_yield();
    }
}

/* Tell the producers that their rows have been read. */
void release(const board *b, int turn) {
    int64_t number = b->numbers[turn];
    for (int64_t place = 0; place < b->size; place++)
        if (place != b->own && b->landing[turn * b->size + place])
            atomic_store_explicit(line(b, b->own, 2 + turn, place), number, memory_order_release);
}
