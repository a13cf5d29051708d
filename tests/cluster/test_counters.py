"""The bytes that the program counts between hosts are those that the kernel counts on their links.

The wire carries more than the rows: headers of Ethernet, IP and TCP, acknowledgements, how many rows follow, batches,
sampled tokens, and the start of the ranks.
"""

import h5py
import pytest

from cluster import hosts
from cluster.jobs import Job

pytestmark = hosts.MARKS

LAYOUTS = {
    "one hop": {},
    "two hops": {"exchange__hops": 2},
    "stages": {"parallel__stages": 2},
    "stages and immediate routing": {"parallel__stages": 2, "exchange__immediate": "true"},
    "tensor groups": {"parallel__tensor": 2},
}


def counted_bytes(job: Job) -> int:
    """Bytes of rows that the ranks sent over the network."""
    with h5py.File(job.results) as file:
        kinds = ("", "stage_", "tensor_")
        return sum(int(file[f"network/{kind}network_bytes"][...].sum()) for kind in kinds)


def run_and_count(job: Job, **environment: str) -> float:
    """Run a job; the share of the bytes on the links that it counts as rows."""
    before = hosts.sent_bytes()
    job.run(**environment)
    return counted_bytes(job) / (hosts.sent_bytes() - before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counted_bytes_are_those_on_the_links(net, tmp_path, layout):
    share = run_and_count(Job(tmp_path / "job", **net, **LAYOUTS[layout]))
    print(f"counted / sent: {share:.4f}")
    assert 0.95 <= share <= 1.0


def test_mpirun_sends_the_same_bytes(net, tmp_path):
    share = run_and_count(Job(tmp_path / "job", **net), launcher="mpirun")
    print(f"counted / sent: {share:.4f}")
    assert 0.95 <= share <= 1.0


def test_counted_bytes_follow_a_placement(net, tmp_path):
    recorded = Job(tmp_path / "recorded", **net, trace__routing="true")
    recorded.run()
    placement = tmp_path / "placement.json"
    hosts.run("moempi", "place", recorded.results, "--replicas", "0.25", "-o", placement)
    placed = Job(tmp_path / "placed", **net, placement__file=placement)
    share = run_and_count(placed)
    print(f"counted / sent: {share:.4f}")
    assert 0.95 <= share <= 1.0
    assert counted_bytes(placed) < counted_bytes(recorded)
    assert placed.compare(recorded).startswith("32 requests, 0 differ in tokens")
