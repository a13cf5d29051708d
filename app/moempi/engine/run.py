"""A whole job, from the files it names to the results file."""

import time
from collections.abc import Sequence as ManyOf
from datetime import UTC, datetime

from moempi.backend.choice import make_backend
from moempi.backend.protocol import Backend
from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.engine.balance import make_balance, quality_cost
from moempi.engine.budget import affordable_pages, useful_pages
from moempi.engine.closing import provenance_of, rank_record, report_of
from moempi.engine.interleave import interleave
from moempi.engine.lane import Lane
from moempi.engine.ledger import Ledger
from moempi.engine.load import load_model
from moempi.engine.requests import refuse_too_long, sequences_of
from moempi.engine.restart import Attempt
from moempi.engine.scheduler import Scheduler
from moempi.engine.seat import Seat, available_bytes, take_seat
from moempi.engine.sequence import Sequence
from moempi.engine.shard import Shard
from moempi.engine.tasks import Generate, Score, Task
from moempi.engine.text import Text
from moempi.engine.trace import RoutingTrace
from moempi.model.gating import ROUTER_ALONE
from moempi.observe.logs import log_to_files
from moempi.observe.progress import Progress
from moempi.observe.report import print_report
from moempi.parallel.device_memory import takes_device_memory
from moempi.parallel.network import Network, choose_transport, emulated_links, make_network
from moempi.parallel.schedule import Point, step_points
from moempi.parallel.stop import Stop
from moempi.parallel.transport_choice import ChosenTransport
from moempi.parallel.world import World
from moempi.storage.merge import merge
from moempi.storage.prompts import Prompt, read_prompts
from moempi.storage.weights import WeightFile


