"""A witness beside each rank: a small process that outlives it, so that every end has one line and only one.

A rank that is killed cannot say so, and before the ranks are connected no other can. Its witness sees the pipe between
them close. Who wants to tell a cause, a rank or a witness, must hold the right to: a name that one process of the node
at a time can bind, gone with its holder, so nothing is left behind. Witnesses hold it for a while after their ranks.
"""

import atexit
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from moempi.runtime.launcher import LAUNCHERS

HOLD_S = 15.0
"""Longer than the launcher takes to end the other ranks, whose witnesses then keep silent."""
ACQUIRE, GRANTED, RELEASE = b"a", b"g", b"r"
STDERR = 2
JOB_NAMES = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID")


class Monitor:
    """This rank's end of the line to its witness; there is none where a process runs alone."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def fork(self) -> None:
        """Start the witness, before threads and MPI, if there is none; it is released when the interpreter ends."""
        rank = launched_rank(os.environ)
        if rank is None or self._socket is not None:
            return
        self._socket, theirs = socket.socketpair()
        if os.fork() == 0:
            self._socket.close()
            with suppress(BaseException):
                _watch(theirs, f"moempi: rank {rank} is gone: its process {os.getppid()} was killed or crashed\n")
            os._exit(0)
        theirs.close()
        atexit.register(self.release)

    def acquire_report_right(self) -> bool:
        """Whether this rank is the first of its node that wants to tell why the program ends."""
        if self._socket is None:
            return True
        with suppress(OSError):
            self._socket.sendall(ACQUIRE)
            return self._socket.recv(1) == GRANTED
        return True

    def release(self) -> None:
        """The rank needs its witness no more: it ends well, or others can tell of it on other nodes."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(RELEASE)
            self._socket.close()
            self._socket = None


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """This process's place among several that a launcher started; None for a single one."""
    for size_name, rank_name in LAUNCHERS:
        size, rank = environment.get(size_name, ""), environment.get(rank_name, "")
        if size.isdecimal() and rank.isdecimal():
            return int(rank) if int(size) > 1 else None
    return None


def _watch(socket_to_rank: socket.socket, error_line: str) -> None:
    """The witness: grant its rank the right to tell, or tell of its death."""
    os.setsid()  # signals to the rank's group are not for its witness
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    kept = socket_to_rank.fileno()
    for descriptor in (range(STDERR), range(STDERR + 1, kept), range(kept + 1, kept + 1024)):
        os.closerange(descriptor.start, descriptor.stop)
    held = None
    while (word := socket_to_rank.recv(1)) == ACQUIRE:
        held = held or _bind_report_right()
        socket_to_rank.sendall(GRANTED if held else b"-")
    if word == RELEASE:
        return
    if held is None:
        held = _bind_report_right()
        if held is not None:
            os.write(STDERR, error_line.encode())
    os.close(STDERR)
    if held is not None:
        time.sleep(HOLD_S)


def _bind_report_right() -> socket.socket | None:
    """The name, bound, if no other process of this job and node holds it."""
    job = "-".join(os.environ.get(name, "") for name in JOB_NAMES)
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0moempi-{os.getuid()}-{job}")
    except OSError:
        name.close()
        return None
    return name


WITNESS = Monitor()
