"""The engine of a rank: its share of the model and its lanes, loaded once, which run requests any number of times."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter

from moempi.config.job import Job
from moempi.engine import phases
from moempi.engine.admitted import AdmittedRequests
from moempi.engine.deployment import Deployment
from moempi.engine.lane import LaneContext
from moempi.engine.lanes import Lanes, make_lanes
from moempi.engine.load import Loading, load_model
from moempi.engine.recorder import Recorder
from moempi.engine.replay import Replay
from moempi.engine.scheduler import Scheduler
from moempi.engine.shard import Shard
from moempi.engine.tasks import Generate, Score, Task
from moempi.engine.tokenizer import TextTokenizer
from moempi.engine.warm_up import warm_up
from moempi.model.head import ScoredTokens
from moempi.model.transformer import Transformer
from moempi.observe.progress import Progress
from moempi.runtime.stop import Stop, StoppedError


@dataclass(frozen=True, slots=True)
class Engine:
    """The `lanes` of a rank with a loaded model and a cache of `pages` pages for each group, ready to run requests."""

    deployment: Deployment
    lanes: Lanes
    loading: Loading
    pages: int

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of this rank's group, which keeps the slots of the cache from run to run."""
        return self.lanes.each[0].context.scheduler

    def submit(self, admitted: AdmittedRequests, *, expects_more: bool = False) -> None:
        """Queue the requests that can be computed and need no more pages than there are.

        If `expects_more`, `run` returns when the queue of a group runs short, for more to be submitted.
        """
        self.scheduler.submit(admitted.take_fitting(self.pages), count=admitted.num_fitting(self.pages))
        self.scheduler.expects_more = expects_more

    def run(self, task: Task, recorder: Recorder) -> float:
        """Compute all queued requests, and record each when it is finished; the seconds. Collective, blocks.

        If any rank is requested to stop, or runs short of requests, all ranks return after the current step; another
        call goes on with the requests that are not finished.
        """
        job, world = self.deployment.job, self.deployment.world
        world.watch(job.run.timeout_s, group=self.deployment.rank_layout.coords.stage, busy_s=self.lanes.busy_s)
        context = replace(self.lanes.each[0].context, task=task, recorder=recorder)
        seconds = self.lanes.run([replace(lane, context=context) for lane in self.lanes.each])
        world.watch(job.run.timeout_s)
        return seconds

    def free(self) -> None:
        """Free the communicators and the shared memory; it runs nothing afterwards. Collective, blocks."""
        self.lanes.free()
        self.deployment.rank_layout.ranks.Free()


def load_engine(
    deployment: Deployment,
    recorder: Recorder,
    stop: Stop,
    *,
    pages: int,
    progress: Progress,
    first_step: int = 0,
    replay: Replay | None = None,
) -> Engine | None:
    """Load this rank's share of the model and make its lanes; collective, blocks.

    What is recorded of steps, which are numbered from `first_step`, goes to `recorder`. Rows that have a route in
    `replay` are given it. None on all ranks, and the end of `progress`, if a rank is requested to `stop` meanwhile. A
    MoempiError of any rank ends all ranks.
    """
    job, world = deployment.job, deployment.world
    world.alive(phases.LOADING)
    loaded = _load(deployment, stop, pages=pages, progress=progress)
    if loaded is None:
        progress.close()
        return None
    model, loading, warms_up = loaded
    if warms_up:
        grouped = deployment.rank_layout.placements if job.exchange.hops == 1 else {}
        warm_up(model, world, placements=grouped, lanes=job.lanes, group_size=job.parallel.tensor)
    scheduler = Scheduler(
        (),
        micro_batches=job.num_micro_batches,
        slots=deployment.slots,
        batch_tokens=job.run.batch_tokens,
        pages=pages,
    )
    context = LaneContext(model, scheduler, Generate(deployment.tokenizer, top=0), recorder, stop)
    pending = deployment.pending
    world.alive(phases.LANES)
    lanes = make_lanes(
        job, world, deployment.rank_layout, context, pending=pending, first_step=first_step, replay=replay
    )
    return Engine(deployment, lanes, loading, pages)


def make_task(job: Job, tokenizer: TextTokenizer, *, top: int) -> Task:
    """The job's task; of its requests, one requests `top` likeliest tokens, and none more."""
    if job.task == "score":
        return Score(ScoredTokens(job.score.top_n, job.score.threshold), dtype=job.score.dtype)
    return Generate(tokenizer, top=top)


def _load(
    deployment: Deployment, stop: Stop, *, pages: int, progress: Progress
) -> tuple[Transformer, Loading, bool] | None:
    """This rank's share of the model, with `pages` cache pages for each group; collective.

    With it whether any rank's backend has kernels to warm up. None on all ranks if one is requested to stop meanwhile.
    """
    world, rank_layout = deployment.world, deployment.rank_layout
    begin, layers, hosted = perf_counter(), rank_layout.stage.layers, rank_layout.hosted
    coords, grid = rank_layout.coords, rank_layout.grid

    def is_stopped() -> bool:
        if stop.requested:
            world.request_stop()  # the other ranks read weights as well
        return stop.requested or world.stop_requested

    def check() -> None:
        if is_stopped():
            raise StoppedError

    head = grid.head_part(rank_layout.ranks.rank), grid.head_ranks
    shard = Shard(deployment.weights, part=coords.tensor, parts=grid.tensor, head=head, on_read=check)
    all_pages = pages * rank_layout.num_groups
    slots = grid.slots(coords.stage, coords.data)

    def on_layer(loaded: int) -> None:
        progress.loading(loaded, len(layers), shard.num_bytes)

    def load() -> tuple[Transformer | None, Sequence[int]]:
        with suppress(StoppedError), shard.read_ahead(layers, hosted):
            model = load_model(
                shard, deployment.backend, layers=layers, hosted=hosted, pages=all_pages, slots=slots, on_layer=on_layer
            )
            return model, [not is_stopped(), deployment.backend.record_event() is None]
        return None, [False, True]

    model, (all_loaded, none_warms_up) = world.collectively_least(load, num=2)
    if model is None or not all_loaded:
        return None
    return model, Loading(shard.num_bytes, perf_counter() - begin), not none_warms_up
