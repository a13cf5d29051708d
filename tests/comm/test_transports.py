"""Every transport sends every row to its destination; the rows encode source, destination, step and index."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moempi.comm.transports.base import wait

ROW_BYTES = 24
PATTERNS = ["even", "random", "skewed", "some empty", "nothing", "itself"]


def transports(comm):
    """Every transport, and variants of `shared`: nodes, slot size, copies, and both kinds of flags."""
    from moempi.comm.transports.alltoallv import Alltoallv
    from moempi.comm.transports.pairwise import Pairwise
    from moempi.comm.transports.shared import Shared, SlotOptions
    from moempi.comm.transports.shared_flags import SharedFlags, make_shared_flags

    pairs = tuple(rank // 2 for rank in range(comm.size))
    return {
        "alltoallv": Alltoallv(comm, row_bytes=ROW_BYTES),
        "pairwise": Pairwise(comm, row_bytes=ROW_BYTES),
        "shared": Shared(comm, row_bytes=ROW_BYTES),
        "shared in pairs": Shared(comm, row_bytes=ROW_BYTES, nodes=pairs),
        "shared in a small slot": Shared(comm, row_bytes=ROW_BYTES, slots=SlotOptions(num_bytes=8 * ROW_BYTES)),
        "shared and copied": Shared(comm, row_bytes=ROW_BYTES, slots=SlotOptions(in_place=False)),
        "shared in Python": Shared(comm, row_bytes=ROW_BYTES, make_flags=SharedFlags),
        "shared in both": Shared(
            comm, row_bytes=ROW_BYTES, make_flags=SharedFlags if comm.rank % 2 else make_shared_flags
        ),
    }


def counts_of(pattern, size, step):
    """Rows from each rank to each (R, R), the same on all ranks."""
    random = np.random.default_rng(step)
    match pattern:
        case "even":
            return np.full((size, size), 3)
        case "random":
            return random.integers(0, 9, (size, size)) * random.integers(0, 2, (size, size))
        case "skewed":
            return np.where(np.arange(size) == step % size, 7, 0) * np.ones((size, 1), int)
        case "some empty":
            return np.where(np.arange(size) % 2, 0, 4)[:, None] * np.ones(size, int)
        case "nothing":
            return np.zeros((size, size), int)
        case "itself":
            return np.eye(size, dtype=int) * 5
    raise AssertionError(pattern)


def block(source, destination, count, step):
    """Rows that differ from the rows of any other pair, step or index."""
    rows = np.zeros((count, ROW_BYTES // 4), np.int32)
    rows[:] = np.array([source, destination, step, 0, 17, -1])
    rows[:, 3] = np.arange(count)
    return rows.view(np.uint8)


def start(transport, rank, counts, step, *, on_sent=lambda: None):
    """Start a transfer, call `on_sent` when its rows are sent; its receipt, and the rows that should be received."""
    size = len(counts)
    outgoing = transport.outgoing(counts[rank].sum())
    assert outgoing.ctypes.data % 64 == 0 or not len(outgoing)
    sent = [block(rank, peer, counts[rank, peer], step) for peer in range(size)]
    outgoing[:] = np.concatenate(sent)
    expected = np.concatenate([block(peer, rank, counts[peer, rank], step) for peer in range(size)])
    transport.send(outgoing, counts[rank])
    on_sent()
    return transport.receive(np.full(expected.shape, 255, np.uint8), counts[:, rank]), expected


def received(receipt):
    """The rows of a complete transfer."""
    buffer, index = receipt.rows()
    rows = np.array(buffer if index is None else buffer[index])
    receipt.release()
    return rows


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_row_is_received_in_order(comm, num_ranks, pattern):
    for name, transport in transports(comm).items():
        for step in range(6):
            counts = counts_of(pattern, num_ranks, step)
            receipt, expected = start(transport, comm.rank, counts, step)
            wait(receipt)
            assert receipt.Test()
            assert (received(receipt) == expected).all(), f"{name}, step {step}"


@pytest.mark.ranks(2, 3)
def test_two_transfers_are_pending_while_ranks_are_late(comm, num_ranks):
    import time

    for name, transport in transports(comm).items():
        started = []
        for step in range(20):
            if step % num_ranks == comm.rank:
                time.sleep(0.002)
            started.append(start(transport, comm.rank, counts_of("random", num_ranks, step), step))
            if len(started) == 2:
                receipt, expected = started.pop(0)
                while not receipt.Test():
                    comm.Iprobe()
                assert (received(receipt) == expected).all(), f"{name}, step {step - 1}"
        receipt, expected = started[0]
        wait(receipt)
        assert (received(receipt) == expected).all()


@pytest.mark.ranks(2, 3)
def test_a_rank_may_send_the_rows_of_the_next_transfer_before_others_have_received_the_last(comm, num_ranks):
    import time

    for name, transport in transports(comm).items():
        for step in range(12):
            late = partial(time.sleep, 0.003 if step % num_ranks == comm.rank else 0)
            receipt, expected = start(transport, comm.rank, counts_of("random", num_ranks, step), step, on_sent=late)
            wait(receipt)
            assert (received(receipt) == expected).all(), f"{name}, step {step}"


@pytest.mark.ranks(2)
def test_a_rank_receives_rows_that_were_sent_before_it_knew_of_them(comm, num_ranks):
    """Only the collective waits for the receiver: all other transports need no more of a sender than `send`."""
    for name, transport in transports(comm).items():
        if name == "alltoallv":
            continue
        counts = np.array([[0, 2], [0, 0]])  # rank 1 sends nothing, so rank 0 waits for nothing of rank 1
        receipt, expected = start(transport, comm.rank, counts, 0, on_sent=comm.Barrier if comm.rank else lambda: None)
        if comm.rank == 0:
            comm.Barrier()
        wait(receipt)
        assert (received(receipt) == expected).all(), name
        comm.Barrier()


@pytest.mark.ranks(2)
def test_little_shared_memory_makes_small_slots(comm, monkeypatch):
    from moempi.comm.transports import shared

    for free_bytes in (0, 4 * 2 * 2 * 192):  # no slot, and 8 rows in each of 4 slots
        monkeypatch.setattr(shared, "_free_bytes", lambda free_bytes=free_bytes: free_bytes)
        transport = shared.Shared(comm, row_bytes=ROW_BYTES)
        assert len(transport.slots) == 4 * (free_bytes // (4 * 4 * ROW_BYTES))
        for step in range(6):
            receipt, expected = start(transport, comm.rank, counts_of("random", 2, step), step)
            wait(receipt)
            assert (received(receipt) == expected).all()


@pytest.mark.ranks(2)
def test_a_shared_slot_can_be_sent_from_again_once_its_rows_are_read(comm, num_ranks):
    from moempi.comm.transports.shared import Shared

    transport = Shared(comm, row_bytes=ROW_BYTES)
    counts = np.ones((2, 2), np.int64)
    receipts = []
    for step in range(2):
        assert transport.can_send()
        receipts.append(start(transport, comm.rank, counts, step)[0])
        wait(receipts[-1])
    comm.Barrier()
    assert not transport.can_send()
    comm.Barrier()
    received(receipts[0])
    comm.Barrier()
    assert transport.can_send()
    received(receipts[1])


@pytest.mark.ranks(2)
def test_a_hop_whose_slot_is_not_free_waits_without_blocking(comm, num_ranks):
    from moempi.backend.cpu.backend import NumpyBackend
    from moempi.comm.hop import Hop
    from moempi.comm.transfers import PendingTransfers, Transfers
    from moempi.comm.transports.shared import Shared

    backend, width = NumpyBackend(precision="float32"), ROW_BYTES // 4
    transport = Shared(comm, row_bytes=ROW_BYTES)
    hop = Hop(comm, backend, transfers=Transfers(backend, PendingTransfers()), transport=transport)
    rows, counts = np.full((2, width), 1.0 + comm.rank, np.float32), np.ones(2, np.int64)

    def exchange():
        return hop.transfers.start(hop.exchange_steps(rows, None, counts, counts))

    receipts = [exchange().finish() for _ in range(2)]
    third = exchange()  # neither of the others has been read
    assert not third.Test()
    comm.Barrier()
    for receipt in receipts:
        assert hop.unpack(receipt, None)[:, 0].tolist() == [1.0, 2.0]
    assert hop.unpack(third.finish(), None)[:, 0].tolist() == [1.0, 2.0]


def shared_mappings():
    """The mappings of shared memory of this process."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]


