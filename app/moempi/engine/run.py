"""A whole job, from the files it names to the results file."""

import time
from collections.abc import Sequence as ManyOf
from datetime import UTC, datetime

from moempi.backend.choice import make_backend
from moempi.backend.protocol import PAGE_ROWS, Backend
from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.size import format_size, parse_size
from moempi.engine.closing import provenance_of, rank_record, report_of
from moempi.engine.interleave import interleave
from moempi.engine.lane import Lane
from moempi.engine.ledger import Ledger
from moempi.engine.load import load_model
from moempi.engine.requests import refuse_too_long, sequences_of
from moempi.engine.scheduler import Scheduler
from moempi.engine.sequence import Sequence
from moempi.engine.tasks import Generate, Score
from moempi.engine.text import Text
from moempi.errors import ConfigError
from moempi.model.kv_cache import pages_for
from moempi.observe.logs import log_to_files
from moempi.observe.progress import Progress
from moempi.observe.report import Layout, print_layout, print_report
from moempi.parallel.exchange import Exchange
from moempi.parallel.placement import Placement, linear
from moempi.parallel.schedule import Point, points
from moempi.parallel.transports.alltoallv import Alltoallv
from moempi.parallel.world import World
from moempi.planning.memory import Memory, rank_memory
from moempi.storage.prompts import read_prompts
from moempi.storage.records import PartWriter, part_path, part_paths
from moempi.storage.results import merge
from moempi.storage.weights import WeightFile

CACHE_SHARE = 0.8


def run_job(job: Job, *, job_text: str, world: World, strict: bool, dry_run: bool) -> int:
    """Run a job on all ranks of `world` and return the exit status; collective, blocks until the results are written.

    A MoempiError that a rank meets before the first step ends all ranks alike. `dry_run` stops before weights are read.
    """
    start = datetime.now(UTC)
    # What the job names: every rank reads the prompts and the head of the weight file.
    weights = world.together(lambda: WeightFile.open(job.model.weights))
    prompts = world.together(lambda: read_prompts(job.input.prompts, sampling=job.sampling, strict=strict))
    architecture = weights.architecture
    # Who hosts which experts, who computes which prompts, and whether it fits.
    backend = world.together(lambda: make_backend(job.run))
    placement = linear(architecture.experts.num, world.size)
    hosted = placement.hosted[world.rank]
    text = Text(weights.tokenizer, eos_tokens=architecture.eos_tokens)
    sequences = sequences_of(prompts[world.rank :: world.size], text, architecture, task=job.task)
    memory = rank_memory(architecture, job, hosted=len(hosted), page_rows=PAGE_ROWS)
    pages = world.together(lambda: _cache_pages(job, memory, sequences, _available_bytes(backend, world)))
    refuse_too_long(sequences, pages=pages)
    if dry_run:
        _show_layout(job, world, placement, memory, pages=pages)
        return 0
    # The model on this rank's machine, and this rank's part of the results.
    world.together(lambda: log_to_files(job.output.results, world.rank))
    model = world.together(lambda: load_model(weights, backend, hosted=hosted, pages=pages))
    part = world.together(lambda: _open_part(job, world, weights.fingerprint))
    # The lanes take their steps, in turn, until no rank has work left.
    progress = Progress(len(prompts), enabled=world.rank == 0)
    ledger = Ledger(part, task=job.task, show=progress.update)
    ledger.enter(sequence for sequence in sequences if sequence.finish)
    scheduler = Scheduler(
        (sequence for sequence in sequences if not sequence.finish),
        lanes=job.run.micro_batches,
        max_sequences=job.run.max_sequences,
        batch_tokens=job.run.batch_tokens,
        pages=pages,
        all_rows=job.task == "score",
    )
    task = Score(model, top=job.score.top_n) if job.task == "score" else Generate(model, text)
    lanes = [
        Lane(index, model, exchange, scheduler, task, ledger)
        for index, exchange in enumerate(_exchanges(job, world, placement, backend, architecture))
    ]
    world.watch(job.run.timeout_s)
    seconds = _take_steps(lanes, world)
    progress.close()
    # The results: every rank closes its part, rank 0 merges them.
    record = rank_record(lanes, ledger, world, seconds=seconds)
    part.append(record)
    part.close()
    provenance = provenance_of(job_text, world, weights=weights.fingerprint, start=start)
    report = report_of(record, ledger, world, results=job.output.results, moe_layers=architecture.moe_layers)
    if world.rank == 0:
        parts = part_paths(job.output.results)
        merge(job.output.results, parts, num_requests=len(prompts), provenance=provenance)
        print_report(report)
    return 0


