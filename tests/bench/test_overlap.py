"""`moempi bench overlap` on a device with queues: one rank, whose rows take the time of an emulated link."""

import json
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from bench.gpu_timer import HostTimer
from moempi.backend.cuda.backend import CudaBackend
from moempi.bench import overlap
from moempi.bench.random_layer import Sizes
from moempi.bench.timeline import Timeline
from moempi.comm.transfers import PendingTransfers
from mpirun import ROOT, python
from simt.device import SimtDevice

WORLD = SimpleNamespace(comm=MPI.COMM_SELF, size=1, rank=0, num_nodes=1)
TINY = ("--width", "32", "--expert-width", "16", "--experts", "4", "--top-k", "2", "--tokens", "6", "--layers", "2")


@pytest.mark.parametrize("num_lanes", [2, 4])
def test_lanes_on_a_device_are_measured_on_one_rank(num_lanes, capsys):
    parser = ArgumentParser()
    overlap.add_flags(parser)
    chosen = parser.parse_args([*TINY, "--passes", "1", "--link", "0.5", "0.9", "--lanes", str(num_lanes)])
    backend, pending = (
        CudaBackend(SimtDevice(pinned=False), precision="bfloat16", reproducible=False),
        PendingTransfers(),
    )
    stack = overlap.make_stack(backend, pending, Sizes.of(chosen), hosted=(0, 1, 2, 3), timer=HostTimer(backend))
    records = list(overlap.measure(WORLD, stack, chosen, num_lanes=num_lanes))
    assert [record["link"] for record in records] == [0.5, 0.9]
    for record in records:
        assert record["same_bits"]
        assert record["lanes"] == num_lanes
        assert record["link_ms"] == pytest.approx(record["link"] * records[0]["link_ms"] / 0.5)
        assert record["compute_ms"] > 0
        assert record["blocking_ms"] > record["link_ms"]  # no row arrives before the link has carried it
        assert record["overlapped_ms"] > record["link_ms"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lane ")]
    assert len(lines) == 2 * 2 * num_lanes
    assert all("█" in line for line in lines[::2])
    assert all("─" in line for line in lines[1::2])


def test_the_hidden_share_is_the_time_on_the_link_in_which_any_lane_computes():
    timeline = Timeline(2)
    assert timeline.hidden() == 0.0
    timeline.add_transfer(0, 0.0, 4.0)
    timeline.add_transfer(1, 3.0, 8.0)
    timeline.add_computing(0, 5.0, 7.0)
    timeline.add_computing(1, 6.0, 10.0)
    assert timeline.hidden() == pytest.approx(3 / 8)


SCRIPT = """
import sys
from bench.gpu_timer import HostTimer
from moempi.backend.cuda.backend import CudaBackend
from moempi.bench import gpu_timer, overlap
from moempi.cli import main
from simt.device import SimtDevice

def make_backend(run, *, local_rank, device_buffers, progress):
    device = SimtDevice(pinned=not device_buffers)
    backend = CudaBackend(device, precision=run.precision, reproducible=run.reproducible, progress=progress)
    gpu_timer.CudaTimer = lambda: HostTimer(backend)
    return backend

overlap.make_backend = make_backend
sys.exit(main())
"""


@pytest.mark.parametrize(("num_ranks", "transport"), [(1, "alltoallv"), (2, "alltoallv"), (2, "shared")])
def test_the_command_runs_on_a_device(mpirun, tmp_path, num_ranks, transport):
    flags = ("--backend", "cupy", "--passes", "1", "--transport", transport, "--json", str(tmp_path / "figures.json"))
    command = python("-c", SCRIPT, "bench", "overlap", *TINY, *flags)
    outcome = mpirun(num_ranks, *command, COLUMNS="200", PYTHONPATH=str(ROOT / "tests"))
    assert outcome.code == 0, outcome.err
    (record,) = json.loads((tmp_path / "figures.json").read_text())
    assert (record["ranks"], record["backend"], record["same_bits"]) == (num_ranks, "cupy", True)


def test_whole_runs_of_a_layout_are_measured(mpirun, tmp_path):
    layout = ("--stages", "2", "--hops", "2", "--tensor", "2", "--ranks-per-node", "2", "--layers", "1", "--steps", "2")
    flags = (
        "--width",
        "128",
        "--experts",
        "4",
        "--passes",
        "1",
        "--link",
        "0.5",
        "--json",
        str(tmp_path / "figures.json"),
    )
    outcome = mpirun(8, *python("-m", "moempi", "bench", "overlap", *TINY, *layout, *flags), COLUMNS="200")
    assert outcome.code == 0, outcome.err
    (record,) = json.loads((tmp_path / "figures.json").read_text())
    assert {name: record[name] for name in ("ranks", "stages", "hops", "tensor", "ranks_per_node", "lanes")} == {
        "ranks": 8,
        "stages": 2,
        "hops": 2,
        "tensor": 2,
        "ranks_per_node": 2,
        "lanes": 2,
    }
    assert record["overlapped_ms"] > record["link_ms"] > 0  # no row arrives before the link has carried it


def test_whole_runs_are_measured_with_numpy_only(mpirun):
    outcome = mpirun(1, *python("-m", "moempi", "bench", "overlap", "--backend", "cupy", "--hops", "2"))
    assert outcome.lines == [
        "moempi: bench overlap measures whole runs with NumPy only; leave out --backend, or the layout"
    ]
    assert outcome.code == 64
