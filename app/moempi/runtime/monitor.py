"""A monitor process beside each rank, so that a failure prints exactly one error line.

A rank that is killed cannot print, and before MPI has connected the ranks no other rank can print for it. So each rank
forks a monitor before MPI starts. The monitor blocks on a socket to its rank. If the rank dies without releasing it
(SIGKILL, a segmentation fault), the socket closes and the monitor prints the error line.

A rank or a monitor acquires the right to report before it prints: the monitor binds an abstract Unix socket, a name
that one process of a node can hold at a time. The kernel frees the name when its holder exits. A monitor with the right
exits HOLD_S after its rank.
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
"""Longer than the launcher takes to kill the other ranks, whose monitors then find the right taken."""
ACQUIRE, GRANTED, RELEASE = b"a", b"g", b"r"
STDERR = 2
JOB_NAMES = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID")


class Monitor:
    """A rank's connection to its monitor process; not connected until `fork`, and never for a single process."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def fork(self) -> None:
        """Start the monitor process; call it before threads and MPI start. It is released when the interpreter exits.

        Does nothing if the launcher started a single process.
        """
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
        """Whether this rank may print the error line; blocks until the monitor replies.

        True for the first process of a node to call it, and where there is no monitor.
        """
        if self._socket is None:
            return True
        with suppress(OSError):
            self._socket.sendall(ACQUIRE)
            return self._socket.recv(1) == GRANTED
        return True

    def release(self) -> None:
        """End the monitor process without an error line; safe to call twice."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(RELEASE)
            self._socket.close()
            self._socket = None


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """This process's rank as its launcher numbers it; None if the launcher started one process, or there is none."""
    for size_name, rank_name in LAUNCHERS:
        size, rank = environment.get(size_name, ""), environment.get(rank_name, "")
        if size.isdecimal() and rank.isdecimal():
            return int(rank) if int(size) > 1 else None
    return None


def _watch(socket_to_rank: socket.socket, error_line: str) -> None:
    """The monitor process: acquire the right for its rank on request; print the error line if the rank dies."""
    os.setsid()  # a signal to the rank's process group does not reach its monitor
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
    """A socket bound to the name that stands for the right; None if another process of this job and node has it."""
    job = "-".join(os.environ.get(name, "") for name in JOB_NAMES)
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0moempi-{os.getuid()}-{job}")
    except OSError:
        name.close()
        return None
    return name
