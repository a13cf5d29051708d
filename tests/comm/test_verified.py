"""Rows that change between sender and receiver raise an error that names both ranks."""

import numpy as np
import pytest

from moempi.comm.transports.base import start_transfer, wait

ROW_BYTES = 16


class CorruptTransport:
    """A transport that flips one bit of the rows that the last rank receives from the first."""

    name = "corrupt"

    def __init__(self, comm):
        from moempi.comm.transports.alltoallv import Alltoallv

        self._transport = Alltoallv(comm, row_bytes=ROW_BYTES)
        self._is_last = comm.rank == comm.size - 1

    def outgoing(self, rows):
        return self._transport.outgoing(rows)

    def send(self, outgoing, counts):
        self._transport.send(outgoing, counts)

    def receive(self, incoming, counts):
        receipt = self._transport.receive(incoming, counts)
        wait(receipt)
        if self._is_last:
            incoming[1, 3] ^= 4
        return receipt


def exchange(transport, comm, *, counts=None):
    sent = np.full(comm.size, 3)
    outgoing = transport.outgoing(int(sent.sum()))
    outgoing[:] = comm.rank
    received = sent if counts is None else counts
    incoming = np.zeros((int(received.sum()), ROW_BYTES), np.uint8)
    wait(start_transfer(transport, outgoing, sent, incoming, received))


@pytest.mark.ranks(1, 2, 3)
def test_unchanged_rows_raise_no_error(comm, num_ranks):
    from moempi.comm.transports.alltoallv import Alltoallv
    from moempi.comm.transports.verified import Verified

    transport = Verified(Alltoallv(comm, row_bytes=ROW_BYTES), comm)
    for _ in range(3):
        exchange(transport, comm)


@pytest.mark.ranks(2, 3)
def test_a_changed_bit_raises_an_error_that_names_both_ranks(comm, num_ranks):
    from moempi.comm.transports.verified import Verified
    from moempi.errors import DataError

    transport = Verified(CorruptTransport(comm), comm)
    if comm.rank < num_ranks - 1:
        exchange(transport, comm)
        return
    with pytest.raises(DataError, match=f"from rank 0 to rank {comm.rank} of a stage: 3 rows changed on the way"):
        exchange(transport, comm)


@pytest.mark.ranks(2)
def test_a_wrong_row_count_raises_an_error(comm, num_ranks):
    from moempi.comm.transports.alltoallv import Alltoallv
    from moempi.comm.transports.verified import Verified
    from moempi.errors import DataError

    transport = Verified(Alltoallv(comm, row_bytes=ROW_BYTES), comm)
    if comm.rank == 0:
        exchange(transport, comm)
        return
    with pytest.raises(DataError, match="from rank 0 to rank 1 of a stage: 3 rows were sent, 4 expected"):
        exchange(transport, comm, counts=np.array([4, 3]))
