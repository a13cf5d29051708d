"""`moempi bench plan`: forecasts of `moempi plan` and measured times of the same runs, on this machine.

A machine is fitted to a few runs of a random model. Other runs, with other rows, lanes, overlap, emulated links and
layouts, are then predicted and measured. Between nodes, of one rank each, the real links are measured first.
"""

import json
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from moempi.bench.jobs import WEIGHTS, make_job, step_seconds, write_prompts
from moempi.bench.measure import machine as machine_line
from moempi.comm.link_probe import measure_network
from moempi.commands.flags import add_force_flag, count
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.config.topology_file import LEVEL_NAMES, Level, TopologyFile
from moempi.errors import UsageError
from moempi.fitting import fit_costs
from moempi.layout.layout import make_layout
from moempi.layout.topology import virtual
from moempi.observe.console import console, figures_table
from moempi.planning.forecast import PlannedJob, forecast
from moempi.planning.workload import decode
from moempi.runtime.world import World
from moempi.storage.files import atomic, check_output
from moempi.storage.initialize import initialize

MODEL = Architecture(
    family="mission",
    vocab_size=512,
    width=512,
    num_layers=4,
    max_positions=256,
    attention=AttentionShape(num_heads=8, num_kv_heads=8, head_dim=64),
    experts=Experts(num=16, width=256, router=Router(top_k=4, renormalize=True)),
    dense_layers=(0,),
    dense_width=1024,
)
STEPS = 12
FREE = (0.0, 1000.0)
PARAMETERS = ("tflops", "memory_gb_s", "turn_us", "tensor_overhead_us")
"""The fitted keys of a machine file."""
NEGLIGIBLE_S = 1e-9
"""The smallest fitted cost: a machine file holds its reciprocal."""
LEAST_SHARE = 0.05
"""The least share of a calibration run that is not the links'."""


