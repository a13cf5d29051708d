"""All ranks send from device memory, or none does: ranks that differ would wait for different messages."""

import subprocess
import sys

import numpy as np
import pytest

from moempi.comm import device_memory
from moempi.comm.device_memory import ROWS, start_allgatherv, start_alltoallv, start_message, takes_device_memory
from moempi.comm.transfers import NO_REQUEST
from moempi.comm.transports.base import wait
from moempi.config.job import ExchangeSection


def decide(monkeypatch, comm, *, nodes=(), fails_on=(), without_gpu=(), **exchange):
    """This rank's decision, and whether it made a trial; `nodes` are the nodes of the ranks."""
    from types import SimpleNamespace

    nodes = nodes or (0,) * comm.size
    tried = []

    def trial():
        tried.append(comm.rank)
        return comm.rank not in fails_on

    monkeypatch.setattr(device_memory, "trial", trial)
    local_rank = nodes[: comm.rank].count(nodes[comm.rank])
    world = SimpleNamespace(comm=comm, rank=comm.rank, local_rank=local_rank)
    has_gpu = comm.rank not in without_gpu
    decision = takes_device_memory(ExchangeSection(**exchange), world, has_gpu=has_gpu)
    assert len(set(comm.allgather(decision))) == 1
    return decision, bool(tried)


@pytest.mark.ranks(3)
def test_the_first_rank_of_each_node_tries_and_all_agree(comm, monkeypatch):
    nodes = (0, 0, 1)
    assert decide(monkeypatch, comm, nodes=nodes) == (True, comm.rank != 1)
    assert decide(monkeypatch, comm, nodes=nodes, fails_on=[2]) == (False, comm.rank != 1)
    assert decide(monkeypatch, comm, nodes=nodes, without_gpu=[1]) == (False, comm.rank != 1)
    assert decide(monkeypatch, comm, nodes=nodes, without_gpu=[0, 1, 2]) == (False, False)


@pytest.mark.ranks(2)
def test_the_job_can_decide_without_a_trial(comm, monkeypatch):
    assert decide(monkeypatch, comm, buffers="device") == (True, False)
    assert decide(monkeypatch, comm, buffers="device", without_gpu=[1]) == (False, False)
    assert decide(monkeypatch, comm, buffers="host") == (False, False)
    assert decide(monkeypatch, comm, verify=True) == (False, False)
    assert decide(monkeypatch, comm, transport="shared") == (False, False)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("start", [start_message, start_alltoallv, start_allgatherv])
def test_each_call_of_the_trial_moves_all_rows(comm, start):
    outgoing, incoming = np.arange(ROWS, dtype=np.int32), np.zeros(ROWS, np.int32)
    wait(start(comm, outgoing, incoming))
    np.testing.assert_array_equal(incoming, outgoing)


def test_a_trial_that_hangs_or_fails_is_no_error(monkeypatch):
    def hang(*_, **__):
        raise subprocess.TimeoutExpired("trial", 60.0)

    monkeypatch.setattr(subprocess, "run", hang)
    assert not device_memory.trial()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -11))
    assert not device_memory.trial()


@pytest.mark.ranks(1)
def test_the_trial_compares_what_every_call_moves(comm, monkeypatch):
    """On the SIMT device, whose device memory any MPI can address; then with calls that move nothing."""
    from types import SimpleNamespace

    from simt.device import SimtDevice

    module = SimpleNamespace(CupyDevice=lambda number, pinned: SimtDevice(pinned=pinned))
    monkeypatch.setitem(sys.modules, "moempi.backend.cuda.cupy_device", module)
    assert device_memory._send_to_self()
    for name in ("start_message", "start_alltoallv", "start_allgatherv"):
        with monkeypatch.context() as patch:
            patch.setattr(device_memory, name, lambda *_: NO_REQUEST)
            assert not device_memory._send_to_self()
