"""Messages beside the main thread's: a stop reaches every rank along a tree."""

import time

import pytest

from moempi.runtime.abort_channel import AbortChannel

LIMIT_S = 60.0


@pytest.mark.ranks(7)
@pytest.mark.parametrize("roots", [(0,), (4,), (6, 2)])
def test_a_stop_reaches_every_rank_with_two_messages_of_each(comm, roots):
    own = comm.Dup()
    channel = AbortChannel(own, (), lambda: None)
    channel.forward_stop()
    assert not channel.stop_requested
    own.Barrier()
    if own.rank in roots:
        channel.request_stop()
        channel.request_stop()
    end, arrived = time.monotonic() + LIMIT_S, own.Ibarrier() if own.rank in roots else None
    while (arrived is None or not arrived.Test()) and time.monotonic() < end:
        channel.forward_stop()
        if arrived is None and channel.stop_requested:
            arrived = own.Ibarrier()
    assert channel.stop_requested
    assert len(channel._sent) <= 2
    if len(roots) == 1:
        assert sum(own.allgather(len(channel._sent))) == own.size - 1
    channel.forward_stop()
    own.Free()
