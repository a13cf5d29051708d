"""A whole job, from the files it names to the results file."""

import time
from collections.abc import Sequence as ManyOf
from datetime import UTC, datetime
from functools import partial

from moempi.backend.choice import make_backend
from moempi.backend.protocol import Backend
from moempi.config.job import Job
from moempi.config.size import parse_size
from moempi.engine.budget import affordable_pages, useful_pages
from moempi.engine.closing import provenance_of, rank_record, report_of
from moempi.engine.interleave import interleave
from moempi.engine.lane import Lane
from moempi.engine.ledger import Ledger
from moempi.engine.load import load_model
from moempi.engine.requests import refuse_too_long, sequences_of
from moempi.engine.restart import Attempt
from moempi.engine.scheduler import Scheduler
from moempi.engine.shard import Shard
from moempi.engine.tasks import Generate, Score
from moempi.engine.text import Text
from moempi.observe.logs import log_to_files
from moempi.observe.progress import Progress
from moempi.observe.report import print_report
from moempi.parallel.network import choose_transport, make_network
from moempi.parallel.schedule import Point, step_points
from moempi.parallel.stop import Stop
from moempi.parallel.world import World
from moempi.planning.layout import make_plan
from moempi.storage.merge import merge
from moempi.storage.prompts import read_prompts
from moempi.storage.weights import WeightFile