def _available_bytes(backend: Backend, world: World) -> int:
    """This rank's share of what its node has free."""
    return backend.available_bytes() // world.nodes.count(world.nodes[world.rank])


def _cache_pages(job: Job, memory: Memory, sequences: ManyOf[Sequence], available: int) -> int:
    """Pages of the rank's cache: as many as its sequences can use at once, no more than memory allows.

    Raises ConfigError when not even one page fits beside the weights and the rows.
    """
    wanted = sorted((pages_for(sequence.capacity) for sequence in sequences if not sequence.finish), reverse=True)
    useful = sum(wanted[: max(job.run.max_sequences, job.run.micro_batches)])
    if job.run.kv_memory == "auto":
        allowed = int((available - memory.weights - memory.rows) * CACHE_SHARE)
    else:
        allowed = parse_size(job.run.kv_memory)
    if allowed < memory.page:
        raise ConfigError(
            f"no room for the cache: weights {format_size(memory.weights)}, rows {format_size(memory.rows)}, "
            f"a page {format_size(memory.page)}, available {format_size(available)}, kv_memory {job.run.kv_memory}; "
            "use more ranks or nodes, or lower run.batch_tokens"
        )
    return min(useful, allowed // memory.page)


def _show_layout(job: Job, world: World, placement: Placement, memory: Memory, *, pages: int) -> None:
    """Print who does what, from rank 0; collective."""
    rows = {"weights": memory.weights, "cache": pages * memory.page, "rows": memory.rows}
    layout = Layout(
        title=f"{job.model.weights} on {world.size} ranks, {world.num_nodes} nodes",
        nodes=world.nodes,
        hosted=[len(hosted) for hosted in placement.hosted],
        memory=world.comm.allgather(rows),
    )
    if world.rank == 0:
        print_layout(layout)


def _open_part(job: Job, world: World, weights: str) -> PartWriter:
    """This rank's part, empty."""
    path = part_path(job.output.results, world.rank)
    path.unlink(missing_ok=True)
    return PartWriter(path, fingerprint=weights)


def _exchanges(
    job: Job, world: World, placement: Placement, backend: Backend, architecture: Architecture
) -> list[Exchange]:
    """One exchange a lane, each on a communicator of its own; long verbs of the backend keep all of them moving."""
    exchanges = []
    for _ in range(job.run.micro_batches):
        comm = world.comm.Dup()
        transport = Alltoallv(comm, row_bytes=architecture.width * backend.row_dtype.itemsize)
        exchanges.append(
            Exchange(
                comm,
                placement,
                backend,
                transport=transport,
                width=architecture.width,
                num_layers=architecture.num_layers,
                overlap=job.run.overlap,
            )
        )

    def keep_moving() -> None:
        for exchange in exchanges:
            exchange.progress()

    backend.between = keep_moving
    return exchanges


def _take_steps(lanes: ManyOf[Lane], world: World) -> float:
    """Interleave the lanes to their end; the seconds that it took."""

    def reached(lane: int, point: Point) -> None:
        world.alive(f"layer {point.layer} {point.phase}, lane {lane}")

    begin = time.perf_counter()
    step = points(lanes[0].model.architecture.moe_layers)
    interleave([lane.serve() for lane in lanes], step, reached=reached)
    return time.perf_counter() - begin
