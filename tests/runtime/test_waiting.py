"""Waiting for other ranks: when a rank sleeps, and for how long."""

import itertools
import time

import pytest

from moempi.runtime import waiting


@pytest.mark.parametrize("shared", [False, True])
def test_a_rank_sleeps_on_a_shared_core_only_and_never_long(monkeypatch, shared):
    slept, switches = [], itertools.count()
    monkeypatch.setattr(waiting, "num_preemptions", lambda: next(switches) if shared else 0)
    monkeypatch.setattr(waiting, "perf_counter", lambda: 0.1 * len(slept) ** 2 + 1e-3)
    monkeypatch.setattr(waiting, "sleep", slept.append)
    monkeypatch.setattr(waiting, "SPIN_S", -1.0)
    looks = itertools.count()
    waiting.wait_until(lambda: next(looks) == 20)
    assert len(slept) == (20 if shared else 0)
    assert all(seconds <= min(waiting.NAP_S, 0.1 * number**2 / 8) for number, seconds in enumerate(slept))
    assert not shared or slept[-1] == waiting.NAP_S


@pytest.mark.ranks(3)
def test_no_rank_passes_a_barrier_before_the_last_has_come(comm):
    own = comm.Dup()
    if own.rank == 2:
        time.sleep(0.2)
    came = time.monotonic()
    waiting.barrier(own)
    passed = time.monotonic()
    assert min(own.allgather(passed)) >= max(own.allgather(came))  # one clock: all ranks are on one host
    own.Free()