@dataclass(frozen=True, slots=True)
class RunShape:
    """A run: sequences per rank, lanes, overlap, latency (us) and bandwidth (GB/s) of the emulated links, layout.

    Every rank is a node, but the ranks of a tensor group are on one. Links are emulated inside a stage only. With FREE
    links, rows travel as fast as they do.
    """

    sequences: int
    lanes: int = 2
    overlap: bool = True
    link: tuple[float, float] = FREE
    hops: int = 1
    stages: int = 1
    tensor: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches in flight: one for each lane of each stage."""
        return self.lanes * self.stages

    @property
    def layout(self) -> str:
        """The layout in words."""
        parts = (("hops", self.hops), ("stages", self.stages), ("tensor", self.tensor))
        return ", ".join(f"{name} {number}" for name, number in parts if number > 1)


LINKS = (50.0, 0.02), (200.0, 0.1)
CALIBRATION_RUNS = (
    *(RunShape(sequences, overlap=False) for sequences in (2, 4, 16, 32, 64, 128)),
    *(RunShape(sequences, overlap=False, tensor=2) for sequences in (2, 16, 64)),
)
TEST_RUNS = (
    *(
        RunShape(sequences, lanes, overlap, link)
        for sequences, link in ((8, LINKS[0]), (32, LINKS[0]), (32, LINKS[1]), (96, LINKS[0]))
        for lanes, overlap in ((2, False), (2, True), (4, True))
    ),
    *(RunShape(32, 2, overlap, link, hops=2) for link in LINKS for overlap in (False, True)),
    *(RunShape(sequences, stages=2) for sequences in (8, 32, 96)),
    *(RunShape(sequences, tensor=2) for sequences in (8, 32, 96)),
)
"""The runs that are predicted, on 2 ranks and more of one node."""
TEST_RUNS_BETWEEN_NODES = (
    *(RunShape(sequences, lanes, lanes > 1) for sequences in (8, 24, 48, 96) for lanes in (1, 2, 4)),
    *(RunShape(sequences, 2, overlap, hops=2) for sequences in (24, 96) for overlap in (False, True)),
    *(RunShape(sequences, stages=2) for sequences in (8, 24, 48, 96)),
)


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--out", "-o", type=Path, metavar="MACHINE.toml", help="write the machine, for moempi plan")
    add_force_flag(parser)
    parser.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="runs of each kind; the median counts (3)"
    )


def run(world: World, chosen: Namespace) -> None:
    """Fit, predict, measure and print; collective. Raises UsageError on several nodes or an odd number of ranks."""
    world.collectively(lambda: _check_usage(world))
    if chosen.out:
        force = chosen.force
        world.collectively(lambda: check_output(chosen.out, inputs=[], force=force) if not world.rank else None)
    with tempfile.TemporaryDirectory() as own:
        bench = _Bench(world, Path(world.comm.bcast(own)))
        if world.rank == 0:
            initialize(MODEL, bench.folder / WEIGHTS, seed=1)
        world.comm.Barrier()
        between = world.num_nodes > 1
        levels = _levels(measure_network(world.comm)) if between else _levels(FREE)
        calibration_runs = [shape for shape in CALIBRATION_RUNS if not between or shape.tensor == 1]
        calibration = [(shape, bench.seconds(shape, chosen.repeats)) for shape in calibration_runs]
        machine = fit(calibration, world.size, levels)
        table = figures_table(
            *("sequences", "lanes", "overlap", "link us, GB/s", "layout", "forecast ms", "measured ms", "ratio"),
            title=f"A token of all sequences, {world.size} ranks, {MODEL.num_layers} layers of width {MODEL.width}",
            caption=machine_line(world),
        )
        runs = []
        for shape in TEST_RUNS_BETWEEN_NODES if between else TEST_RUNS:
            predicted, measured = predict_s(shape, machine, world.size), bench.seconds(shape, chosen.repeats)
            runs.append((predicted / shape.sequences, measured / shape.sequences))
            network = _linked(machine, shape.link).levels[-1]
            link = f"{network.latency_us:.4g}, {network.bandwidth_gb_s:.4g}"
            figures = (f"{predicted * 1e3:.1f}", f"{measured * 1e3:.1f}", f"{predicted / measured:.2f}")
            overlap = "on" if shape.overlap else "off"
            table.add_row(str(shape.sequences), str(shape.lanes), overlap, link, shape.layout, *figures)
        world.comm.Barrier()
    if world.rank == 0:
        fitted = ", ".join(f"{name} {getattr(machine, name):.3g}" for name in PARAMETERS)
        errors = [abs(predicted / measured - 1) for predicted, measured in runs]
        console().print(
            table,
            f"fitted: {fitted}; {len(runs)} forecasts: median error {statistics.median(errors):.0%}, largest "
            f"{max(errors):.0%}; rank correlation of seconds per token (Kendall's tau) {kendall_tau(runs):.2f}",
        )
        if chosen.out:
            with atomic(chosen.out) as temporary:
                temporary.write_text(_toml(machine), encoding="utf-8")


def _check_usage(world: World) -> None:
    if 1 < world.num_nodes < world.size:
        raise UsageError("bench plan takes one rank of each node, or ranks of one node")
    if world.size % 2:
        raise UsageError("bench plan has runs of 2 stages and of tensor groups of 2; start it on 2, 4, ... ranks")


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """The share of pairs of points that have one order in both coordinates, less the share that have two (tau-a)."""
    points = np.array(pairs)
    signs = np.sign(points[:, None] - points).prod(axis=2)
    return float(signs.sum() / (len(points) * (len(points) - 1)))


def predict_s(shape: RunShape, machine: MachineFile, num_ranks: int) -> float:
    """Predicted seconds in which all sequences get one token."""
    topology = virtual(num_ranks, shape.tensor)
    job = _job(shape, Path())
    layout = make_layout(job, MODEL, topology.nodes)
    planned = PlannedJob(job, MODEL, layout, _linked(machine, shape.link), topology)
    return forecast(planned, decode(STEPS // 2)).seconds(overlap=shape.overlap)


def fit(calibration: Sequence[tuple[RunShape, float]], num_ranks: int, levels: tuple[Level, ...]) -> MachineFile:
    """The machine with links of these levels whose predictions are closest to the seconds of the calibration runs.

    Without overlap, a run takes the seconds of the links plus the sum of four costs: arithmetic, memory traffic
    and the host's overheads. Each cost is at least NEGLIGIBLE_S. Without tensor groups, both overheads are equal.
    """
    number = range(len(PARAMETERS))
    units = [_machine([1.0 if other == index else NEGLIGIBLE_S for other in number]) for index in number]
    amounts = np.array([[predict_s(shape, unit, num_ranks) for unit in units] for shape, _ in calibration])
    free = _machine([NEGLIGIBLE_S] * len(PARAMETERS))
    linked = msgspec.structs.replace(free, levels=levels)
    of_links = [predict_s(shape, linked, num_ranks) - predict_s(shape, free, num_ranks) for shape, _ in calibration]
    seconds = np.array([seconds for _, seconds in calibration])
    # Links that explain more than a run took leave a little of it for the others.
    costs = fit_costs(amounts, np.maximum(seconds - of_links, LEAST_SHARE * seconds))
    found = msgspec.structs.replace(_machine(np.maximum(costs, NEGLIGIBLE_S).tolist()), levels=levels)
    has_tensor_groups = any(shape.tensor > 1 for shape, _ in calibration)
    return found if has_tensor_groups else msgspec.structs.replace(found, tensor_overhead_us=found.turn_us)


@dataclass(frozen=True, slots=True)
class _Bench:
    """Runs jobs in a folder that all ranks can read."""

    world: World
    folder: Path

    def seconds(self, shape: RunShape, repeats: int) -> float:
        """Median seconds in which all sequences get one token, over `repeats` runs; collective."""
        return statistics.median(self._run(shape) for _ in range(repeats))

    def _run(self, shape: RunShape) -> float:
        job, comm = _job(shape, self.folder), self.world.comm
        if self.world.rank == 0:
            numbers = range(shape.sequences * comm.size)
            write_prompts(job.input.prompts, ([number % MODEL.vocab_size] for number in numbers))
            if job.topology.emulate:
                links = TopologyFile(2, _levels(shape.link), nodes=(0,))
                Path(job.topology.emulate).write_bytes(msgspec.json.encode(links))
        seconds, steps = step_seconds(self.world, job)
        return seconds / steps * shape.micro_batches


def _job(shape: RunShape, folder: Path) -> Job:
    return make_job(
        folder,
        origin="bench plan",
        run={
            "backend": "numpy",
            "micro_batches": shape.micro_batches,
            "lanes": shape.lanes,
            "max_sequences": shape.sequences,
            "overlap": shape.overlap,
        },
        sampling={"max_tokens": STEPS, "ignore_eos": True},
        parallel={"stages": shape.stages, "tensor": shape.tensor},
        exchange={"transport": "alltoallv", "hops": shape.hops},
        topology={"ranks_per_node": shape.tensor, "emulate": "" if shape.link == FREE else str(folder / "links.json")},
    )


def _machine(costs: Sequence[float]) -> MachineFile:
    """The machine with these costs: seconds of 10^12 operations, of 10^9 bytes, and of 10^6 of both overheads."""
    operations_s, bytes_s, overheads_s, tensor_overheads_s = costs
    return MachineFile(
        "this machine, as learned from runs",
        1 / operations_s,
        1 / bytes_s,
        _levels(FREE),
        turn_us=overheads_s,
        tensor_overhead_us=tensor_overheads_s,
        reads_ahead=False,
    )


def _linked(machine: MachineFile, link: tuple[float, float]) -> MachineFile:
    """The machine with these links; with its own if they are FREE."""
    return machine if link == FREE else msgspec.structs.replace(machine, levels=_levels(link))


def _levels(link: tuple[float, float]) -> tuple[Level, ...]:
    """The levels of a machine in which only the farthest one has a cost."""
    near = [Level(name, *FREE) for name in LEVEL_NAMES[:-1]]  # type: ignore[arg-type]
    return (*near, Level("network", *link))


def _toml(machine: MachineFile) -> str:
    lines = [f"name = {json.dumps(machine.name)}", *(f"{name} = {getattr(machine, name)!r}" for name in PARAMETERS)]
    lines += ["reads_ahead = false", "preempts_attention = false"]
    for level in machine.levels:
        lines += ["", "[[levels]]", f'name = "{level.name}"', f"latency_us = {level.latency_us!r}"]
        lines.append(f"bandwidth_gb_s = {level.bandwidth_gb_s!r}")
    return "\n".join([*lines, ""])
