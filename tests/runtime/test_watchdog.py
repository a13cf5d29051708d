"""Whom a rank watches, that it reports their death, and when it asks for the positions of others again."""

import os
import resource
import subprocess
import time
from contextlib import ExitStack, contextmanager
from itertools import combinations
from queue import SimpleQueue

import pytest

from moempi.runtime import watchdog
from moempi.runtime.watchdog import NUM_WATCHED, DeadRankError, Watchdog, watched

MANY = 1030
LIMIT_S = 60.0


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_survivor_watches_a_dead_rank_whichever_die(size):
    ranks = [3 * rank + 1 for rank in range(size)]
    assert all(len(watched(rank, ranks)) == min(NUM_WATCHED, size - 1) for rank in ranks)
    for count in range(1, size):
        for dead in combinations(ranks, count):
            assert any(not {*dead}.isdisjoint(watched(rank, ranks)) for rank in {*ranks} - {*dead})


def test_the_next_ranks_are_watched_and_after_the_last_the_first():
    assert watched(4, [0, 2, 4, 6, 8]) == [6, 8]
    assert watched(8, [0, 2, 6]) == [0, 2]
    assert watched(6, [0, 2, 8]) == [8, 0]


@contextmanager
def many_descriptors():
    """This process holds more descriptors than `select` takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * MANY:
        pytest.skip(f"a process may hold {hard} descriptors")
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * MANY), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(MANY):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


@contextmanager
def started(**callbacks):
    """A watchdog of rank 0 that has started; the queue of what it fails with."""
    failures = SimpleQueue()
    functions = {"on_hang": lambda timeout_s: timeout_s, "peers": {}} | callbacks
    own = Watchdog(failures.put, reply=lambda: None, rank=0, grace_s=0.0, **functions)
    own.start()
    try:
        yield own, failures
    finally:
        own.stop()


@contextmanager
def sleeping(count):
    """Processes that sleep, by their rank from 1 on."""
    processes = {rank: subprocess.Popen(["sleep", "600"]) for rank in range(1, count + 1)}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_a_dead_rank_is_reported_by_a_process_with_many_descriptors():
    with sleeping(3) as processes, many_descriptors():
        peers = {rank: process.pid for rank, process in processes.items()}
        with started(peers=peers) as (_, failures):
            processes[2].kill()
            error = failures.get(timeout=LIMIT_S)
    assert isinstance(error, DeadRankError)
    assert str(error) == f"rank 2 is gone: its process {peers[2]} was killed or crashed"


def test_positions_are_asked_for_again_when_the_youngest_passes_the_timeout(monkeypatch):
    """And not a share of the timeout after the query before, which is the latest time."""
    monkeypatch.setattr(watchdog, "SUSPICION_SHARE", 1e6)
    asked = SimpleQueue()

    def on_hang(_timeout_s):
        asked.put(time.monotonic())
        return 0.5

    with started(on_hang=on_hang) as (own, _):
        own.limit(0.1, group=0)
        first, second = asked.get(timeout=LIMIT_S), asked.get(timeout=LIMIT_S)
    assert second - first >= 0.5


def test_positions_are_asked_for_again_after_a_share_of_the_timeout(monkeypatch):
    asked = SimpleQueue()

    def on_hang(_timeout_s):
        asked.put(None)
        return 1e6

    with started(on_hang=on_hang) as (own, _):
        own.limit(0.1, group=0)
        for _ in range(3):
            asked.get(timeout=LIMIT_S)
