"""`moempi bench overlap --stages, --hops, --tensor`: the communication that whole runs hide in a layout of ranks.

A random model prefills prompts of one step each. Its links are emulated: every rank, or every `--ranks-per-node`, is a
node. The run without links gives the compute time. Then a rank's link gets the bandwidth at which the bytes of its rows
take their share of the compute time.
"""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.table import Table

from moempi.bench.jobs import WEIGHTS, make_job, step_seconds, write_prompts
from moempi.bench.measure import machine, ratio
from moempi.commands.flags import count
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.topology_file import LEVEL_NAMES, Level, TopologyFile
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World
from moempi.storage.initialize import initialize
from moempi.storage.results import ResultFile

HEAD_DIM = 64
VOCABULARY = 64
LATENCY_US = 20.0
FREE = Level("network", 0.0, 1e6)
COMPUTING, BLOCKING, OVERLAPPED = "computing", "blocking", "overlapped"
LAYOUT_FLAGS = ("stages", "hops", "tensor", "ranks_per_node")


def add_layout_flags(parser: ArgumentParser) -> None:
    """The flags of the layout; any of them measures whole runs."""
    add = parser.add_argument
    add("--stages", type=count, metavar="N", help="whole runs with this many stages of --layers layers each (1)")
    add("--hops", type=int, choices=(1, 2), help="whole runs with an exchange of one or two hops (1)")
    add("--tensor", type=count, metavar="N", help="whole runs with tensor groups of this size (1)")
    add("--ranks-per-node", type=count, metavar="N", help="whole runs with virtual nodes of this many ranks (1)")
    add("--steps", type=count, default=24, metavar="N", help="whole runs: steps of each lane and stage (24)")


def has_layout(chosen: Namespace) -> bool:
    """Whether a flag of the layout is given."""
    return any(getattr(chosen, name) is not None for name in LAYOUT_FLAGS)


def measure_layout(world: World, chosen: Namespace) -> Iterator[Mapping[str, Any]]:
    """Measure and print each number of lanes and share of the link, and yield its figures; collective.

    Raises RuntimeError if overlap changes a result, and the MoempiErrors of a job whose layout does not fit.
    """
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.comm.bcast(own))
        for num_lanes in chosen.lanes:
            rehearsal = _Rehearsal(world, folder, chosen, num_lanes)
            rehearsal.prepare()
            for share in chosen.link:
                yield rehearsal.measure(share)
        world.comm.Barrier()  # other ranks read the folder of rank 0


