"""A host that is lost during the shipped job: how it is lost and comes back, and what is required of the job."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster import hosts
from cluster.jobs import Job, wait_for
from moempi.storage.convert import convert
from mpirun import ROOT

TIMEOUT_S = 5
RECOVERY_LIMIT_S = 60.0  # 15 s, and what a busy machine adds
LOST = "n3"
NUM_PROMPTS = 96

Repairs = list[Callable[[], object]]
Failure = Callable[[Repairs], None]


def shipped_job(folder: Path) -> dict[str, object]:
    """Settings of the shipped job, slow enough to be disturbed, with its files in a folder."""
    convert(ROOT / "weights/abacus", folder / "weights.h5")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join((ROOT / "jobs/abacus.jsonl").read_text().splitlines(keepends=True)[:NUM_PROMPTS]))
    return {
        "model__weights": folder / "weights.h5",
        "input__prompts": prompts,
        "run__precision": "float32",
        "run__max_sequences": 2,
        "run__timeout_s": TIMEOUT_S,
        "exchange__transport": "pairwise",
    }


def cut(repairs: Repairs) -> None:
    """link cut"""
    repairs.append(lambda: hosts.set_link(LOST, "up"))
    hosts.set_link(LOST, "down")


def kill(repairs: Repairs) -> None:
    """host killed"""
    repairs.append(lambda: hosts.revive(LOST))
    hosts.kill(LOST)


def cut_power(repairs: Repairs) -> None:
    """power of a host cut"""
    repairs.append(lambda: hosts.revive(LOST))
    hosts.cut_power(LOST)


def freeze(repairs: Repairs) -> None:
    """host frozen"""
    repairs.append(lambda: hosts.send_all(LOST, hosts.signal.SIGCONT))
    hosts.send_all(LOST, hosts.signal.SIGSTOP)


def recover(job: Job, failure: Failure, repairs: Repairs, *, launcher: str, **environment: str) -> float:
    """Submit a job and lose a host during it; seconds until the first new token. Waits for the end of the job."""
    job.submit(launcher=launcher, **environment)
    job.wait_for_records()
    failure(repairs)
    begin = time.monotonic()
    wait_for(lambda: f"batch: lost {LOST}" in job.said(), what="the end of the run")
    wait_for(lambda: f"recovered from the loss of {LOST}" in job.said(), what="the first new token")
    recovered_s = time.monotonic() - begin
    hosts.run("scontrol", "update", f"NodeName={LOST}", "State=DOWN", "Reason=lost")  # as Slurm does after a while
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert recovered_s < RECOVERY_LIMIT_S, job.said()
    return recovered_s


def assert_as(job: Job, undisturbed: Job) -> None:
    state = job.state()
    assert state is not None
    assert (state.state, state.finished) == ("finished", NUM_PROMPTS), job.said()
    same = f"{NUM_PROMPTS} requests, 0 differ in tokens; log-probabilities within 0"
    assert job.compare(undisturbed) == same
    assert not Path(f"{job.results}.parts").exists()


def repair_all(repairs: Repairs) -> None:
    """Make the repairs, the last first, and wait until all hosts take steps again."""
    for repair in reversed(repairs):
        repair()
    _wait_until_idle()


def _wait_until_idle() -> None:
    def are_idle() -> bool:
        states = hosts.run("sinfo", "--noheader", "--Node", "--format=%N %T").split()[1::2]
        if any(state.rstrip("*") in ("down", "drained", "draining") for state in states):
            subprocess.run(["scontrol", "update", "NodeName=n[1-4]", "State=RESUME"], capture_output=True, check=False)
        return states == ["idle"] * len(hosts.HOSTS)

    def can_start() -> bool:  # a host counts as idle before its slurmd takes steps again
        step = ["srun", f"--nodes={len(hosts.HOSTS)}", "--mpi=none", "--time=1", "true"]
        return subprocess.run(step, capture_output=True, check=False).returncode == 0

    wait_for(are_idle, what="idle hosts")
    wait_for(can_start, what="a step on all hosts")
