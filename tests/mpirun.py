"""Running programs under mpirun with a time limit."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = Path(sys.executable).with_name("mpirun")
LIMIT_S = 300.0  # only what hangs takes longer, also on a busy machine

# The environment of jobs/env.sh for who calls pytest directly: quiet, oversubscribed, one thread a rank, also as root.
# Ranks that wait inside MPI yield: other tests and their ranks use the same cores, of which MPI knows nothing.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PMIX_MCA_plog": "^stdfd",
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `lines` are those of `err` that moempi itself wrote."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("moempi: ")]


def mpirun(num_ranks: int, *command: str | Path, limit_s: float = LIMIT_S, **environment: str) -> Outcome:
    """Run `command` on `num_ranks` ranks and wait; past `limit_s` the whole process group is killed and it fails."""
    return execute(LAUNCHER, "-n", str(num_ranks), *command, limit_s=limit_s, **environment)


def python(*arguments: str | Path) -> tuple[str | Path, ...]:
    """The command that runs this interpreter; `python("-m", "moempi", ...)` is the program."""
    return (sys.executable, *arguments)


def execute(*command: str | Path, limit_s: float = LIMIT_S, **environment: str) -> Outcome:
    """Run one command from the repository's root in a process group of its own."""
    begin = time.monotonic()
    process = start(*command, **environment)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        out, err = end(process)
        raise AssertionError(f"no end within {limit_s} s\n{out}\n{err}") from None
    except KeyboardInterrupt:
        end(process)
        raise
    return Outcome(process.returncode, out, err, time.monotonic() - begin)


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command as `execute` does, without waiting; the caller ends it."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=variables(**environment),
        text=True,
        errors="backslashreplace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def variables(**environment: str) -> dict[str, str]:
    """The environment of a command that `start` starts."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TTY_", "FORCE_COLOR"))}
    # This checkout's program, installed or not.
    paths = (environment.get("PYTHONPATH"), str(ROOT / "app"), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return inherited | ENVIRONMENT | environment


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill what `start` started, mpirun first asked to end its ranks, and return what it wrote."""
    process.terminate()
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()
