"""The state of a run in `<results>.run.json`, for scripts and people, because launchers may change exit codes.

A run is finished as soon as its results file is in place. If the run is killed before it has written that state, a
reader infers it: the results file is then another one than the file that was there when the run began.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec

from moempi.config.input_file import read_input
from moempi.errors import DataError
from moempi.printing import printable
from moempi.storage.files import atomic

MAX_BYTES = 1 << 20

State = Literal["running", "finished", "stopped", "failed"]


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """One state of a run; `finished` counts requests.

    `rank` is the rank that ended the run, `phase` the phase it was in, `reason` the cause. `exit_code` is the program's
    intended exit code, 0 while it runs; 75 means that running the same job again continues it. `replaces` is the
    `results_identity` when the run began, and None if the run was of a version that did not record it.
    """

    state: State
    requests: int
    finished: int = 0
    tokens: int = 0
    reason: str = ""
    rank: int = 0
    phase: str = ""
    exit_code: int = 0
    world_size: int
    started: str
    updated: str
    job: str = printable(os.environ.get("SLURM_JOB_ID", ""))
    replaces: str | None = None


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


def read_state(results_path: str | Path) -> RunState:
    """The state last written, or "finished" if the run's results are in place.

    Raises NoInputError if there is no state, DataError if it is not a valid one.
    """
    path = state_path(results_path)
    content = read_input(path, limit=MAX_BYTES, too_long=DataError)
    try:
        state = msgspec.json.decode(content, type=RunState)
    except (ValueError, RecursionError) as error:  # msgspec's errors, and text that is not UTF-8
        raise DataError(f"{path}: is not the state of a run: {error}") from error
    interrupted = state.state in ("running", "failed") and state.replaces is not None
    if interrupted and is_replaced(results_path, state.replaces or ""):
        return finished(state)
    return state


def finished(state: RunState) -> RunState:
    """The state once the results are in place."""
    return msgspec.structs.replace(
        state, state="finished", finished=state.requests, reason="", phase="", rank=0, exit_code=0
    )
