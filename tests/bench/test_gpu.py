"""`moempi bench gpu`: all figures, at small sizes on the SIMT device; without a GPU it is refused."""

import json
from argparse import ArgumentParser
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from bench.gpu_timer import HostTimer
from moempi.backend.cuda.backend import CudaBackend
from moempi.bench import gpu, gpu_timer
from moempi.bench.device_calls import record_calls, replay
from moempi.bench.gpu_clock import EventClock
from moempi.bench.gpu_report import KERNELS, OURS, Case, Figure, measure_case
from moempi.bench.random_values import PAGE_NUMBERS, RandomValues
from moempi.bench.torch_peers import TorchPeers
from moempi.comm.transfers import PendingTransfers
from mpirun import mpirun, python
from simt.device import SimtDevice

SMALL = [
    *("--width", "64", "--expert-width", "32", "--heads", "2", "--head-dim", "16", "--context", "70"),
    *("--experts", "4", "--top-k", "2", "--few", "1", "--many", "16", "--sequences", "2", "--rounds", "1"),
    *("--repeats", "3", "--layer-heads", "2", "--layer-lanes", "1", "2", "--layer-sequences", "2"),
    *("--layer-context", "70", "--layers", "2", "--block-rows", "6"),
]


def make_backend(pending, **options):
    device = SimtDevice(pinned=False, finds_races=False, **options)
    return CudaBackend(device, precision="bfloat16", reproducible=False, progress=pending.progress)


@pytest.fixture
def pending():
    return PendingTransfers()


@pytest.fixture
def backend(pending):
    return make_backend(pending)


def parse(*flags):
    parser = ArgumentParser()
    gpu.add_flags(parser)
    return parser.parse_args([*SMALL, *flags])


def fail():
    raise RuntimeError("out of memory [/limit]\nsecond line")


def figures_of(backend, torch, pending):
    return list(gpu.measure(backend, HostTimer(backend), TorchPeers(torch), pending, MPI.COMM_SELF, parse()))


def test_all_parts_are_measured_without_torch(backend, pending):
    figures = figures_of(backend, None, pending)
    assert [figure.note for figure in figures if "failed" in figure.note] == []
    measured = {figure.part for figure in figures if figure.gpu_us or figure.wall_us}
    small = {"rms_norm", "add", "swiglu", "rotate", "extend_cache", "rotate_into_cache", "choose_experts"}
    assert measured == {
        *("copy", "expert", "pack", "combine", "decode attention", "prefill attention", "preemption"),
        *("layer", "MoE layer"),
        *("group", "group_and_pack"),
        *small,
    }
    layers = [figure for figure in figures if figure.part == "layer" and figure.contestant == OURS]
    assert len(layers) == 4  # decode and prefill, one lane and two
    assert all("launches, the host works" in figure.note for figure in layers)
    assert all(figure.wall_us > 0 for figure in layers)


@pytest.mark.parametrize(("capture", "launches"), [(False, [13, 13]), (True, [10, 14])], ids=["kernels", "graphs"])
def test_whole_layers_may_launch_graphs_in_decode(pending, capture, launches):
    """Of a step's two layers, each launches 3 up to its packed rows, in the place of 6; the step copies its inputs.

    Without graphs the norm of the second layer is computed with the sums of the first.
    """
    device = SimtDevice(pinned=False, finds_races=False)
    backend = CudaBackend(device, precision="bfloat16", reproducible=False, capture=capture, progress=pending.progress)
    chosen = parse("--parts", "layer", "--layer-lanes", "1")
    figures = list(gpu.measure(backend, HostTimer(backend), TorchPeers(None), pending, MPI.COMM_SELF, chosen))
    notes = [figure.note for figure in figures if (figure.part, figure.contestant) == ("layer", OURS)]
    assert [int(note.partition(" launches")[0]) for note in notes] == launches


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch and transformers")
def test_torch_computes_the_same(pending):
    import torch

    backend = make_backend(pending, eager=True)  # torch copies indices at once, which a stream would order
    figures = figures_of(backend, torch, pending)
    notes = {(figure.part, figure.work, figure.contestant): figure.note for figure in figures}
    assert not [key for key, note in notes.items() if "DIFFERENT" in note or "not compared" in note], notes
    compared = {(part, contestant) for (part, _, contestant), note in notes.items() if "same within" in note}
    parts = ("expert", "pack", "combine", "rms_norm", "add", "swiglu")
    assert {(part, "torch") for part in parts} <= compared
    assert {("prefill attention", "torch flash"), ("MoE layer", "transformers grouped_mm")} <= compared
    assert notes["decode attention", "2 sequences of 70, 2 heads", "torch cudnn"].startswith("failed: ")