def run_job(job: Job, *, job_text: str, world: World, stop: Stop, strict: bool) -> int:
    """Run a job on all ranks of `world` and return the exit status; collective, blocks until the results are written.

    What earlier attempts at the job finished is not run again. When any rank is asked to `stop`, all do at the next
    step border, the exit status is 75, and running again continues. A MoempiError that a rank meets before the first
    step ends all ranks alike.
    """
    start = datetime.now(UTC)
    # What the job names: every rank reads the prompts and the head of the weight file.
    weights = world.together(lambda: WeightFile.open(job.model.weights))
    prompts = world.together(lambda: read_prompts(job.input.prompts, sampling=job.sampling, strict=strict))
    architecture = weights.architecture
    # This attempt alone writes the output, and computes what earlier ones did not finish.
    attempt = Attempt(job, world, weights=weights.fingerprint, num_requests=len(prompts))
    due = [prompt for prompt in prompts if prompt.index not in attempt.earlier.indices]
    # Where this rank stands, counted node by node, and what it will hold.
    nodes, ranks = world.by_node(job.topology.ranks_per_node)
    plan = world.together(lambda: make_plan(job, architecture, nodes))
    grid, place = plan.grid, plan.grid.coordinates(ranks.rank)
    stage, placement = grid.stages[place.stage], plan.placements[place.stage]
    # The requests of this rank's data parallel group, decided by the first stage alone, and the cache they get.
    backend = world.together(lambda: make_backend(job.run))
    text = Text(weights.tokenizer, eos_tokens=architecture.eos_tokens)
    own = due[place.data :: grid.num_groups(0)] if place.stage == 0 else []
    sequences = sequences_of(own, text, architecture, task=job.task)
    available = _available_bytes(job, backend, world)
    affordable = world.together(lambda: affordable_pages(job, plan.memory[place.stage], available=available))
    useful = useful_pages(sequences, slots=grid.slots_per_group)
    pages = min(world.comm.allreduce(affordable, min), world.comm.allreduce(useful, max))
    refuse_too_long(sequences, pages=pages)
    # The model on this rank's machine.
    world.together(lambda: log_to_files(job.output.results, world.rank))
    shard = Shard(weights, part=place.tensor, parts=grid.tensor)
    hosted = placement.hosted[ranks.rank - stage.ranks.start]
    cache_pages = pages * len(grid.peers(place.stage, place.data, other=0))
    model = world.together(lambda: load_model(shard, backend, layers=stage.layers, hosted=hosted, pages=cache_pages))
    # The lanes take their steps, in turn, until no rank has work left.
    progress = Progress(len(prompts), enabled=world.rank == 0)
    show = attempt.also_showing(progress.update)
    ledger = Ledger(attempt.part, task=job.task, keeps_records=place.tensor == 0, show=show)
    if world.rank == 0:
        ledger.count_earlier(attempt.earlier.finishes, exact=attempt.earlier.exact, referenced=attempt.earlier.referenced)
    ledger.enter(sequence for sequence in sequences if sequence.finish)
    scheduler = Scheduler(
        (sequence for sequence in sequences if not sequence.finish),
        lanes=job.lanes,
        slots=grid.slots(0, place.data) if place.stage == 0 else range(0),
        batch_tokens=job.run.batch_tokens,
        pages=pages,
    )
    top = job.score.top_n if job.task == "score" else max((prompt.sampling.top_logprobs for prompt in prompts), default=0)
    task = Score(top=top) if job.task == "score" else Generate(text, top=top)
    row_bytes = architecture.width * backend.row_dtype.itemsize
    transport = choose_transport(job.exchange.transport, ranks, grid, nodes=nodes, row_bytes=row_bytes)
    new_network = partial(
        make_network,
        ranks,
        grid,
        placement,
        backend,
        nodes=nodes,
        transport=transport.name,
        width=architecture.width,
        top_k=architecture.experts.router.top_k,
        num_layers=architecture.num_layers,
        group_rows=job.run.batch_tokens,
        overlap=job.run.overlap,
    )
    lanes = [Lane(index, model, new_network(), scheduler, task, ledger, stop) for index in range(job.lanes)]
    world.watch(job.run.timeout_s, group=place.stage)
    seconds = _take_steps(lanes, world, backend, stage.layers)
    progress.close()
    # Every rank closes its part. Asked to stop before all is done: the parts stay, for the next attempt.
    record = rank_record(lanes, ledger, world, seconds=seconds)
    attempt.part.append(record)
    attempt.part.close()
    report = report_of(
        record,
        ledger,
        world,
        earlier=attempt.earlier,
        results=job.output.results,
        transport=f"{transport.name}  ({transport.reason})",
        moe_layers=architecture.moe_layers,
    )
    if report.num_finished < len(prompts):
        return attempt.stop(stop)
    # The results: rank 0 merges all parts.
    provenance = provenance_of(job_text, world, weights=weights.fingerprint, start=start)
    if world.rank == 0:
        merge(job.output.results, attempt.parts(), num_requests=len(prompts), provenance=provenance)
        attempt.finish()
        print_report(report)
    return 0


def _available_bytes(job: Job, backend: Backend, world: World) -> int:
    """This rank's memory: what the job says, or its share of what its node has free."""
    if job.topology.rank_memory != "auto":
        return parse_size(job.topology.rank_memory)
    return backend.available_bytes() // world.nodes.count(world.nodes[world.rank])


def _take_steps(lanes: ManyOf[Lane], world: World, backend: Backend, layers: range) -> float:
    """Interleave the lanes to their end; the seconds that it took.

    Long verbs of the backend keep all lanes' rows moving. Lanes of a pipeline go in pairs: see `schedule`.
    """

    def keep_moving() -> None:
        for lane in lanes:
            lane.network.traffic.progress()

    def reached(lane: int, point: Point) -> None:
        world.alive(f"layer {point.layer} {point.phase}, lane {lane}")

    backend.between = keep_moving
    link, tensor = lanes[0].network.link, lanes[0].network.tensor.size
    moe_layers = lanes[0].model.architecture.moe_layers
    step = step_points(layers, moe_layers, tensor=tensor, is_first=link.is_first, is_last=link.is_last)
    begin = time.perf_counter()
    interleave(
        [lane.serve() for lane in lanes],
        step,
        together=len(lanes) if link.is_first and link.is_last else 2,
        reached=reached,
    )
    return time.perf_counter() - begin
