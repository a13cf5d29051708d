"""A whole job, from the files it names to the results file."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from moempi.config.job import Job
from moempi.config.recommended import KEYS
from moempi.config.traces import recorded_bytes, records_scores
from moempi.engine import phases
from moempi.engine.admitted import AdmittedRequests
from moempi.engine.balance import quality_cost
from moempi.engine.deployment import Deployment, deploy
from moempi.engine.disk import require_disk
from moempi.engine.engine import Engine, load_engine, make_task
from moempi.engine.inputs import Inputs, open_inputs
from moempi.engine.portions import Portions
from moempi.engine.rank_layout import RankLayout
from moempi.engine.recorder import Recorder
from moempi.engine.replay import Replay, open_replay
from moempi.engine.request import Request
from moempi.engine.restart import Attempt
from moempi.engine.summary import (
    RankRun,
    Totals,
    gather_records,
    make_provenance,
    rank_record,
    run_report,
    sum_totals,
)
from moempi.errors import MoempiError
from moempi.observe.progress import Progress
from moempi.observe.run_figures import Report
from moempi.printing import print_error
from moempi.runtime.stop import Stop
from moempi.runtime.waiting import barrier
from moempi.runtime.world import World
from moempi.storage.merge import Provenance, merge
from moempi.storage.prompt_file import PromptCounts
from moempi.storage.results import ResultFile
from moempi.storage.weights import WeightFile

MAX_ERRORS_SHOWN = 5

log = logging.getLogger(__name__)


def run_job(
    given: Job | Callable[[], Job],
    *,
    job_text: str,
    world: World,
    stop: Stop,
    strict: bool,
    max_errors: int | None = None,
    on_finished: Callable[[int], None] = lambda exit_code: None,
) -> int:
    """Run a job on all ranks of `world` and return the exit status; collective, blocks until the results are written.

    `given` is the job or a function that reads it. Requests that earlier attempts finished are not run again. If a rank
    is requested to `stop`, all stop after a step or tensor, with status 75; running the job again continues it. The
    status is 65 if all requests, or more than `max_errors`, end with an error. `on_finished(exit status)` is called on
    each rank when the results are in place.
    """
    start = datetime.now(UTC)
    # The inputs: rank 0 reads the prompts, every rank the index of the weight file.
    inputs = open_inputs(given if callable(given) else lambda: given, world, strict=strict)
    job, weights = inputs.job, inputs.weights
    # This attempt computes the requests that earlier ones did not finish.
    attempt = Attempt(world, inputs, max_errors=max_errors)
    attempt.warn_of_damage()
    # This rank's position in the layout, the requests of its group, which the first stage schedules, and their cache.
    deployment = deploy(job, world, weights, num_gpus=inputs.num_gpus, has_gpus=inputs.has_gpus)
    portions = Portions(inputs, deployment, attempt)
    requests, pages = _admit_first(inputs, deployment, attempt, portions)
    replay = _check(inputs, deployment, attempt, requests) if _is_checked(inputs) else None
    _announce(inputs)
    inputs.prompts.close()
    # The model and the lanes.
    progress = Progress(attempt.num_requests, has_more=portions.has_more, enabled=world.rank == 0)
    recorder = _make_recorder(job, world, deployment.rank_layout, attempt, progress, requests)
    first_step = attempt.earlier.next_step
    engine = load_engine(
        deployment, recorder, stop, pages=pages, progress=progress, first_step=first_step, replay=replay
    )
    if engine is None:
        return attempt.stop(stop, sum_totals(recorder, world))
    # The lanes run interleaved until no rank has work left, and pause for each further portion of the prompts.
    portions.hold_too_long(requests, pages)
    engine.submit(requests, expects_more=portions.has_more)
    sample = _quality_sample(job, engine)
    seconds = _compute(portions, engine, recorder, progress, stop)
    if replay is not None:
        replay.close()
    portions.close()
    progress.close()
    # All journals are closed. If the run was stopped, they stay for the next attempt.
    rank_run = RankRun(deployment.rank_layout, engine.lanes, recorder, engine.loading, seconds)
    totals, report = _close_journals(job, world, attempt, rank_run, sample=sample)
    if portions.has_more or totals.num_finished < attempt.num_requests:
        return attempt.stop(stop, totals)
    exit_code = attempt.conclude(totals.num_errors)
    # The results: rank 0 merges all journals.
    origin = partial(make_provenance, job_text, job, weights=weights.fingerprint, start=start)
    _write_results(job, world, attempt, report, make_origin=origin, on_finished=partial(on_finished, exit_code))
    return exit_code


def _admit_first(
    inputs: Inputs, deployment: Deployment, attempt: Attempt, portions: Portions
) -> tuple[AdmittedRequests, int]:
    """The requests of this rank's group from the first prompts, and the cache pages of each group.

    Begins the output of the attempt, if the job is not checked. Collective, blocks.
    """
    admitted, useful = portions.admit_first()

    def begin() -> tuple[AdmittedRequests, int]:
        admitted.require_whole()
        if not _is_checked(inputs):
            attempt.begin(has_records=_has_records(deployment))
        return admitted, useful

    return deployment.with_cache_pages(begin)


def _compute(portions: Portions, engine: Engine, recorder: Recorder, progress: Progress, stop: Stop) -> float:
    """Compute the queued requests, then each further portion of the prompts; the seconds. Collective, blocks."""
    deployment = engine.deployment
    task = make_task(deployment.job, deployment.tokenizer, top=portions.top_logprobs)
    seconds = engine.run(task, recorder)
    while portions.has_more and not deployment.world.comm.allreduce(stop.requested, max):
        requests = portions.admit_next()
        recorder.record(requests.take_refused())
        progress.expect(portions.num_requests, has_more=portions.has_more)
        task.expect_top(portions.top_logprobs)
        portions.hold_too_long(requests, engine.pages)
        engine.submit(requests, expects_more=portions.has_more)
        seconds += engine.run(task, recorder)
    stop.end_of_steps()
    if not portions.has_more and not engine.scheduler.num_unfinished:
        recorder.record(portions.too_long(engine.pages))  # if stopped, the next attempt may have more memory
    return seconds


def _is_checked(inputs: Inputs) -> bool:
    """Whether what the job records or replays may refuse it."""
    job = inputs.job
    return bool(job.replay.routing or inputs.counts.replays or recorded_bytes(job, inputs.weights.architecture))


def _has_records(deployment: Deployment) -> bool:
    """Whether this rank records anything."""
    trace, rank_layout = deployment.job.trace, deployment.rank_layout
    scores = rank_layout.is_last_stage and records_scores(deployment.job)
    return rank_layout.writes_records or trace.has_routing or bool(trace.hidden) or scores


def _check(inputs: Inputs, deployment: Deployment, attempt: Attempt, requests: AdmittedRequests) -> Replay | None:
    """The routing that the job is given, which fits the `requests` of this rank's group; begins the output.

    Ends all ranks if the disk has no space for what is recorded; the corrected job finds no journals of this one.
    Collective, blocks.
    """
    job, world, architecture = inputs.job, deployment.world, inputs.weights.architecture
    require_disk(job, world, architecture, requests if deployment.rank_layout.writes_records else [])
    replay = open_replay(job, architecture, world, inputs.prompts, inputs.counts.replay_files)

    def begin() -> None:
        if replay is not None:
            requests.refuse(replay.problem_of)
        attempt.begin(has_records=_has_records(deployment))

    world.collectively(begin)
    return replay


def _write_results(
    job: Job,
    world: World,
    attempt: Attempt,
    report: Report | None,
    *,
    make_origin: Callable[[Sequence[str]], Provenance],
    on_finished: Callable[[], None],
) -> None:
    """Put the results in place and print the report, on rank 0, which alone has it; collective.

    A failure after the results are in place is not this job's, and does not change its state.
    """
    world.alive(phases.RESULTS)
    if report is not None:
        problems = merge(
            job.output.results,
            attempt.journals(),
            num_requests=attempt.num_requests,
            provenance=make_origin(report.hosts),
            before_replace=attempt.before_replace,
        )
        on_finished()
        attempt.finish()
        attempt.warn_of_new_damage(problems)
    barrier(world.comm)
    if report is None:
        on_finished()
    world.on_failure(None)
    if report is not None:
        _print(_with_results(report))


def _announce(inputs: Inputs) -> None:
    """Print on rank 0 what has been found in the prompt file, and what the weight file lacks for it."""
    job, weights = inputs.job, inputs.weights
    if inputs.file is not None:
        print_error(inputs.file.found())
        if job.sampling.defaults == "model":
            rules = ", ".join(f"{key} {getattr(job.sampling, key):g}" for key in KEYS)
            print_error(f"sampling defaults of {weights.path}, and of the job: {rules}")
        _warn_of_texts(inputs.counts, weights)


def _with_results(report: Report) -> Report:
    """The report with the first errors of the results, which are also printed on stderr, and the scores."""
    try:
        with ResultFile(report.results) as results:
            errors = [f"{name}: {error}" for name, error in results.errors(limit=MAX_ERRORS_SHOWN)]
            scores = results.scores()
    except MoempiError as error:
        log.warning("the results are whole, but cannot be read for the report: %s", error)
        return report
    if errors:
        first = f", the first {len(errors)}:" if len(errors) < report.num_errors else ":"
        log.warning("%d of %d requests ended with an error%s", report.num_errors, report.num_finished, first)
    for line in errors:
        log.warning("%s", line)
    return dataclasses.replace(report, errors=errors, scores=scores)


def _print(report: Report) -> None:
    """Print the report; if stdout cannot be written, warn, and let the interpreter flush it to nowhere."""
    from moempi.observe.run_report import print_report

    try:
        print_report(report)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError, SystemExit) as error:  # rich exits if stdout is a closed pipe
        log.warning("the results are whole, but the report cannot be printed: %s", error)
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _warn_of_texts(counts: PromptCounts, weights: WeightFile) -> None:
    """Say once what the errors of single requests will say: that the weight file lacks what their prompts need."""
    texts = counts.texts + counts.chats
    if texts and not weights.tokenizer:
        log.warning("%s holds no tokenizer: %d prompts of text end as errors; give tokens", weights.path, texts)
    elif counts.chats and not weights.chat:
        log.warning("%s holds no chat template: %d prompts of messages end as errors", weights.path, counts.chats)


def _make_recorder(
    job: Job,
    world: World,
    rank_layout: RankLayout,
    attempt: Attempt,
    progress: Progress,
    requests: AdmittedRequests,
) -> Recorder:
    """This rank's recorder, which has recorded the refused requests.

    On rank 0 it counts the requests of earlier attempts as well.
    """
    on_progress = attempt.also_writing_state(progress.update)
    writes_records = rank_layout.writes_records
    recorder = Recorder(
        attempt.journal,
        task=job.task,
        writes_records=writes_records,
        on_progress=on_progress,
        since=attempt.earlier.next_step,
        hidden=job.trace.hidden_positions if job.trace.hidden else None,
    )
    if world.rank == 0:
        recorder.add_earlier(attempt.earlier)
    recorder.record(requests.take_refused())
    if world.rank == 0:
        attempt.count(recorder.counts())
    return recorder


def _quality_sample(job: Job, engine: Engine) -> list[Request]:
    """The first requests to compute, as many as the quality cost of balancing needs; they outlive their records."""
    return engine.scheduler.first(job.balance.sample) if job.balance.mode != "off" else []


def _close_journals(
    job: Job, world: World, attempt: Attempt, rank_run: RankRun, *, sample: Sequence[Request]
) -> tuple[Totals, Report | None]:
    """Close the journals, with the records of all ranks in that of rank 0, which alone gets a report; collective.

    A record has the quality cost of balancing if the job measures it.
    """
    world.alive(phases.RECORDS)
    world.watch(job.run.timeout_s)
    record, lanes = rank_record(world, rank_run, hops=job.exchange.hops), rank_run.lanes
    if lanes.balance and job.balance.sample:
        change = quality_cost(lanes.each, sample, world, sample=job.balance.sample, run=lanes.run)
        record = msgspec.structs.replace(record, balance={**record.balance, "logprob_change": change})
    totals = sum_totals(rank_run.recorder, world)
    world.collectively(lambda: attempt.journal.close() if world.rank > 0 else None)  # before rank 0 merges them
    gathered = gather_records(record, rank_run.recorder, world)
    for one in gathered.records:
        attempt.journal.append(one)
    attempt.journal.close()
    attempt.begin_results()
    if not gathered.records:
        return totals, None
    report = run_report(
        gathered,
        totals,
        earlier=attempt.earlier,
        results=job.output.results,
        transport=f"{lanes.transport.name}  ({lanes.transport.reason})",
        moe_layers=lanes.each[0].context.model.architecture.moe_layers,
        slow_hosts=world.slow_hosts,
    )
    return totals, report
