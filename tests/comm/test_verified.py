"""Rows that change on the way are noticed where they arrive, and both ranks are named."""

import numpy as np
import pytest

ROW_BYTES = 16


class Damaging:
    """A transport that changes one bit of what the last rank receives from the first."""

    name = "damaging"

    def __init__(self, comm):
        from moempi.comm.transports.alltoallv import Alltoallv

        self._inner = Alltoallv(comm, row_bytes=ROW_BYTES)
        self._strikes = comm.rank == comm.size - 1

    def outgoing(self, rows):
        return self._inner.outgoing(rows)

    def start(self, outgoing, send_counts, incoming, recv_counts):
        pending = self._inner.start(outgoing, send_counts, incoming, recv_counts)
        pending.Wait()
        if self._strikes:
            incoming[1, 3] ^= 4
        return pending


def exchange(transport, comm, *, counts=None):
    sent = np.full(comm.size, 3)
    outgoing = transport.outgoing(int(sent.sum()))
    outgoing[:] = comm.rank
    received = sent if counts is None else counts
    incoming = np.zeros((int(received.sum()), ROW_BYTES), np.uint8)
    transport.start(outgoing, sent, incoming, received).Wait()


@pytest.mark.ranks(1, 2, 3)
def test_whole_rows_pass(comm, num_ranks):
    from moempi.comm.transports.alltoallv import Alltoallv
    from moempi.comm.transports.verified import Verified

    transport = Verified(Alltoallv(comm, row_bytes=ROW_BYTES), comm)
    for _ in range(3):
        exchange(transport, comm)


@pytest.mark.ranks(2, 3)
def test_a_changed_bit_names_both_ranks(comm, num_ranks):
    from moempi.comm.transports.verified import Verified
    from moempi.errors import DataError

    transport = Verified(Damaging(comm), comm)
    if comm.rank < num_ranks - 1:
        exchange(transport, comm)
        return
    with pytest.raises(DataError, match=f"from rank 0 to rank {comm.rank} of a stage: 3 rows changed on the way"):
        exchange(transport, comm)


@pytest.mark.ranks(2)
def test_more_rows_expected_than_sent_are_noticed(comm, num_ranks):
    from moempi.comm.transports.alltoallv import Alltoallv
    from moempi.comm.transports.verified import Verified
    from moempi.errors import DataError

    transport = Verified(Alltoallv(comm, row_bytes=ROW_BYTES), comm)
    if comm.rank == 0:
        exchange(transport, comm)
        return
    with pytest.raises(DataError, match="from rank 0 to rank 1 of a stage: 3 rows were sent, 4 expected"):
        exchange(transport, comm, counts=np.array([4, 3]))