@dataclass(frozen=True, slots=True)
class _Rehearsal:
    """Runs of one layout with `num_lanes` lanes in each stage; methods are collective."""

    world: World
    folder: Path
    chosen: Namespace
    num_lanes: int

    def prepare(self) -> None:
        """Write the weights and the prompts."""
        stages, tensor = self.chosen.stages or 1, self.chosen.tensor or 1
        if self.world.rank == 0:
            initialize(_model(self.chosen), self.folder / WEIGHTS, seed=1)
            num_prompts = self.world.size // (stages * tensor) * stages * self.num_lanes * self.chosen.steps
            length = self.chosen.tokens
            prompts = ([(number + row) % VOCABULARY for row in range(length)] for number in range(num_prompts))
            write_prompts(self.folder / "prompts.jsonl", prompts)
        self.world.comm.Barrier()

    def measure(self, share: float) -> Mapping[str, Any]:
        """The figures with a link that carries a rank's rows in `share` of the compute time."""
        taken: dict[str, list[float]] = {name: [] for name in (COMPUTING, BLOCKING, OVERLAPPED)}
        self._run(FREE, overlap=True)  # to warm up
        computing_s, num_bytes, tokens = self._run(FREE, overlap=True)
        link_s = share * computing_s
        link = Level("network", LATENCY_US, num_bytes / link_s / 1e9)
        for _ in range(self.chosen.passes):
            for name in taken:
                run = self._run(FREE if name == COMPUTING else link, overlap=name != BLOCKING)
                taken[name].append(run[0])
                if run[2] != tokens:
                    raise RuntimeError("overlap changed a result")
        record = {
            "part": "layout overlap",
            "ranks": self.world.size,
            "lanes": self.num_lanes,
            **{name: getattr(self.chosen, name) or 1 for name in LAYOUT_FLAGS},
            "tokens": self.chosen.tokens,
            "link": share,
            **overlap_figures(taken, link_s=link_s),
        }
        if self.world.rank == 0:
            layout = ", ".join(f"{name.replace('_', ' ')} {record[name]}" for name in LAYOUT_FLAGS)
            title = f"{self.num_lanes} lanes over emulated links, {self.world.size} ranks ({layout}), bfloat16"
            console().print(overlap_table(record, title=title, caption=machine(self.world)))
        return record

    def _run(self, link: Level, *, overlap: bool) -> tuple[float, int, Sequence[Sequence[int]]]:
        """Seconds of all steps, most bytes of a rank's rows between nodes, and the tokens of all requests."""
        chosen, results = self.chosen, self.folder / "results.h5"
        if self.world.rank == 0:
            results.unlink(missing_ok=True)
            near = [Level(name, FREE.latency_us, FREE.bandwidth_gb_s) for name in LEVEL_NAMES[:-1]]  # type: ignore[arg-type]
            topology = TopologyFile(2, (*near, link), nodes=(0,))
            (self.folder / "links.json").write_bytes(msgspec.json.encode(topology))
        self.world.comm.Barrier()
        micro_batches = self.num_lanes * (chosen.stages or 1)
        job = make_job(
            self.folder,
            origin="bench overlap",
            parallel={"stages": chosen.stages or 1, "tensor": chosen.tensor or 1},
            run={
                "backend": "numpy",
                "micro_batches": micro_batches,
                "lanes": self.num_lanes,
                "max_sequences": micro_batches,
                "batch_tokens": chosen.tokens,
                "overlap": overlap,
            },
            sampling={"max_tokens": 1, "ignore_eos": True},
            exchange={"transport": chosen.transport, "hops": chosen.hops or 1},
            topology={"ranks_per_node": chosen.ranks_per_node or 1, "emulate": str(self.folder / "links.json")},
        )
        seconds, _ = step_seconds(self.world, job)
        found: tuple[int, Sequence[Sequence[int]]] = self.world.comm.bcast(
            _read(results) if self.world.rank == 0 else None
        )
        return seconds, *found


def _read(path: Path) -> tuple[int, Sequence[Sequence[int]]]:
    with ResultFile(path) as results:
        num_bytes = int(results.sent_bytes("network").max())
        return num_bytes, [request.tokens.tolist() for request in results.requests()]


def _model(chosen: Namespace) -> Architecture:
    heads = max(1, chosen.width // HEAD_DIM)
    return Architecture(
        family="mission",
        vocab_size=VOCABULARY,
        width=chosen.width,
        num_layers=chosen.layers * (chosen.stages or 1),
        max_positions=chosen.tokens + 1,
        attention=AttentionShape(num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM),
        experts=Experts(
            num=chosen.experts, width=chosen.expert_width, router=Router(top_k=chosen.top_k, renormalize=True)
        ),
    )


def overlap_figures(taken: Mapping[str, list[float]], *, link_s: float) -> dict[str, float]:
    """The medians of the runs COMPUTING, BLOCKING and OVERLAPPED in `taken` seconds, and how much overlap hides."""
    longer = [max(computing_s, link_s) for computing_s in taken[COMPUTING]]
    return {
        "compute_ms": median(taken[COMPUTING]) * 1e3,
        "link_ms": link_s * 1e3,
        "blocking_ms": median(taken[BLOCKING]) * 1e3,
        "overlapped_ms": median(taken[OVERLAPPED]) * 1e3,
        "blocking / overlapped": ratio(taken[BLOCKING], taken[OVERLAPPED]),
        "overlapped / longer": ratio(taken[OVERLAPPED], longer),
    }


def overlap_table(record: Mapping[str, Any], *, title: str, caption: str) -> Table:
    """The figures of one measurement, a row."""
    names = ("compute ms", "link ms", "blocking ms", "overlapped ms", "blocking / overlapped", "overlapped / longer")
    table = figures_table(*names, title=title, caption=caption)
    spans = (record[f"{name}_ms"] for name in ("compute", "link", "blocking", "overlapped"))
    gains = (record["blocking / overlapped"], record["overlapped / longer"])
    table.add_row(*(f"{span:.1f}" for span in spans), *(f"{gain:.2f}" for gain in gains))
    return table
