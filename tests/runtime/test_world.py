"""The ranks and how they end together: every ending on one rank of three or six, under a real mpirun."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

import mpirun as launching
from moempi.runtime.launcher import launch_problem, launched_first

ENDINGS = Path(__file__).with_name("endings.py")
END_S = 60.0


def ended(ending: str, folder: Path, *, rank: int = 1, num_ranks: int = 3) -> launching.Outcome:
    """Run an ending of one rank and check that nothing of it is left."""
    outcome = launching.mpirun(num_ranks, *launching.python(ENDINGS, ending, folder, str(rank)))
    wait_for_end(folder, num_ranks=num_ranks)
    return outcome


def wait_for_end(folder: Path, *, num_ranks: int = 3) -> None:
    """Until no rank runs; a zombie counts as ended."""
    limit = time.monotonic() + END_S
    pids = [int(place.read_text()) for place in folder.glob("*.pid")]
    assert len(pids) == num_ranks
    while alive := [pid for pid in pids if state(pid) not in "ZX"]:
        assert time.monotonic() < limit, f"ranks still run: {alive}"
        time.sleep(0.05)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        ("exception", 70, "moempi: rank 1: ValueError: a bad value"),
        ("moempi-error", 65, "moempi: rank 1: line 3: no prompt"),
        ("memory", 70, "moempi: rank 1: out of memory"),
        ("keyboard", 130, "moempi: rank 1: interrupted"),
        ("exit-0", 70, "moempi: rank 1: left with exit status 0 in the middle of the run"),
        ("exit-3", 3, "moempi: rank 1: left with exit status 3 in the middle of the run"),
        ("disagree", 78, "moempi: rank 1: no room"),
    ],
)
def test_one_rank_ends_all_with_one_line(ending, code, line, tmp_path):
    outcome = ended(ending, tmp_path)
    assert outcome.lines == [line]
    assert outcome.code == code
    assert "Traceback" not in outcome.err


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("stop", "rank 1 does not answer, rank 0 waits at step 7"),
        ("late", "rank 1 is late, at step 7 (in endings.py:"),
        ("early", "all ranks wait, rank 0 at step 7"),
    ],
)
def test_watchdog_ends_ranks_that_wait_inside_mpi(ending, reason, tmp_path):
    outcome = ended(ending, tmp_path)
    assert len(outcome.lines) == 1
    assert f"no progress for 4 s: {reason}" in outcome.lines[0]
    assert "at step 7" in outcome.lines[0]
    assert outcome.code == 75


@pytest.mark.mpi
@pytest.mark.parametrize(("num_ranks", "rank", "reporting"), [(3, 1, 0), (6, 3, 1), (6, 0, 4)])
def test_a_killed_rank_ends_all(num_ranks, rank, reporting, tmp_path):
    """The lowest rank that watches it reports it; among six, three do not watch it."""
    outcome = ended("kill", tmp_path, rank=rank, num_ranks=num_ranks)
    assert outcome.code != 0
    process = (tmp_path / f"{rank}.pid").read_text()
    line = f"moempi: rank {reporting}: rank {rank} is gone: its process {process} was killed or crashed"
    assert outcome.lines == [line]


@pytest.mark.mpi
@pytest.mark.parametrize(("rank", "deciding"), [(3, 0), (0, 1)])
def test_a_stopped_rank_of_six_ends_all(rank, deciding, tmp_path):
    outcome = ended("stop", tmp_path, rank=rank, num_ranks=6)
    reason = f"rank {rank} does not answer, rank {deciding} waits at step 7"
    assert outcome.lines == [f"moempi: rank {deciding}: no progress for 4 s: {reason}; see run.timeout_s"]
    assert outcome.code == 75


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_while_ranks_wait_for_others_at_the_start_is_named(rank, tmp_path):
    outcome = ended("interrupt", tmp_path, rank=rank)
    assert outcome.lines == [f"moempi: rank {rank}: interrupted"]
    assert outcome.code == 130


@pytest.mark.mpi
@pytest.mark.parametrize("ending", ["good", "busy"])
def test_a_good_run_is_silent(ending, tmp_path):
    outcome = ended(ending, tmp_path)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.mpi
def test_work_that_is_done_before_an_abort_ends_with_its_own_code(tmp_path):
    assert ended("finish", tmp_path).code == 65


@pytest.mark.mpi
def test_debug_prints_the_traceback(tmp_path):
    outcome = ended("debug", tmp_path)
    assert "Traceback" in outcome.err
    assert outcome.code == 70


@pytest.mark.mpi
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGHUP)])
def test_a_signal_ends_all_ranks_with_one_line(rank, number, tmp_path):
    process = launching.start("mpirun", "-n", "3", *launching.python(ENDINGS, "waiting", tmp_path, "1"))
    wait_for(tmp_path)
    os.kill(int((tmp_path / f"{rank}.pid").read_text()), number)
    _, err = process.communicate(timeout=END_S)
    assert [line for line in err.splitlines() if line.startswith("moempi: ")] == [
        f"moempi: rank {rank}: ended by {number.name}"
    ]
    assert process.returncode == 128 + number
    wait_for_end(tmp_path)


@pytest.mark.mpi
def test_a_hangup_does_not_end_a_run_that_ignores_it(tmp_path):
    command = launching.python(ENDINGS, "waiting", tmp_path, "1")
    process = launching.start("bash", "-c", f"trap '' HUP; exec {shlex.join(map(str, command))}")
    try:
        wait_for(tmp_path, num_ranks=1)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1.0)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_S)
        assert process.returncode == 143
    finally:
        launching.end(process)


@pytest.mark.mpi
def test_an_interrupted_launcher_leaves_no_rank(tmp_path):
    process = launching.start("mpirun", "-n", "3", *launching.python(ENDINGS, "waiting", tmp_path, "1"))
    wait_for(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=END_S)
    assert process.returncode != 0
    wait_for_end(tmp_path)


def wait_for(folder: Path, *, num_ranks: int = 3) -> None:
    """Until all ranks are inside their guard."""
    limit = time.monotonic() + END_S
    while len(list(folder.glob("*.ready"))) < num_ranks:
        assert time.monotonic() < limit, "the ranks do not start"
        time.sleep(0.05)


@pytest.mark.mpi
def test_a_launch_of_another_mpi_is_refused():
    # The variables that a launcher of another MPI sets; MPI itself connects each process only to itself.
    outcome = launching.execute(*launching.python("-m", "moempi", "check"), PMI_SIZE="4", PMI_RANK="0")
    assert outcome.code == 64
    assert len(outcome.lines) == 1
    assert "launched as 4 processes (PMI_SIZE) but MPI connects 1" in outcome.lines[0]
    silent = launching.execute(*launching.python("-m", "moempi", "check"), PMI_SIZE="4", PMI_RANK="2")
    assert (silent.code, silent.lines) == (64, [])


@pytest.mark.ranks(1, 3)
def test_nodes_and_local_rank(comm, num_ranks):
    from moempi.runtime.world import World

    world = World(comm)
    assert (world.rank, world.size) == (comm.rank, num_ranks)
    assert world.nodes == (0,) * num_ranks
    assert world.num_nodes == 1
    assert world.local_rank == comm.rank
    assert world.split_matches_nodes()


@pytest.mark.ranks(3)
def test_node_names_of_slurm_come_first(comm, monkeypatch):
    from moempi.runtime.world import World

    monkeypatch.setenv("SLURMD_NODENAME", "b" if comm.rank == 1 else "a")
    world = World(comm)
    assert world.nodes == (0, 1, 0)
    assert world.local_rank == (0, 0, 1)[comm.rank]
    assert not world.split_matches_nodes()


@pytest.mark.ranks(2)
def test_ranks_that_do_not_hang_are_asked_again_when_they_would(comm):
    from moempi.runtime.world import World

    world, timeout_s = World(comm), 60.0
    if comm.rank == 0:
        assert 0 < world._on_hang(timeout_s) <= timeout_s * 10  # before the first step
    wait_in_reply(world)
    if comm.rank == 1:
        assert world._on_hang(timeout_s) == timeout_s  # rank 0 decides
    wait_in_reply(world)


def wait_in_reply(world):
    """Until all ranks are here, reply as a watchdog does; collective."""
    here = world.comm.Ibarrier()
    while not here.Test():
        world._reply()
        time.sleep(0.01)


@pytest.mark.ranks(1, 3)
def test_collectively_returns_each_ranks_value_or_ends_all_alike(comm, capfd):
    from moempi.errors import DataError
    from moempi.runtime.world import AgreedExit, World

    world = World(comm)
    assert world.collectively(lambda: comm.rank) == comm.rank

    def fail_on_the_last():
        if comm.rank == comm.size - 1:
            raise DataError("torn")

    with pytest.raises(AgreedExit) as ending:
        world.collectively(fail_on_the_last)
    assert ending.value.code == 65
    assert ("torn" in capfd.readouterr().err) == (comm.rank == comm.size - 1)


def test_launch_problem_takes_the_nearest_launcher():
    assert launch_problem({}, 1) is None
    assert launch_problem({"OMPI_COMM_WORLD_SIZE": "4"}, 4) is None
    assert launch_problem({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4"}, 2) is None
    assert "SLURM_STEP_NUM_TASKS" in (launch_problem({"SLURM_STEP_NUM_TASKS": "4"}, 1) or "")
    # In a batch script, outside srun, a single process is in order.
    assert launch_problem({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1) is None


def test_launched_first():
    assert launched_first({})
    assert launched_first({"PMI_SIZE": "2", "PMI_RANK": "0"})
    assert not launched_first({"PMI_SIZE": "2", "PMI_RANK": "1"})
