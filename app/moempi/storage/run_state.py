"""The state of a run in `<results>.run.json`, for scripts and people, because launchers may change exit codes."""

import os
from pathlib import Path
from typing import Literal

import msgspec

from moempi.errors import DataError, NoInputError
from moempi.storage.files import atomic

State = Literal["running", "finished", "stopped", "failed"]


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """One state of a run; `finished` counts requests.

    `rank` is the rank that ended the run, `phase` the phase it was in, `reason` the cause. `exit_code` is the program's
    intended exit code, 0 while it runs; 75 means that running the same job again continues it.
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
    job: str = os.environ.get("SLURM_JOB_ID", "")


def state_path(results_path: str | Path) -> Path:
    """The state file of the run that writes `results_path`."""
    return Path(f"{results_path}.run.json")


def write_state(results_path: str | Path, state: RunState) -> None:
    """Replace the state atomically; raises StorageError if writing fails."""
    with atomic(state_path(results_path)) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")


def read_state(results_path: str | Path) -> RunState:
    """The state last written; raises NoInputError if there is none, DataError if it is not a valid state."""
    path = state_path(results_path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: is not the state of a run: {error}") from error
