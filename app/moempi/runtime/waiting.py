"""Waiting for other ranks: on a core that other processes use as well, a rank that waits sleeps, so that they run."""

import os
import resource
from collections.abc import Callable, Iterable
from time import perf_counter, sleep
from typing import Protocol

from mpi4py import MPI

SPIN_S = 200e-6
"""Seconds of waiting before the process sleeps."""
NAP_S = 50e-3
"""Longest sleep between two looks. A collective of R ranks takes log2(R) of them after its last rank has come."""
NAP_SHARE = 1 / 8
"""A sleep is at most this share of the time waited so far."""


class Testable(Protocol):
    """A request of MPI, or what is complete in the same way."""

    def Test(self) -> bool:  # noqa: N802
        """Make progress; whether the request is complete. Does not block."""


def num_preemptions() -> int:
    """How often another process has run on this thread's core, though this thread was ready to run."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def wait_until(is_done: Callable[[], object]) -> None:
    """Block until `is_done()`, which makes progress; yields the core, and sleeps if another process takes it."""
    begin, preemptions = perf_counter(), num_preemptions()
    while not is_done():
        os.sched_yield()
        before, preemptions = preemptions, num_preemptions()
        if preemptions > before and (waited_s := perf_counter() - begin) > SPIN_S:
            sleep(min(waited_s * NAP_SHARE, NAP_S))


def wait(request: Testable) -> None:
    """Block until the request is complete. Only for a request of no lane: transfers of lanes do not advance."""
    wait_until(request.Test)


def barrier(comm: MPI.Intracomm) -> None:
    """Block until all ranks of `comm` are here; collective."""
    wait(comm.Ibarrier())


def send_bytes(comm: MPI.Intracomm, messages: Iterable[tuple[int, bytes]], *, tag: int) -> None:
    """Send each of the (rank, message) for `receive_bytes`, at the same time; blocks until all are sent."""
    requests = [comm.Isend([message, MPI.BYTE], rank, tag) for rank, message in messages]
    wait_until(lambda: MPI.Request.Testall(requests))


def receive_bytes(comm: MPI.Intracomm, *, tag: int) -> bytearray:
    """The next message of `send_bytes` to this rank with the tag, which one rank sends; blocks."""
    status = MPI.Status()
    wait_until(lambda: comm.Iprobe(tag=tag, status=status))
    message = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv([message, MPI.BYTE], tag=tag)
    return message
