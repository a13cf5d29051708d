"""A whole job, from the files it names to the results file."""

from collections.abc import Sequence as ManyOf
from datetime import UTC, datetime
from time import perf_counter

from moempi.backend.protocol import Backend
from moempi.backend.select import make_backend
from moempi.comm.device_memory import takes_device_memory
from moempi.config.job import Job
from moempi.engine.admission import make_requests, refuse_too_long
from moempi.engine.balance import quality_cost
from moempi.engine.kv_budget import affordable_pages, useful_pages
from moempi.engine.lanes import Lanes
from moempi.engine.load import Loading, load_model
from moempi.engine.rank_layout import RankLayout, available_bytes, lay_out_rank
from moempi.engine.recorder import Recorder
from moempi.engine.request import Request
from moempi.engine.restart import Attempt
from moempi.engine.scheduler import Scheduler
from moempi.engine.shard import Shard
from moempi.engine.summary import make_provenance, rank_record, run_report
from moempi.engine.tasks import Generate, Score, Task
from moempi.engine.tokenizer import TextTokenizer
from moempi.observe.logs import log_to_files
from moempi.observe.progress import Progress
from moempi.observe.run_report import Report, print_report
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.merge import merge
from moempi.storage.prompts import Prompt, read_prompts
from moempi.storage.records import RankRecord
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
    weights = world.collectively(lambda: WeightFile.open(job.model.weights))
    prompts = world.collectively(lambda: read_prompts(job.input.prompts, sampling=job.sampling, strict=strict))
    # This attempt alone writes the output, and computes what earlier ones did not finish.
    attempt = Attempt(job, world, weights=weights.fingerprint, num_requests=len(prompts))
    world.collectively(lambda: log_to_files(job.output.results, world.rank))
    # The machine that computes, and where this rank stands.
    backend = world.collectively(lambda: _backend(job, world))
    rank_layout = lay_out_rank(job, world, weights.architecture, on_gpu=backend.name == "cupy")
    # The requests of its data parallel group, which the first stage alone decides about, and the cache that they need.
    text = TextTokenizer(weights.tokenizer, eos_tokens=weights.architecture.eos_tokens)
    due = [prompt for prompt in prompts if prompt.index not in attempt.earlier.indices]
    own = due[rank_layout.coords.data :: rank_layout.grid.num_groups(0)] if rank_layout.is_first_stage else []
    sequences = make_requests(own, text, weights.architecture, task=job.task)
    pages = _cache_pages(job, world, rank_layout, backend, sequences)
    errors = [sequence for sequence in sequences if sequence.finish]
    too_long = refuse_too_long(sequences, pages=pages)
    # The model on this rank's machine.
    shard = Shard(weights, part=rank_layout.coords.tensor, parts=rank_layout.grid.tensor)
    begin = perf_counter()
    model = world.collectively(
        lambda: load_model(
            shard,
            backend,
            layers=rank_layout.stage.layers,
            hosted=rank_layout.hosted,
            pages=pages * rank_layout.num_groups,
        )
    )
    loading = Loading(shard.num_bytes, perf_counter() - begin)
    # The lanes take their steps, in turn, until no rank has work left.
    progress = Progress(len(prompts), enabled=world.rank == 0)
    recorder = _make_recorder(job, world, rank_layout, attempt, progress)
    recorder.record(errors)
    scheduler = _scheduler(job, rank_layout, sequences, pages=pages)
    lanes = Lanes(
        job,
        world,
        rank_layout,
        model,
        scheduler=scheduler,
        task=_task(job, text, prompts),
        recorder=recorder,
        stop=stop,
        first_step=attempt.earlier.next_step,
    )
    world.watch(job.run.timeout_s, group=rank_layout.coords.stage)
    seconds = lanes.take_steps()
    if not scheduler.has_work:
        recorder.record(too_long)  # only now: if this attempt stops early, the next may have more room
    progress.close()
    world.watch(job.run.timeout_s)
    # Every rank closes its part. Asked to stop before all is done: the parts stay, for the next attempt.
    record = _record(job, world, rank_layout, lanes, recorder, sequences, seconds=seconds, loading=loading)
    attempt.journal.append(record)
    attempt.journal.close()
    report = _report(job, world, attempt, lanes, recorder, record)
    if report.num_finished < len(prompts):
        return attempt.stop(stop)
    # The results: rank 0 merges all parts.
    provenance = make_provenance(job_text, world, weights=weights.fingerprint, start=start)
    if world.rank == 0:
        merge(job.output.results, attempt.journals(), num_requests=len(prompts), provenance=provenance)
        attempt.finish()
        print_report(report)
    return 0


