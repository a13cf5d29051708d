"""Failures of hosts and links during a job: what cannot go on ends soon, what can finishes, and no request is lost."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import hosts
from cluster.jobs import Job, wait_for
from moempi.storage.convert import convert
from mpirun import ROOT

pytestmark = hosts.MARKS

TIMEOUT_S = 5
END_S = TIMEOUT_S + 10
LIMIT_S = 20  # until the first new token: 10 to 14.5 s on a machine that does nothing else
LOST = "n3"
NUM_PROMPTS = 96


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, object]:
    """Settings of the shipped job, slow enough to be disturbed."""
    folder: Path = tmp_path_factory.mktemp("small")
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


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("undisturbed"), **small)
    job.run()
    return job


@pytest.fixture
def repaired() -> Iterator[list[Callable[[], object]]]:
    """Repairs that are made after a test, however it ends; then all hosts are ready again."""
    repairs: list[Callable[[], object]] = []
    yield repairs
    for repair in reversed(repairs):
        repair()
    wait_until_idle()


def wait_until_idle() -> None:
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


def assert_as(job: Job, undisturbed: Job) -> None:
    state = job.state()
    assert state is not None
    assert (state.state, state.finished) == ("finished", NUM_PROMPTS), job.said()
    same = f"{NUM_PROMPTS} requests, 0 differ in tokens; log-probabilities within 0"
    assert job.compare(undisturbed) == same
    assert not Path(f"{job.results}.parts").exists()


def cut(repairs: list[Callable[[], object]]) -> None:
    repairs.append(lambda: hosts.set_link(LOST, "up"))
    hosts.set_link(LOST, "down")


def kill(repairs: list[Callable[[], object]]) -> None:
    repairs.append(lambda: hosts.revive(LOST))
    hosts.kill(LOST)


def cut_power(repairs: list[Callable[[], object]]) -> None:
    repairs.append(lambda: hosts.revive(LOST))
    hosts.cut_power(LOST)


def freeze(repairs: list[Callable[[], object]]) -> None:
    repairs.append(lambda: hosts.send_all(LOST, hosts.signal.SIGCONT))
    hosts.send_all(LOST, hosts.signal.SIGSTOP)


def long(*values: object) -> object:
    """Values of a test that the short form of the campaign leaves out."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("failure", "launcher"),
    [
        (cut, "mpirun"),
        (kill, "srun"),
        (freeze, "srun"),
        long(cut, "srun"),
        long(kill, "mpirun"),
        long(cut_power, "srun"),
        long(cut_power, "mpirun"),
        long(freeze, "mpirun"),
    ],
)
def test_a_lost_host_is_named_and_the_job_goes_on_without_it(small, undisturbed, tmp_path, repaired, failure, launcher):
    job = Job(tmp_path / "job", **small)
    job.submit(launcher=launcher)
    job.wait_for_records()
    failure(repaired)
    begin = time.monotonic()
    wait_for(lambda: "batch: lost n3" in job.said(), limit_s=END_S, what="the end of the run")
    wait_for(lambda: "recovered from the loss of n3" in job.said(), what="the first new token")
    recovered_s = time.monotonic() - begin
    print(f"{failure.__name__} under {launcher}: {recovered_s:.1f} s until the first new token")
    hosts.run("scontrol", "update", f"NodeName={LOST}", "State=DOWN", "Reason=lost")  # as Slurm does after a while
    assert job.wait_for_end() == "COMPLETED", job.said()
    # Of a host that is killed, the launcher knows at once, and kills all ranks before they can say so.
    assert [("ranks 4, 5 on n3 do not answer" in line) for line in job.lines()] == [True] * (failure is not kill)
    assert_as(job, undisturbed)
    assert job.writers == {hosts.HOSTS[0]}  # whose rank 0 it is; ranks that are cut off write none
    assert recovered_s < LIMIT_S


def test_a_link_that_flaps_for_less_than_the_timeout_disturbs_nothing(small, undisturbed, tmp_path, repaired):
    repaired.append(lambda: hosts.set_link(LOST, "up"))
    job = Job(tmp_path / "job", **small)
    job.submit()
    job.wait_for_records()
    for _ in range(2):
        hosts.set_link(LOST, "down")
        time.sleep(1.5)
        hosts.set_link(LOST, "up")
        time.sleep(1.5)
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert job.lines() == []
    assert_as(job, undisturbed)


def test_a_slow_link_disturbs_nothing(small, undisturbed, tmp_path):
    """10 Mbit/s instead of the 1 Gbit/s of the others."""
    job = Job(tmp_path / "job", **small)
    with hosts.shaped("1gbit", "n1", "n2", "n4"), hosts.shaped("10mbit", LOST):
        job.run()
    assert job.lines() == []
    assert_as(job, undisturbed)


@pytest.mark.parametrize("ahead_s", ["3600", long("-3600")])
def test_a_clock_that_is_an_hour_off_disturbs_nothing(small, undisturbed, tmp_path, ahead_s):
    library = tmp_path / "clock.so"
    hosts.run("gcc", "-shared", "-fPIC", "-O1", hosts.HERE / "clock.c", "-o", library)
    job = Job(tmp_path / "job", **small)
    job.run(LD_PRELOAD=str(library), CLOCK_HOST=LOST, CLOCK_AHEAD_S=ahead_s)
    assert job.lines() == []
    assert_as(job, undisturbed)


def test_a_host_that_cannot_write_on_the_shared_file_system_is_named(small, undisturbed, tmp_path, repaired):
    hosts.mount_read_only(LOST)
    repaired.append(lambda: hosts.unmount(LOST, hosts.SHARED))
    job = Job(tmp_path / "job", **small)
    job.submit()
    begin = time.monotonic()
    assert job.wait_for_end() == "FAILED", job.said()
    assert time.monotonic() - begin < END_S
    (line,) = job.lines()
    assert "on n3: " in line
    assert "Read-only file system" in line
    repaired.pop()()
    job.run()
    assert_as(job, undisturbed)


@pytest.mark.parametrize(("size", "launcher"), [("8m", "mpirun"), long("1m", "mpirun"), long("8m", "srun")])
def test_a_small_shared_memory_of_one_host_is_got_round(small, undisturbed, tmp_path, repaired, size, launcher):
    hosts.on(LOST, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm")
    repaired.append(lambda: hosts.unmount(LOST, "/dev/shm"))
    job = Job(tmp_path / "job", **small)
    job.run(launcher=launcher)
    assert_as(job, undisturbed)
