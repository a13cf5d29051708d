"""The inputs of a job, opened on all ranks, and the lock on its output."""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from msgspec import structs

from moempi.backend.select import count_gpus, has_fast_products
from moempi.config.architecture import Architecture
from moempi.config.job import Job, result_keys
from moempi.config.traces import recorded_bytes
from moempi.engine import phases
from moempi.engine.deployment import with_products
from moempi.engine.replay import LineFiles, line_file
from moempi.errors import DataError
from moempi.observe.logs import log_to_files
from moempi.runtime.world import MOST, World
from moempi.storage.files import digest_file, file_state, remove_hidden
from moempi.storage.journal import journal_paths
from moempi.storage.lock import OutputLock
from moempi.storage.prompt_file import PromptCounts, PromptFile
from moempi.storage.prompt_spool import PromptCodec, PromptSpool
from moempi.storage.prompts import Prompt
from moempi.storage.run_state import state_path
from moempi.storage.tokenizer_check import check_tokenizer
from moempi.storage.weights import WeightFile

MAX_GROUPS = 256
"""Groups of prompts whose statistics are summed up: each has a number for each pair of experts of a layer."""

Backend = Literal["numpy", "cupy", "auto"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the ranks read, and what they know of each other before they lay the job out.

    Rank 0 has the `prompts` that have been read of the `file`, the others have none and no file; `has_more` is whether
    it has others. Of the `counts`, ranks above 0 have only the numbers of requests, chats and replays and
    `top_logprobs`. `fingerprint` identifies the run, `lock` is rank 0's on the output, None on the others. `num_gpus`
    is the number of GPUs of this node that the job can use, `has_gpus` whether every node has some, `has_journals`
    whether there are journals of earlier attempts.
    """

    job: Job
    weights: WeightFile
    file: PromptFile | None
    prompts: PromptSpool
    counts: PromptCounts
    has_more: bool
    fingerprint: str
    lock: OutputLock | None
    num_gpus: int
    has_gpus: bool
    has_journals: bool


class _Opened(NamedTuple):
    """What a rank has opened."""

    job: Job
    weights: WeightFile
    file: PromptFile | None
    prompts: PromptSpool
    lock: OutputLock | None
    num_gpus: int


class _Agreed(NamedTuple):
    """Numbers of which all ranks get the least: a number and its opposite are so if all ranks have the same.

    `replay` is of the first rank of each node, the last ten are rank 0's; they are MOST on the others.
    """

    weights: int
    minus_weights: int
    job: int
    minus_job: int
    replay: int
    minus_replay: int
    has_gpu: int
    minus_has_gpu: int
    is_fast: int
    num_journals: int
    digest_0: int
    digest_1: int
    digest_2: int
    digest_3: int
    num_requests: int
    num_chats: int
    top_logprobs: int
    num_replays: int
    has_more: int


def open_inputs(read_job: Callable[[], Job], world: World, *, strict: bool) -> Inputs:
    """Read the job and open its weights; on rank 0, also read the prompts and lock the output. Begins the logs.

    Collective, blocks. A MoempiError of any rank ends all ranks, and so does another run that holds the output, or
    ranks that read different weights.
    """
    world.alive(phases.INPUTS)
    is_first, num = world.rank == 0, len(_Agreed._fields)

    def open_all() -> tuple[_Opened, Sequence[int]]:
        job = read_job()
        world.watch(job.run.timeout_s)
        weights = WeightFile.open(job.model.weights, whole=world.local_rank == 0)
        number, num_gpus = int(weights.fingerprint[:15], 16), count_gpus(job.run)
        of_job = _number(msgspec.json.encode(result_keys(job)))
        replay = [MOST, MOST]
        if job.replay.routing and world.local_rank == 0:
            routing = _number(digest_file(job.replay.routing).encode())
            replay = [routing, -routing]
        numbers = [number, -number, of_job, -of_job, *replay, num_gpus > 0, -(num_gpus > 0), has_fast_products(job.run)]
        file, prompts, lock = None, PromptSpool(PromptCodec(job.sampling), ""), None
        if is_first:
            state = file_state(job.input.prompts)
            file, prompts = _read_prompts(job, weights.architecture, world, strict=strict)
            counts = file.counts
            digest = struct.unpack("<4I", bytes.fromhex(_digest_inputs(job, counts.replay_files)))
            if file_state(job.input.prompts) != state:
                raise DataError(f"{job.input.prompts}: changed while it was read; start the run again")
            if weights.tokenizer:
                check_tokenizer(weights.tokenizer, origin=str(weights.path))  # before other ranks read it
            lock = _take_output(job.output.results)
            num_journals = len(journal_paths(job.output.results))
            numbers += [num_journals, *digest, counts.requests, counts.chats, counts.top_logprobs, counts.replays]
            numbers.append(not file.is_read)
        log_to_files(job.output.results, world.rank)
        return _Opened(job, weights, file, prompts, lock, num_gpus), [*numbers, *[MOST] * (num - len(numbers))]

    (job, weights, file, prompts, lock, num_gpus), least = world.collectively_least(open_all, num=num)
    agreed = _Agreed(*least)
    _require_equal(agreed, job, weights, world)
    job = with_products(job, is_fast=bool(agreed.is_fast), world=world)
    backend: Backend = "cupy" if agreed.has_gpu else "auto" if agreed.minus_has_gpu else "numpy"
    counts = PromptCounts() if file is None else file.counts
    counts.requests, counts.chats, counts.top_logprobs, counts.replays = agreed[-5:-1]
    resolved = msgspec.structs.replace(job, run=msgspec.structs.replace(job.run, backend=backend))
    digest = struct.pack("<4I", agreed.digest_0, agreed.digest_1, agreed.digest_2, agreed.digest_3).hex()
    return Inputs(
        job=job,
        weights=weights,
        file=file,
        prompts=prompts,
        counts=counts,
        has_more=bool(agreed.has_more),
        fingerprint=run_fingerprint(resolved, weights=weights.fingerprint, inputs=digest),
        lock=lock,
        num_gpus=num_gpus,
        has_gpus=bool(agreed.has_gpu),
        has_journals=agreed.num_journals > 0,
    )


def _read_prompts(
    job: Job, architecture: Architecture, world: World, *, strict: bool
) -> tuple[PromptFile, PromptSpool]:
    """The prompt file, and its first prompts: all if the job can be refused for one of them."""

    def on_block() -> None:
        world.alive(world.where)

    with LineFiles(job, architecture, on_block=on_block) as files:
        file = PromptFile(
            job.input.prompts,
            sampling=job.sampling,
            strict=strict,
            folder=Path(job.output.results).parent,
            column=job.input.column,
            check=files.check,
            on_block=on_block,
        )
        whole = strict or job.trace.statistics or job.replay.routing or recorded_bytes(job, architecture)
        prompts = file.read(None if whole else job.input.ahead or None)
    if job.trace.statistics and (num_groups := len(file.counts.groups)) > MAX_GROUPS:
        raise DataError(f"{job.input.prompts}: has {num_groups} groups; trace.statistics sums up at most {MAX_GROUPS}")
    file.check = _without_replay
    return file, prompts


def _without_replay(prompt: Prompt) -> Prompt:
    """The prompt; with an error if it names a file of routing, which is opened before the first step."""
    if prompt.replay is None:
        return prompt
    error = "replay: no line of the first portion has one; input.ahead = 0 reads all first"
    return structs.replace(prompt, text=None, tokens=None, chat=None, replay=None, error=error)


def _digest_inputs(job: Job, names: Iterable[str]) -> str:
    """The digest of the prompts, and of the routing that is replayed, if there is any, also files of these `names`."""
    digests = digest_file(job.input.prompts)
    of_job = [job.replay.routing] if job.replay.routing else []
    for path in (*of_job, *(line_file(job, name) for name in names)):
        digests = blake2b(f"{digests}{digest_file(path)}".encode(), digest_size=16).hexdigest()
    return digests


def run_fingerprint(job: Job, *, weights: str, inputs: str) -> str:
    """Digest of everything that the results depend on: digests of weights and inputs, and the job's `result_keys`.

    The backend of `job` is the one that "auto" selects, "auto" if ranks differ.
    """
    return blake2b(msgspec.json.encode((weights, inputs, result_keys(job))), digest_size=16).hexdigest()


def _take_output(results: str) -> OutputLock:
    """Lock the output and remove the hidden files that a killed run left beside it."""
    lock = OutputLock(results)
    remove_hidden(results)
    remove_hidden(state_path(results))
    return lock


def _number(content: bytes) -> int:
    """60 bits of a digest."""
    return int(blake2b(content, digest_size=16).hexdigest()[:15], 16)


def _require_equal(agreed: _Agreed, job: Job, weights: WeightFile, world: World) -> None:
    """End all ranks if they read different files; collective if they do."""
    if agreed.job != -agreed.minus_job:
        world.raise_together(DataError("the ranks read different jobs: is the job file the same on every node?"))
    if job.replay.routing and agreed.replay != -agreed.minus_replay:
        problem = f"{job.replay.routing}: the nodes have different routing: is the file the same on every node?"
        world.raise_together(DataError(problem))
    if agreed.weights != -agreed.minus_weights:
        differs = weights.fingerprint != world.comm.bcast(weights.fingerprint)
        problem = f"{weights.path}: this rank reads other weights than rank 0: is the file the same on every node?"
        world.raise_together(DataError(problem) if differs else None)
