"""Failures of hosts and links during a job: what cannot go on ends soon, what can finishes, and no request is lost."""

import time
from collections.abc import Iterator

import pytest

from cluster import hosts, losses
from cluster.jobs import Job, facts, wait_for
from cluster.losses import LOST, Repairs, assert_as, cut, cut_power, freeze, kill, recover

pytestmark = hosts.MARKS


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, object]:
    return losses.shipped_job(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("undisturbed"), **small)
    job.run()
    return job


@pytest.fixture
def repaired() -> Iterator[Repairs]:
    """Repairs that are made after a test, however it ends; then all hosts are ready again."""
    repairs: Repairs = []
    yield repairs
    losses.repair_all(repairs)


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
def test_a_lost_host_is_named_and_the_job_goes_on_without_it(
    small, undisturbed, tmp_path, repaired, record_property, failure, launcher
):
    record_property("failure", failure.__doc__)
    job = Job(tmp_path / "job", **small)
    recovered_s = recover(job, failure, repaired, launcher=launcher)
    print(f"{failure.__name__} under {launcher}: {recovered_s:.1f} s until the first new token")
    # Of a host that is killed, the launcher knows at once, and kills all ranks before they can say so.
    assert [("ranks 4, 5 on n3 do not answer" in line) for line in job.lines()] == [True] * (failure is not kill)
    assert_as(job, undisturbed)
    assert job.writers == {hosts.HOSTS[0]}  # whose rank 0 it is; ranks that are cut off write none


@pytest.mark.parametrize("launcher", ["srun", long("mpirun")])
def test_a_spare_host_takes_over(small, undisturbed, tmp_path, repaired, launcher, record_property):
    """Of four hosts one is spare: as many ranks run before and after the loss."""
    record_property("failure", "host killed, one spare")
    job = Job(tmp_path / "job", **small)
    recovered_s = recover(job, kill, repaired, launcher=launcher, MOEMPI_SPARE_NODES="1")
    print(f"kill under {launcher}, a spare host: {recovered_s:.1f} s until the first new token")
    assert "going on with 6 ranks" in job.said()
    assert job.numbers_of_ranks == {6}
    assert_as(job, undisturbed)


@pytest.mark.long
def test_a_job_that_needs_all_hosts_goes_on_when_the_lost_one_is_back(
    small, undisturbed, tmp_path, repaired, record_property
):
    """It is requeued. The spool folder of the host that comes back keeps it from taking a step of the same number."""
    record_property("failure", "host killed, none to spare")
    job = Job(tmp_path / "job", **small, parallel__stages=4, parallel__tensor=2)
    job.submit()
    job.wait_for_records()
    kill(repaired)
    wait_for(lambda: "requeueing" in job.said(), what="the requeueing")
    repaired.pop()()

    def runs_again() -> bool:
        found = facts(job.number)
        return (found["Restarts"], found["JobState"]) == ("1", "RUNNING")

    wait_for(runs_again, what="the second start")
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert "batch: start 1 ended with the launcher's code" in job.said()
    state = job.state()
    assert state is not None
    assert (state.state, state.finished) == ("finished", losses.NUM_PROMPTS), job.said()
    assert job.compare(undisturbed, within=1e-4).startswith(f"{losses.NUM_PROMPTS} requests, 0 differ in tokens")


def test_a_link_that_flaps_for_less_than_the_timeout_disturbs_nothing(
    small, undisturbed, tmp_path, repaired, record_property
):
    """TCP doubles the time between its attempts: after an outage, data wait for as long as the outage once more.

    The second outage begins later than that; else the attempts that meet both would be further apart than the timeout.
    """
    record_property("failure", "link flaps")
    repaired.append(lambda: hosts.set_link(LOST, "up"))
    job = Job(tmp_path / "job", **small)
    job.submit()
    job.wait_for_records()
    outage_s = losses.TIMEOUT_S / 4
    for _ in range(2):
        hosts.set_link(LOST, "down")
        time.sleep(outage_s)
        hosts.set_link(LOST, "up")
        time.sleep(2 * outage_s)
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert job.lines() == []
    assert_as(job, undisturbed)


def test_a_slow_link_disturbs_nothing(small, undisturbed, tmp_path, record_property):
    """10 Mbit/s instead of the 1 Gbit/s of the others."""
    record_property("failure", "link 100 times as slow")
    job = Job(tmp_path / "job", **small)
    with hosts.shaped("1gbit", "n1", "n2", "n4"), hosts.shaped("10mbit", LOST):
        job.run()
    assert job.lines() == []
    assert_as(job, undisturbed)


@pytest.mark.parametrize("ahead_s", ["3600", long("-3600")])
def test_a_clock_that_is_an_hour_off_disturbs_nothing(small, undisturbed, tmp_path, ahead_s, record_property):
    record_property("failure", "clock an hour off")
    library = tmp_path / "clock.so"
    hosts.run("gcc", "-shared", "-fPIC", "-O1", hosts.HERE / "clock.c", "-o", library)
    job = Job(tmp_path / "job", **small)
    job.run(LD_PRELOAD=str(library), CLOCK_HOST=LOST, CLOCK_AHEAD_S=ahead_s)
    assert job.lines() == []
    assert_as(job, undisturbed)


def test_a_host_that_cannot_write_on_the_shared_file_system_is_named(
    small, undisturbed, tmp_path, repaired, record_property
):
    record_property("failure", "shared folder read-only")
    hosts.mount_read_only(LOST)
    repaired.append(lambda: hosts.unmount(LOST, hosts.SHARED))
    job = Job(tmp_path / "job", **small)
    job.submit()
    assert job.wait_for_end() == "FAILED", job.said()
    (line,) = job.lines()
    assert "on n3: " in line
    assert "Read-only file system" in line
    repaired.pop()()
    job.run()
    assert_as(job, undisturbed)


@pytest.mark.parametrize(("size", "launcher"), [("8m", "mpirun"), long("1m", "mpirun"), long("8m", "srun")])
def test_a_small_shared_memory_of_one_host_is_got_round(
    small, undisturbed, tmp_path, repaired, size, launcher, record_property
):
    record_property("failure", "small /dev/shm")
    hosts.on(LOST, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm")
    repaired.append(lambda: hosts.unmount(LOST, "/dev/shm"))
    job = Job(tmp_path / "job", **small)
    job.run(launcher=launcher)
    assert_as(job, undisturbed)