def test_a_longer_spin_hides_the_submission(backend):
    timer = HostTimer(backend, hidden_after_s=0.02)
    timing = EventClock(timer, rounds=2, most_repeats=3).compare({OURS: lambda: None})[OURS]
    assert not timing.host_bound
    assert timing.repeats == 3  # as many as allowed, because a call takes no time
    assert max(timer.spins) >= 0.02
    never = EventClock(HostTimer(backend, hidden_after_s=9.0), rounds=1, most_repeats=8).compare({OURS: lambda: None})
    assert never[OURS].host_bound
    assert never[OURS].repeats == 1


def test_a_contestant_that_fails_has_its_error_and_the_others_their_times(backend):
    timer = HostTimer(backend)
    bench = SimpleNamespace(backend=backend, clock=EventClock(timer, rounds=1, most_repeats=2), peers=TorchPeers(None))
    case = Case("part", "work", 8.0, "GB/s", {OURS: lambda: None, "torch": fail}, wall_repeats=1)
    ours, theirs = measure_case(bench, "part", lambda: case, copy_rate=2.0)
    assert ours.gpu_us is not None
    assert theirs.note == "failed: RuntimeError: out of memory [/limit]"
    (failed,) = measure_case(bench, "part", fail, copy_rate=None)
    assert (failed.part, failed.note) == ("part", "failed: RuntimeError: out of memory [/limit]")


def test_recorded_calls_compute_the_same_again(backend):
    x = RandomValues(backend.device).rows(3, 8)
    outputs = []
    calls = record_calls(backend, lambda: outputs.append(backend.add(x, x)))
    assert len(calls) == 1
    expected = backend.download(outputs[0]).copy()
    outputs[0][:] = 0
    replay(calls)
    assert (backend.download(outputs[0]) == expected).all()
    assert expected.any()


def test_random_values_fill_an_array_of_any_size(backend):
    values = backend.download(RandomValues(backend.device).rows(2 * PAGE_NUMBERS + 5))
    assert (values[:PAGE_NUMBERS] == values[PAGE_NUMBERS : 2 * PAGE_NUMBERS]).all()
    assert (values[:5] == values[-5:]).all()
    assert len(set(values[:1000].tolist())) > 100


def test_the_command_prints_a_table_and_writes_json(backend, tmp_path, capsys, monkeypatch):
    world = SimpleNamespace(comm=MPI.COMM_SELF, size=1, rank=0, num_nodes=1, collectively=lambda action: action())
    monkeypatch.setattr(gpu, "_backend", lambda *_, **__: backend)
    monkeypatch.setattr(gpu_timer, "CudaTimer", lambda: HostTimer(backend))
    monkeypatch.setattr(gpu, "find_torch", fail)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "figures.json"
    gpu.run(world, parse("--parts", "packing", "small", "--json", str(path)))
    captured = capsys.readouterr()
    assert "torch: failed: RuntimeError: out of memory [/limit]" in captured.err
    assert "pack | 16 rows | moempi | " in captured.err
    assert "its kernels alone" in captured.out
    records = json.loads(path.read_text())
    group = next(entry for entry in records if entry["part"] == "group" and entry["contestant"] == KERNELS)
    assert group["gpu_us"] > 0


@pytest.mark.mpi
def test_without_a_gpu_it_is_a_configuration_error():
    outcome = mpirun(1, *python("-m", "moempi", "bench", "gpu"), CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 78
    assert len(outcome.lines) == 1


@pytest.mark.mpi
def test_check_reports_why_no_gpu_is_used():
    outcome = mpirun(1, *python("-m", "moempi", "check"), CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 0, outcome.err
    assert "no GPU is used" in outcome.out


def test_nvrtc_compiles_the_spin():
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    program = nvrtc.createProgram(gpu_timer.SPIN, "spin.cu", [], [])
    nvrtc.compileProgram(program, ["-std=c++17", "-arch=sm_90"])
    ptx = nvrtc.getPTX(program)
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    assert ptx.count("%clock64") == 2  # read before the loop and in it
    assert "@%p" in ptx


def test_an_error_outside_a_case_leaves_the_figures_so_far(tmp_path, capsys, monkeypatch):
    def measured():
        yield Figure("pack", "16 rows", OURS, note="failed: RuntimeError: [/limit]")
        fail()

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(RuntimeError):
        gpu._measure_and_print(measured(), title="device", caption="machine", path=tmp_path / "figures.json")
    assert "failed: RuntimeError: [/limit]" in capsys.readouterr().out
    records = json.loads((tmp_path / "figures.json").read_text())
    assert [record["part"] for record in records] == ["machine", "pack"]
