"""The flags of the `shared` transport, of several ranks in one process: in C and in Python, beside pages that fault."""

import numpy as np
import pytest

from backend.cpu.guarded import guarded
from moempi.comm.transports.shared_flags import (
    ALL_IN_SLOTS,
    LINE_BYTES,
    SOME_BY_MESSAGE,
    WAITING,
    CompiledFlags,
    SharedFlags,
    _library,
    flags_bytes,
)

needs_library = pytest.mark.skipif(_library() is None, reason="no C compiler")
SLOT_ROWS = 1000


def make_flags(kinds, group_ranks):
    """The flags of each local rank, over the same words."""
    words = guarded(np.zeros(flags_bytes(len(kinds)), np.uint8))
    assert words.ctypes.data % LINE_BYTES == 0
    return [kind(words, group_ranks, own=own, slot_rows=SLOT_ROWS, sync=lambda: None) for own, kind in enumerate(kinds)]


def exchange(flags, number, counts, group_ranks, *, fits=True):
    """One transfer of all ranks: counts[i, j] rows from rank i to rank j of the group; checks what each rank finds."""
    parity = number % 2
    for rank, own in zip(group_ranks, flags, strict=True):
        assert own.slot_is_free(parity)
        received = counts[:, rank]
        own.signal(number, fits=fits, sent=counts[rank])
        own.expect(number, received=received, num_rows=int(received.sum()))
    for rank, own in zip(group_ranks, flags, strict=True):
        expected = [
            (2 * sender + parity) * SLOT_ROWS + counts[other, :rank].sum() + np.arange(counts[other, rank])
            for sender, other in enumerate(group_ranks)
        ]
        num_rows = sum(map(len, expected))
        found = own.poll(number)
        assert found == (ALL_IN_SLOTS if fits or not num_rows else SOME_BY_MESSAGE)
        if found == ALL_IN_SLOTS:
            np.testing.assert_array_equal(own.rows(number, num_rows), np.concatenate(expected))
    for own in flags:
        own.release(number)


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([CompiledFlags], marks=needs_library),
        pytest.param([CompiledFlags] * 2, marks=needs_library),
        pytest.param([CompiledFlags, SharedFlags, CompiledFlags], marks=needs_library),
        pytest.param([CompiledFlags] * 9, marks=needs_library),
        [SharedFlags] * 3,
    ],
    ids=["one", "two", "three, mixed", "nine", "three, Python"],
)
@pytest.mark.parametrize("step", [1, 3])
def test_transfers_of_edge_sizes(kinds, step):
    """Each rank sends 0, 1 or many rows to each other rank; ranks of other nodes are numbered between these."""
    group_ranks = list(range(step - 1, step * len(kinds), step))
    flags, size, random = make_flags(kinds, group_ranks), step * len(kinds), np.random.default_rng(step)
    sizes = [np.zeros((size, size), np.int64), np.eye(size, dtype=np.int64), np.ones((size, size), np.int64)]
    sizes += [random.integers(0, most, (size, size)) for most in (2, 3, 30)]
    others = np.setdiff1d(np.arange(size), group_ranks)
    for number, counts in enumerate(sizes * 2, start=1):
        counts = counts.copy()
        counts[others] = 0
        exchange(flags, number, counts, group_ranks, fits=number % 5 != 4)


@needs_library
def test_a_poll_before_the_signal_waits():
    flags = make_flags([CompiledFlags, CompiledFlags], [0, 1])
    counts = np.ones(2, np.int64)
    flags[0].signal(2, fits=True, sent=counts)
    flags[0].expect(2, received=counts, num_rows=2)
    assert flags[0].poll(2) == WAITING
    flags[1].signal(2, fits=True, sent=counts)
    assert flags[0].poll(2) == ALL_IN_SLOTS
    assert not flags[1].slot_is_free(0)
    flags[0].release(2)
    assert flags[1].slot_is_free(0)