def _backend(job: Job, world: World) -> Backend:
    return make_backend(
        job.run, local_rank=world.local_rank, takes_device_memory=lambda: takes_device_memory(job.exchange)
    )


def _cache_pages(job: Job, world: World, rank_layout: RankLayout, backend: Backend, requests: ManyOf[Request]) -> int:
    """Pages of each group of the first stage: as many as the longest of its sequences can use, and every rank affords.

    Collective; a ConfigError of any rank ends all.
    """
    available = available_bytes(job, world, of_node=backend.available_bytes())
    affordable = world.collectively(lambda: affordable_pages(job, rank_layout.memory, available=available))
    useful = useful_pages(requests, slots=rank_layout.grid.slots_per_group)
    pages: int = min(world.comm.allreduce(affordable, min), world.comm.allreduce(useful, max))
    return pages


def _make_recorder(job: Job, world: World, rank_layout: RankLayout, attempt: Attempt, progress: Progress) -> Recorder:
    """This rank's ledger; the first rank's also counts what earlier attempts finished."""
    show = attempt.also_writing_state(progress.update)
    ledger = Recorder(attempt.journal, task=job.task, writes_records=rank_layout.writes_records, on_progress=show)
    if world.rank == 0:
        ledger.add_earlier(attempt.earlier)
    return ledger


def _scheduler(job: Job, rank_layout: RankLayout, requests: ManyOf[Request], *, pages: int) -> Scheduler:
    return Scheduler(
        (sequence for sequence in requests if not sequence.finish),
        lanes=job.lanes,
        slots=rank_layout.grid.slots(0, rank_layout.coords.data) if rank_layout.is_first_stage else range(0),
        batch_tokens=job.run.batch_tokens,
        pages=pages,
    )


def _task(job: Job, tokenizer: TextTokenizer, prompts: ManyOf[Prompt]) -> Task:
    if job.task == "score":
        return Score(top=job.score.top_n)
    return Generate(tokenizer, top=max((prompt.sampling.top_logprobs for prompt in prompts), default=0))


def _record(
    job: Job,
    world: World,
    rank_layout: RankLayout,
    lanes: Lanes,
    recorder: Recorder,
    requests: ManyOf[Request],
    *,
    seconds: float,
    loading: Loading,
) -> RankRecord:
    """What this rank did, and what balancing cost if the job asks for that; collective."""
    balance = lanes.balance
    record = rank_record(
        lanes.each,
        recorder,
        world,
        rank_layout,
        balance=balance,
        seconds=seconds,
        loading=loading,
        hops=job.exchange.hops,
    )
    if balance and job.balance.sample:
        record.balance["logprob_change"] = quality_cost(
            lanes.each, requests, world, sample=job.balance.sample, take_steps=lanes.take_steps
        )
    return record


def _report(job: Job, world: World, attempt: Attempt, lanes: Lanes, recorder: Recorder, record: RankRecord) -> Report:
    """The figures of the whole run, earlier attempts' requests counted; collective."""
    return run_report(
        record,
        recorder,
        world,
        earlier=attempt.earlier,
        results=job.output.results,
        transport=f"{lanes.transport.name}  ({lanes.transport.reason})",
        moe_layers=lanes.each[0].model.architecture.moe_layers,
    )
