"""The state of a run in `<results>.run.json`, for scripts and people, because launchers may change exit codes.

A run that is killed cannot write how it ended, so a reader infers it. A run is finished as soon as its results file is
in place, which is then another one than the file that was there when the run began, and its exit code depends on the
errors in them. Otherwise it is dead if the lock
on its output is free. Some file systems have no locks, or none that other nodes see. There a run on the reader's host
is dead if its process is gone, and a run on another host if it has not touched its state file for SILENT_S.
"""

import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from moempi.config.input_file import read_input
from moempi.errors import DataError, MoempiError, NoInputError
from moempi.printing import printable
from moempi.storage.files import atomic
from moempi.storage.lock import is_locked, process_name
from moempi.storage.results import ResultFile

MAX_BYTES = 1 << 20
MAX_PROCESS = 2**31 - 1
TOUCH_EVERY_S = 10.0
"""Seconds after which a live run touches its state file."""
SILENT_S = 300.0
"""Seconds without a touch after which a run without a lock is dead: many touches, because a disk may block one."""
DEATH_LIMIT_S, DEATH_PAUSE_S = 5.0, 0.05
"""Seconds that a launcher's processes may take to end after it, and between looks at them."""

WAIT_S = 0.2
"""Seconds between two looks at the state of a run whose end is waited for."""

State = Literal["running", "finished", "stopped", "failed"]


class Loss(msgspec.Struct, frozen=True):
    """Hosts of which no rank answers any more.

    The run's last progress was at `progress_at`, the loss was noticed at `noticed_at`, in seconds since the epoch.
    """

    hosts: tuple[str, ...]
    progress_at: float
    noticed_at: float


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """One state of a run; `finished` counts requests, `errors` those of them that ended with an error.

    `rank` is the rank that ended the run, `phase` the phase it was in, `reason` the cause. `exit_code` is the program's
    intended exit code, 0 while it runs; 75 means that running the same job again continues it. `host`, `process` and
    `job` name the writer. `replaces` is the `results_identity` when the run began. A version that did not record them
    leaves `host` empty and `replaces` None. `slow_hosts` were found slow, `loss` is the loss of hosts that ended it.
    """

    state: State
    requests: int
    finished: int = 0
    errors: int = 0
    tokens: int = 0
    reason: str = ""
    rank: int = 0
    phase: str = ""
    exit_code: int = 0
    world_size: int
    started: str
    updated: str
    job: str = ""
    host: str = ""
    process: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROCESS)] = 0
    replaces: str | None = None
    max_errors: int | None = None
    slow_hosts: tuple[str, ...] = ()
    loss: Loss | None = None


def state_path(results_path: str | Path) -> Path:
    """The state file of the run that writes `results_path`."""
    return Path(f"{results_path}.run.json")


def results_identity(results_path: str | Path) -> str:
    """Inode and time of change of a results file; "" if there is none."""
    try:
        status = Path(results_path).stat()
    except OSError:
        return ""
    return f"{status.st_ino} {status.st_mtime_ns}"


def is_replaced(results_path: str | Path, identity: str) -> bool:
    """Whether there is a results file other than the one with this `results_identity`."""
    return results_identity(results_path) not in ("", identity)


def write_state(results_path: str | Path, state: RunState) -> None:
    """Replace the state atomically; raises StorageError if writing fails."""
    with atomic(state_path(results_path)) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")


def record_ending(results_path: str | Path, reason: str, *, exit_code: int) -> bool:
    """Write how a run that is killed ended, and return whether it has not done so itself.

    Blocks until its processes end. Raises StorageError if writing fails.
    """
    limit = time.monotonic() + DEATH_LIMIT_S
    try:
        while (found := read_state(results_path)).state == "running" and time.monotonic() < limit:
            time.sleep(DEATH_PAUSE_S)
        written = _read(state_path(results_path))[0]
    except MoempiError:
        return True
    is_killed = written.state == "running" and found.state == "failed"
    if is_killed:
        write_state(results_path, msgspec.structs.replace(found, reason=reason, exit_code=exit_code))
    return is_killed


def touch_state(results_path: str | Path) -> None:
    """Record in the state file's time of change that its run is alive; does nothing if that fails."""
    with suppress(OSError):
        os.utime(state_path(results_path))


def read_state(results_path: str | Path) -> RunState:
    """The state last written; "finished" if the run's results are in place, "failed" if it was killed before.

    Raises NoInputError if there is no state, DataError if it is not a valid one.
    """
    state, touched = _read(state_path(results_path))
    dead = state.state == "running" and _is_dead(results_path, state, touched=touched)
    if dead and _read(state_path(results_path))[0] != state:
        return read_state(results_path)  # it ended by itself, or another one began
    interrupted = state.state in ("running", "failed") and state.replaces is not None
    if interrupted and is_replaced(results_path, state.replaces or ""):
        return finished(state, errors=_count_errors(results_path, otherwise=state.errors))
    return _killed(state, touched=touched) if dead else state


def wait_for_end(results_path: str | Path) -> RunState:
    """The state in which the next run ends, or the present one if it is running now; blocks until it is written.

    Until a state is written for the first time, blocks too. Raises DataError if the state is not a valid one.
    """
    first = None
    with suppress(NoInputError):
        first = read_state(results_path)
    while True:
        with suppress(NoInputError):
            state = read_state(results_path)
            if state.state != "running" and state != first:
                return state
        time.sleep(WAIT_S)


def finished(state: RunState, *, errors: int) -> RunState:
    """The state once the results are in place, in which `errors` requests ended with an error.

    The exit code is 65 if all did, or more than `max_errors`.
    """
    limit = state.requests - 1 if state.max_errors is None else min(state.max_errors, state.requests - 1)
    return msgspec.structs.replace(
        state,
        state="finished",
        finished=state.requests,
        errors=errors,
        reason="",
        phase="",
        rank=0,
        exit_code=DataError.exit_code if errors > limit else 0,
    )


def _count_errors(results_path: str | Path, *, otherwise: int) -> int:
    """The errors in the results; `otherwise` if they cannot be read."""
    try:
        with ResultFile(results_path) as results:
            return results.num_errors()
    except MoempiError:
        return otherwise


def _killed(state: RunState, *, touched: float) -> RunState:
    name = process_name(state.process, state.host, state.job)
    at = datetime.fromtimestamp(touched, UTC).isoformat(timespec="seconds")
    return msgspec.structs.replace(
        state, state="failed", reason=f"killed: {name} was last alive at {at}", exit_code=os.EX_TEMPFAIL
    )


def _read(path: Path) -> tuple[RunState, float]:
    """The state last written, and when its file was last touched, in seconds since the epoch."""
    content = read_input(path, limit=MAX_BYTES, too_long=DataError)
    try:
        return msgspec.json.decode(content, type=RunState), path.stat().st_mtime
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # msgspec's errors, and text that is not UTF-8
        raise DataError(f"{path}: is not the state of a run: {error}") from error


def _is_dead(results_path: str | Path, state: RunState, *, touched: float) -> bool:
    """Whether the run that wrote "running" has been killed; False if its version did not record its host."""
    locked = is_locked(results_path)
    if locked or not state.host:
        return False
    if state.host == printable(os.uname().nodename) and (locked is not None or not _exists(state.process)):
        return True
    return time.time() - touched > SILENT_S


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return True