def run_job(job: Job, *, job_text: str, world: World, stop: Stop, strict: bool) -> int:
    """Run a job on all ranks of `world` and return the exit status; collective, blocks until the results are written.

    What earlier attempts at the job finished is not run again. When any rank is asked to `stop`, all do at the next
    step border, the exit status is 75, and running again continues. A MoempiError that a rank meets before the first
    step ends all ranks alike.
    """
    start = datetime.now(UTC)
    world.watch(job.run.timeout_s)
    # What the job names: every rank reads the prompts and the head of the weight file.
    weights = world.together(lambda: WeightFile.open(job.model.weights))
    prompts = world.together(lambda: read_prompts(job.input.prompts, sampling=job.sampling, strict=strict))
    # This attempt alone writes the output, and computes what earlier ones did not finish.
    attempt = Attempt(job, world, weights=weights.fingerprint, num_requests=len(prompts))
    world.together(lambda: log_to_files(job.output.results, world.rank))
    # The machine that computes, where this rank stands, and the requests of its data parallel group, which the first
    # stage alone decides about.
    backend = world.together(
        lambda: make_backend(
            job.run, local_rank=world.local_rank, takes_device_memory=lambda: takes_device_memory(job.exchange)
        )
    )
    seat = take_seat(job, world, weights.architecture, on_gpu=backend.name == "cupy")
    text = Text(weights.tokenizer, eos_tokens=weights.architecture.eos_tokens)
    due = [prompt for prompt in prompts if prompt.index not in attempt.earlier.indices]
    own = due[seat.place.data :: seat.grid.num_groups(0)] if seat.schedules else []
    sequences = sequences_of(own, text, weights.architecture, task=job.task)
    pages = _cache_pages(job, world, seat, backend, sequences)
    errors = [sequence for sequence in sequences if sequence.finish]
    too_long = refuse_too_long(sequences, pages=pages)
    # The model on this rank's machine.
    shard = Shard(weights, part=seat.place.tensor, parts=seat.grid.tensor)
    model = world.together(
        lambda: load_model(shard, backend, layers=seat.stage.layers, hosted=seat.hosted, pages=pages * seat.num_groups)
    )
    # The lanes take their steps, in turn, until no rank has work left.
    progress = Progress(len(prompts), enabled=world.rank == 0)
    show = attempt.also_showing(progress.update)
    ledger = Ledger(attempt.part, task=job.task, keeps_records=seat.keeps_records, show=show)
    if world.rank == 0:
        ledger.count_earlier(attempt.earlier)
    ledger.enter(errors)
    scheduler = Scheduler(
        (sequence for sequence in sequences if not sequence.finish),
        lanes=job.lanes,
        slots=seat.grid.slots(0, seat.place.data) if seat.schedules else range(0),
        batch_tokens=job.run.batch_tokens,
        pages=pages,
    )
    transport, networks = _networks(job, world, seat, backend, weights.architecture)
    task = _task(job, text, prompts)
    traces = _traces(job, seat, networks, backend, weights.architecture, ledger, since=attempt.earlier.next_step)
    balance = make_balance(job.balance, networks, weights.architecture, seat.stage.layers)
    gatings = balance.gatings if balance else [ROUTER_ALONE] * len(networks)
    lanes = [
        Lane(index, model, network, scheduler, task, ledger, stop, gating, trace)
        for index, (network, gating, trace) in enumerate(zip(networks, gatings, traces, strict=True))
    ]
    world.watch(job.run.timeout_s, group=seat.place.stage)
    seconds = _take_steps(lanes, world, backend, seat.stage.layers, hops=job.exchange.hops)
    if not scheduler.has_work:
        ledger.enter(too_long)  # only now: if this attempt stops early, the next may have more room
    progress.close()
    world.watch(job.run.timeout_s)
    # Every rank closes its part. Asked to stop before all is done: the parts stay, for the next attempt.
    record = rank_record(lanes, ledger, world, seat, balance=balance, seconds=seconds, hops=job.exchange.hops)
    if balance and job.balance.sample:
        record.balance["logprob_change"] = quality_cost(
            lanes,
            sequences,
            world,
            sample=job.balance.sample,
            take_steps=lambda lanes: _take_steps(lanes, world, backend, seat.stage.layers, hops=job.exchange.hops),
        )
    attempt.part.append(record)
    attempt.part.close()
    report = report_of(
        record,
        ledger,
        world,
        earlier=attempt.earlier,
        results=job.output.results,
        transport=f"{transport.name}  ({transport.reason})",
        moe_layers=weights.architecture.moe_layers,
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


def _cache_pages(job: Job, world: World, seat: Seat, backend: Backend, sequences: ManyOf[Sequence]) -> int:
    """Pages of each group of the first stage: as many as the longest of its sequences can use, and every rank affords.

    Collective; a ConfigError of any rank ends all.
    """
    available = available_bytes(job, world, of_node=backend.available_bytes())
    affordable = world.together(lambda: affordable_pages(job, seat.memory, available=available))
    useful = useful_pages(sequences, slots=seat.grid.slots_per_group)
    pages: int = min(world.comm.allreduce(affordable, min), world.comm.allreduce(useful, max))
    return pages


def _task(job: Job, text: Text, prompts: ManyOf[Prompt]) -> Task:
    if job.task == "score":
        return Score(top=job.score.top_n)
    return Generate(text, top=max((prompt.sampling.top_logprobs for prompt in prompts), default=0))


def _networks(
    job: Job, world: World, seat: Seat, backend: Backend, architecture: Architecture
) -> tuple[ChosenTransport, list[Network]]:
    """The transport that the job or a probe chose, and a network for each lane; collective."""
    transport = choose_transport(
        job.exchange.transport, seat.ranks, seat.grid, backend, topology=seat.topology, width=architecture.width
    )
    links = world.together(lambda: emulated_links(job.topology))
    networks = [
        make_network(
            seat.ranks,
            seat.grid,
            seat.placements,
            backend,
            topology=seat.topology,
            transport=transport.name,
            hops=job.exchange.hops,
            verify=job.exchange.verify,
            width=architecture.width,
            top_k=architecture.experts.router.top_k,
            group_rows=job.run.batch_tokens,
            overlap=job.run.overlap,
            departing=seat.departing,
            lanes=job.lanes,
            links=links,
        )
        for _ in range(job.lanes)
    ]
    return transport, networks


def _traces(
    job: Job,
    seat: Seat,
    networks: ManyOf[Network],
    backend: Backend,
    architecture: Architecture,
    ledger: Ledger,
    *,
    since: int,
) -> list[RoutingTrace | None]:
    """For each lane what records its routing, where the job wants that."""
    if not job.trace.routing:
        return [None] * len(networks)
    layers = [layer for layer in architecture.moe_layers if layer in seat.stage.layers]
    traces: list[RoutingTrace | None] = []
    for lane, network in enumerate(networks):
        trace = RoutingTrace(
            ledger.write,
            backend,
            layers=layers,
            rank=seat.ranks.rank,
            since=since,
            first_step=since + lane,
            stride=len(networks),
        )
        network.exchange.listen = trace.note
        traces.append(trace)
    return traces


def _take_steps(lanes: ManyOf[Lane], world: World, backend: Backend, layers: range, *, hops: int) -> float:
    """Interleave the lanes to their end; the seconds that it took.

    Long verbs of the backend keep all lanes' rows moving. Lanes of a pipeline go in pairs: see `schedule`.
    """

    def keep_moving() -> None:
        for lane in lanes:
            lane.network.traffic.progress()

    def reached(lane: int, point: Point) -> None:
        place = f"layer {point.layer} {point.phase}" if point.layer >= 0 else point.phase
        world.alive(f"{place}, lane {lane}")

    backend.between = keep_moving
    link, tensor = lanes[0].network.link, lanes[0].network.tensor.size
    moe_layers = lanes[0].model.architecture.moe_layers
    step = step_points(
        layers,
        moe_layers,
        tensor=tensor,
        is_first=link.is_first,
        is_last=link.is_last,
        hops=hops,
        departs=lanes[0].network.onward is not None,
    )
    begin = time.perf_counter()
    interleave(
        [lane.serve() for lane in lanes],
        step,
        together=len(lanes) if link.is_first and link.is_last else 2,
        resumed=backend.use_queue,
        reached=reached,
    )
    for lane in lanes:
        lane.gating.settle()
    return time.perf_counter() - begin