def next_handle(comm):
    """MPI's number for the next communicator: the lowest that is free."""
    duplicate = comm.Dup()
    handle = duplicate.py2f()
    duplicate.Free()
    return handle


@pytest.mark.ranks(1, 3)
def test_a_freed_transport_leaves_no_communicator_and_no_shared_memory(comm, num_ranks):
    from moempi.comm.transports.verified import Verified

    before = next_handle(comm), shared_mappings()
    made = [Verified(transport, comm) for transport in transports(comm).values()]
    assert next_handle(comm) > before[0]
    for transport in made:
        receipt, expected = start(transport, comm.rank, counts_of("even", comm.size, 0), 0)
        wait(receipt)
        assert (received(receipt) == expected).all()
        transport.free()
    assert (next_handle(comm), shared_mappings()) == before


@pytest.mark.ranks(2)
def test_the_probes_of_a_run_and_of_moempi_check_leave_no_communicator_and_no_shared_memory(comm, num_ranks):
    from moempi.backend.cpu.backend import NumpyBackend
    from moempi.comm.select_transport import fastest
    from moempi.comm.transport_probe import probe
    from moempi.runtime.world import World

    world, backend = World(comm), NumpyBackend(precision="bfloat16")
    for action in (lambda: fastest(comm, comm, backend, width=16, nodes=(0, 0)), lambda: probe(world)):
        before = next_handle(comm), shared_mappings()
        action()
        assert (next_handle(comm), shared_mappings()) == before
