"""A host that is slow is named while the job runs: by a line, by `moempi state`, and by the report."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import hosts
from cluster.jobs import Job, wait_for

pytestmark = hosts.MARKS

SLOW = "n3"
GROUP = Path("/sys/fs/cgroup/cpu/moempi-cluster")  # down.sh removes it
PERIOD_US, QUOTA_US = 100_000, 8_000  # less than the share of a host on a busy machine


@pytest.fixture
def limit() -> Iterator[Callable[[], None]]:
    """Gives all processes of a host together a twelfth of a core."""
    if not (GROUP.parent / "cpu.cfs_quota_us").exists():
        pytest.skip("no control groups of version 1 for processors")
    GROUP.mkdir()
    (GROUP / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (GROUP / "cpu.cfs_quota_us").write_text(str(QUOTA_US))

    def is_removed() -> bool:
        move(map(int, (GROUP / "cgroup.procs").read_text().split()), GROUP.parent)
        with suppress(OSError):  # a process was started in it, or has not ended yet
            GROUP.rmdir()
        return not GROUP.exists()

    yield lambda: move(hosts.processes(SLOW), GROUP)
    wait_for(is_removed, what="the end of the control group")


def move(processes: Iterable[int], group: Path) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it has ended
            (group / "cgroup.procs").write_text(str(process))


def test_a_slow_host_is_named_while_the_job_runs(net, tmp_path, limit, record_property):
    record_property("failure", "host slow")
    job = Job(tmp_path / "job", **net | {"sampling__max_tokens": 400, "run__timeout_s": 60})
    job.submit()
    wait_for(lambda: " running, " in job.said(), what="the first steps")
    limit()
    wait_for(lambda: f"{SLOW} is slow" in job.said(), what="a line about the slow host")
    wait_for(lambda: (state := job.state()) is not None and SLOW in state.slow_hosts, what="the state")
    hosts.run("scancel", "--batch", "--signal=USR1", job.number)
    wait_for(lambda: "stopped early" in job.said(), what="the end of the run")
    hosts.run("scancel", job.number)
    job.wait_for_end()
    assert job.said().count(f"{SLOW} is slow") == 1
