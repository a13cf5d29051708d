"""A monitor process beside each rank, so that a failure prints exactly one error line.

A rank that is killed cannot print, and before MPI has connected the ranks no other rank can print for it. So each rank
forks a monitor before MPI starts. The monitor blocks on a socket to its rank. If the rank dies without releasing it
(SIGKILL, a segmentation fault), the socket closes and the monitor prints the error line.

A rank or a monitor acquires the right to report before it prints: the monitor locks one byte, whose offset names the
job, of a file in a folder that only this user can enter. The kernel frees the lock when its holder exits. A monitor
with the right exits HOLD_S after its rank. If no folder can be used, every rank prints: two lines are better than none.

A rank waits for its monitor for ACQUIRE_LIMIT_S. Then it kills the monitor and locks the byte itself.
"""

import atexit
import fcntl
import hashlib
import os
import signal
import socket
import stat
import time
from collections.abc import Mapping
from contextlib import suppress

from moempi.printing import STDERR, write_error
from moempi.runtime.launcher import LAUNCHERS

HOLD_S = 15.0
"""Longer than the launcher takes to kill the other ranks, whose monitors then find the right taken."""
ACQUIRE_LIMIT_S = 1.0
"""How long a rank waits for a reply or the end of its monitor, which may be stopped."""
ACQUIRE, GRANTED, RELEASE = b"a", b"g", b"r"
FOLDERS = ("/tmp", "/dev/shm")
"""Parents of the user's folder of locks if XDG_RUNTIME_DIR cannot be used. The folder stays; its file is empty."""
JOB_NAMES = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID")


class Monitor:
    """A rank's connection to its monitor process; not connected until `fork`, and never for a single process."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process = 0

    def fork(self) -> None:
        """Start the monitor process; call it before threads and MPI start. It is released when the interpreter exits.

        Does nothing if the launcher started a single process.
        """
        rank = launched_rank(os.environ)
        if rank is None or self._socket is not None:
            return
        self._socket, theirs = socket.socketpair()
        self._process = os.fork()
        if self._process == 0:
            self._socket.close()
            with suppress(BaseException):
                _watch(theirs, f"rank {rank} is gone: its process {os.getppid()} was killed or crashed")
            os._exit(0)
        theirs.close()
        self._socket.settimeout(ACQUIRE_LIMIT_S)
        atexit.register(self.release)

    def acquire_report_right(self) -> bool:
        """Whether this rank may print the error line; blocks for up to 2 ACQUIRE_LIMIT_S.

        True for the first process of a node to call it, and where there is no monitor.
        """
        if self._socket is None:
            return True
        try:
            self._socket.sendall(ACQUIRE)
            if reply := self._socket.recv(1):
                return reply == GRANTED
        except OSError:
            pass
        self._end()  # stopped or dead: it must not hold the lock
        return _lock_report_right() is not None

    def release(self) -> None:
        """End the monitor process without an error line; safe to call twice. Blocks for up to 2 ACQUIRE_LIMIT_S."""
        if self._socket is None:
            return
        with suppress(OSError):
            self._socket.sendall(RELEASE)
            self._socket.recv(1)  # returns when the monitor ends
        self._end()
        self._socket.close()
        self._socket = None

    def _end(self) -> None:
        """Kill the monitor process and wait for its end, for a limited time."""
        end = time.monotonic() + ACQUIRE_LIMIT_S
        with suppress(OSError):
            while self._process and time.monotonic() < end:
                os.kill(self._process, signal.SIGKILL)
                if os.waitpid(self._process, os.WNOHANG)[0]:
                    break
                time.sleep(0.005)
        self._process = 0


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """This process's rank as its launcher numbers it; None if the launcher started one process, or there is none."""
    for size_name, rank_name in LAUNCHERS:
        size, rank = environment.get(size_name, ""), environment.get(rank_name, "")
        if size.isdecimal() and rank.isdecimal():
            return int(rank) if int(size) > 1 else None
    return None


def _watch(socket_to_rank: socket.socket, error: str) -> None:
    """The monitor process: acquire the right for its rank on request; print the error if the rank dies."""
    os.setsid()  # a signal to the rank's process group does not reach its monitor
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    kept = socket_to_rank.fileno()
    for descriptor in (range(STDERR), range(STDERR + 1, kept), range(kept + 1, kept + 1024)):
        os.closerange(descriptor.start, descriptor.stop)
    held = None
    while (word := socket_to_rank.recv(1)) == ACQUIRE:
        held = _lock_report_right() if held is None else held
        socket_to_rank.sendall(b"-" if held is None else GRANTED)
    if word == RELEASE:
        return
    if held is None:
        held = _lock_report_right()
        if held is not None:
            write_error(error)
    os.close(STDERR)
    if held is not None:
        time.sleep(HOLD_S)


def _lock_report_right() -> int | None:
    """The descriptor that holds the right, -1 if no folder can be used; None if another process of the job has it."""
    job = "-".join(os.environ.get(name, "") for name in JOB_NAMES)
    node = os.uname().nodename
    offset = int.from_bytes(hashlib.blake2b(os.fsencode(f"{node} {job}"), digest_size=7).digest())
    for base in (os.environ.get("XDG_RUNTIME_DIR"), *FOLDERS):
        if not base:
            continue
        file = _open_private(os.path.join(base, f"moempi-{os.geteuid()}"))  # noqa: PTH118  # kept free of pathlib
        if file is None:
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
            return file
        except (BlockingIOError, PermissionError):
            os.close(file)
            return None
        except OSError:  # a file system without locks
            os.close(file)
    return -1


def _open_private(folder: str) -> int | None:
    """Open the file of locks in a folder that this user alone can enter, made if absent; None if that fails."""
    entered = None
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102
        entered = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        found = os.fstat(entered)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            return None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open("reports", flags, 0o600, dir_fd=entered)
    except OSError:
        return None
    finally:
        if entered is not None:
            os.close(entered)
