"""`moempi launch`: a command on ranks, started with mpirun. Ctrl-C stops a run at a step, Ctrl-C again ends it."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from moempi.commands import run as run_command
from moempi.commands.flags import MAX_RANKS, read_job, whole_number
from moempi.config.job import Job
from moempi.errors import MoempiError, UsageError
from moempi.printing import STDERR, print_error, write_bytes
from moempi.runtime.stop import PASSED_ON
from moempi.runtime.watchdog import SIGNALS, InterruptedByError
from moempi.storage.run_state import record_ending
from moempi.storage.stdin import with_stdin

ON_RANKS = ("run", "check", "bench")
OWN_CODES = (0, *range(64, 79))
"""Exit codes of `moempi` itself; after a signal any other is the launcher's, of ranks that it has killed."""
BANNER = b"-" * 74 + b"\nprterun detected that one or more processes exited with non-zero status,\n"
"""What Open MPI's mpirun writes at its end if the exit code of the ranks is not 0, which they have explained."""
WARNING = b"[warn] Epoll "
"""The begin of lines of libevent: mpirun closed a descriptor of a rank that has ended before it gave up watching it."""
_WARNINGS = re.compile(b"(?<=\n)(?:" + re.escape(WARNING) + b"[^\n]*\n)+")
_UNFINISHED = re.compile(b"(?<=\n)" + re.escape(WARNING) + b"[^\n]*\\Z")
_CHUNK_BYTES = 1 << 16
_HELD_BYTES = 1 << 13
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def add_flags(parser: ArgumentParser) -> None:
    """The number of ranks and the command."""
    ranks = whole_number(1, MAX_RANKS)
    parser.add_argument("-n", dest="ranks", type=ranks, required=True, metavar="RANKS", help="number of ranks")
    parser.add_argument("command", nargs=REMAINDER, metavar="COMMAND", help=f"{', '.join(ON_RANKS)}, and its arguments")


def run(chosen: Namespace) -> int:
    """Run the command on the ranks and return its exit status; blocks until mpirun has ended.

    If a signal ended it, that is 128 + the signal's number, as in a shell, and is in the state of a run.
    """
    if chosen.command[:1] not in [[name] for name in ON_RANKS]:
        raise UsageError(f"launch -n {chosen.ranks} is followed by a command that runs on ranks: {', '.join(ON_RANKS)}")
    job = _job(chosen.command)
    if job:
        with_stdin(job, is_reader=True)  # mpirun does not pass it on whole
    program = [sys.executable, "-P", "-m", "moempi", *chosen.command]
    launcher = _Launcher([_mpirun(), "-n", str(chosen.ranks), *program])
    code = launcher.wait()
    if not launcher.ended_by or code in OWN_CODES:
        return code
    error = InterruptedByError(launcher.ended_by)
    if job is None or record_ending(job.output.results, str(error), exit_code=error.exit_code):
        print_error(str(error))
    return error.exit_code


class _RunParser(ArgumentParser):
    """The arguments of `moempi run`, whose errors the ranks report."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _job(words: Sequence[str]) -> Job | None:
    """The job of `moempi run`; None for another command, and for a job that the ranks will refuse."""
    if words[0] != "run":
        return None
    parser = _RunParser(add_help=False)
    run_command.add_flags(parser)
    try:
        return read_job(parser.parse_args([word for word in words[1:] if word != "--debug"]))
    except MoempiError:
        return None


def _mpirun() -> str:
    """The mpirun beside this Python, else the first of PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise UsageError("there is no mpirun; load the site's MPI, or install one: bash jobs/setup.sh local convert")
    return found


class _Launcher:
    """A running mpirun, which ends with this process; `ended_by` is the last signal that may end it, 0 without one.

    It has a session of its own, so that no key of the terminal reaches it: on Ctrl-C it would kill its ranks.
    """

    def __init__(self, command: list[str]) -> None:
        self.ended_by = 0
        self._interrupts = 0
        on_terminal = sys.stdin is None or sys.stdin.isatty()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if on_terminal else None,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  # this process has one thread
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTSTP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)

    def wait(self) -> int:
        if self._process.stderr is not None:
            copy_without_notices(self._process.stderr.fileno(), STDERR)
        return self._process.wait()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self.ended_by = number if number in SIGNALS else self.ended_by
        if number == signal.SIGINT:
            number = PASSED_ON if self._interrupts == 1 else signal.SIGTERM
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
            if number == signal.SIGTSTP:
                os.kill(os.getpid(), signal.SIGSTOP)
                self._process.send_signal(signal.SIGCONT)


def copy_without_notices(source: int, target: int) -> None:
    """Copy what comes from a descriptor to another at once, except WARNING's lines, and BANNER and what follows.

    Blocks until its end.
    """
    text = b"\n"  # the last byte that is written, or the begin of a line, and what is not written
    while chunk := os.read(source, _CHUNK_BYTES):
        text = _WARNINGS.sub(b"", text + chunk)
        if len(text) > _HELD_BYTES and BANNER in text:
            text = text[: text.index(BANNER) + len(BANNER)]
        elif BANNER not in text:
            passed = len(text) - _begun_bytes(text)
            write_bytes(target, text[1:passed])
            text = text[passed - 1 :]
    write_bytes(target, text.partition(BANNER)[0][1:])


def _begun_bytes(text: bytes) -> int:
    """The bytes at the end of a text, behind its first, that may begin a BANNER or a line of WARNING."""
    if unfinished := _UNFINISHED.search(text):
        return len(unfinished[0]) if len(unfinished[0]) < _HELD_BYTES else 0
    banner = next(length for length in range(len(BANNER), -1, -1) if text[1:].endswith(BANNER[:length]))
    line = text.rpartition(b"\n")[2]
    return max(banner, len(line) * (b"\n" in text and WARNING.startswith(line)))


def _end_with_parent() -> None:
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
