"""Messages beside the main thread's: a stop that any ranks request reaches every rank, along the edges of one tree."""

import random
import time
from itertools import combinations

import pytest

from moempi.runtime.abort_channel import STOP_TAG, AbortChannel

LIMIT_S = 60.0
NUM_ORDERS = 20


class FakeMessage:
    def __init__(self, content, source, target):
        self.content, self.source, self.target = content, source, target

    def recv(self):
        return self.content


class FakeComm:
    """The communicator of one rank: what it sends is added to `sent`, what it receives is taken from `arrived`."""

    def __init__(self, rank, size, sent):
        self.rank, self.size = rank, size
        self.sent, self.arrived = sent, []

    def isend(self, message, target, tag):
        assert tag == STOP_TAG
        self.sent.append(FakeMessage(message, self.rank, target))

    def improbe(self, *, tag, status):
        assert tag == STOP_TAG
        if not self.arrived:
            return None
        message = self.arrived.pop(0)
        status.source = message.source
        return message


class FakeWorld:
    """The abort channels of `size` ranks, and the messages between them that have not arrived."""

    def __init__(self, size):
        self.sent = []
        self.comms = [FakeComm(rank, size, self.sent) for rank in range(size)]
        self.channels = [AbortChannel(comm, (), lambda: None) for comm in self.comms]

    def deliver(self, message):
        self.sent.remove(message)
        self.comms[message.target].arrived.append(message)

    def stop_in_any_order(self, roots, order):
        """Let every one of `roots` request a stop at any time, and deliver the messages in any order."""
        waiting = list(roots)
        while waiting or self.sent:
            event = order.choice(waiting + self.sent)
            if isinstance(event, FakeMessage):
                self.deliver(event)
                self.channels[event.target].forward_stop()
            else:
                waiting.remove(event)
                self.channels[event].request_stop()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12])
def test_a_stop_of_one_two_or_three_ranks_reaches_every_rank_in_any_order_of_messages(size):
    order = random.Random(size)
    for num_roots in range(1, min(size, 3) + 1):
        for roots in list(combinations(range(size), num_roots)) * NUM_ORDERS:
            world = FakeWorld(size)
            world.stop_in_any_order(roots, order)
            assert all(channel.stop_requested for channel in world.channels), roots
            counts = [len(channel._sent) for channel in world.channels]
            assert max(counts) <= 3
            assert size - 1 <= sum(counts) <= 2 * (size - 1)
            assert num_roots > 1 or sum(counts) == size - 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 64])
def test_a_stop_reaches_every_rank_within_twice_the_depth_of_the_tree(size):
    for root in range(size):
        world = FakeWorld(size)
        world.channels[root].request_stop()
        for _ in range(2 * (size.bit_length() - 1)):
            for message in list(world.sent):
                world.deliver(message)
            for channel in world.channels:
                channel.forward_stop()
        assert all(channel.stop_requested for channel in world.channels), root


@pytest.mark.ranks(7)
@pytest.mark.parametrize("roots", [(0,), (4,), (6, 2), (3, 5, 6)])
def test_a_stop_reaches_every_rank_with_three_messages_of_each_at_most(comm, roots):
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
    assert len(channel._sent) <= 3
    if len(roots) == 1:
        assert sum(own.allgather(len(channel._sent))) == own.size - 1
    channel.forward_stop()
    own.Free()
