"""A model that a Python script loads once, on one process or on the ranks of mpirun, and calls many times."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain
from tempfile import gettempdir
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import structs

from moempi.api.results import Generated, Scored, generated, scored, with_likeliest
from moempi.api.sampling_params import SamplingParams
from moempi.backend.select import count_gpus, has_fast_products
from moempi.config.architecture import Architecture
from moempi.config.job import Job, ScoreSection
from moempi.config.settings import read_settings
from moempi.engine.admitted import admit
from moempi.engine.chat import ChatRenderer, template_day
from moempi.engine.deployment import deploy, with_products
from moempi.engine.engine import Engine, load_engine, make_task
from moempi.engine.group_chats import GroupChats
from moempi.engine.recorder import Recorder
from moempi.engine.sampling_defaults import with_sampling_defaults
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError, UsageError
from moempi.layout.memory import pages_for
from moempi.observe.progress import Progress
from moempi.runtime.script_world import script_world
from moempi.runtime.stop import Stop
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.closeable import Closeable
from moempi.storage.prompt_file import PromptCounts
from moempi.storage.prompt_spool import PromptCodec, PromptSpool
from moempi.storage.prompts import Chat, make_prompts
from moempi.storage.prompts import Prompt as PromptLine
from moempi.storage.records import Record, RequestRecord
from moempi.storage.tokenizer_check import check_tokenizer
from moempi.storage.weights import WeightFile

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Mapping[str, Any]
"""A text, tokens, or an object with the keys of a prompt line (jobs/README.md)."""
Message = Mapping[str, Any]

START_LIMIT_S = 300.0
"""Seconds without progress until the settings are known."""


class LLM(Closeable):
    """A model on this process, or on all ranks under `mpirun -n N python SCRIPT`; it runs what `moempi run` runs.

    `settings` are keys of a job file by their last name, as `stages=2` or `precision="float32"`, or sections, as
    `placement={"file": "placement.json"}`; files are relative to the current folder. `rank` is this process's number.

    Every method is collective, and so is making an LLM: all ranks make the same calls with the same arguments, which is
    checked. Every rank gets all results, so that a script continues alike on all of them. A request that cannot be
    computed has an error in its result. An error of a call is raised on all ranks; any other exception of one rank that
    nothing catches ends all ranks. On several ranks, make an LLM on the main thread.

    Raises ConfigError for settings that are wrong or do not fit the ranks, NoInputError or DataError for the weight
    file, UsageError if ranks make different calls.
    """

    def __init__(self, weights: str | os.PathLike[str], **settings: Any) -> None:
        self._engine: Engine | None = None
        self._renderer: ChatRenderer | None = None
        self._world = world = script_world()
        path = os.fspath(weights)
        with world.call(f"LLM({path!r}, {settings})", timeout_s=START_LIMIT_S):
            job, given = world.collectively(lambda: read_settings(path, settings))
            self._job = job = world.collectively(lambda: with_sampling_defaults(job, given=given))
            world.watch(job.run.timeout_s)
            start = datetime.fromisoformat(world.comm.bcast(datetime.now().isoformat()))
            today = world.collectively(lambda: template_day(job.chat, start))
            with world.collectively(lambda: WeightFile.open(path, whole=world.local_rank == 0)) as file:
                world.require_same_call(f"LLM of the weights {file.fingerprint}")
                self._engine = _load(job, file)
        self.rank = world.rank
        self.architecture: Architecture = file.architecture
        self.tokenizer: TextTokenizer = self._engine.deployment.tokenizer
        self.chat_templates: ChatTemplates | None = file.chat
        self.fingerprint = file.fingerprint
        if file.chat is not None:
            self._renderer = ChatRenderer(file.chat, self.tokenizer, section=job.chat, today=today)

    def generate(self, prompts: Iterable[Prompt], sampling: SamplingParams | None = None) -> list[Generated]:
        """Continue each prompt; the results are in the order of the prompts, samples of one prompt follow each other.

        Keys of `sampling` that a prompt has itself are its own.
        """
        return [generated(record) for record in self._run("generate", _rows(prompts), self._with(sampling))]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generated]:
        """Continue one conversation, a list of messages, or each of a list of conversations, by the chat template."""
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        more = {"tools": tools, "chat_template_kwargs": template_kwargs}
        rows = [{"messages": chat, **more} for chat in ([conversations] if is_one else conversations)]
        return [generated(record) for record in self._run("chat", rows, self._with(sampling))]

    def score(self, prompts: Iterable[Prompt], *, top_n: int | None = None) -> list[Scored]:
        """The log-probability of each token of each prompt, with the `top_n` likeliest tokens there.

        `top_n` is the LLM's setting if it is not given.
        """
        section = self._job.score if top_n is None else ScoreSection(top_n)
        job = msgspec.structs.replace(self._job, task="score", score=section)
        return [scored(record, top_n=section.top_n) for record in self._run("score", _rows(prompts), job)]

    def chat_text(self, messages: Sequence[Message], *, template_kwargs: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation by the chat template, for a prompt of text. Not collective; blocks.

        Raises DataError if there is no template, or if it fails.
        """
        if self._renderer is None:
            raise DataError("the weight file holds no chat template")
        chat = Chat([dict(message) for message in messages], None, dict(template_kwargs or {}))
        found = self._renderer.render(msgspec.json.encode(chat))
        if found.error:
            raise DataError(found.error)
        return self.tokenizer.unquote(found.text)

    def close(self) -> None:
        """Free the weights, the cache and the communicators; later calls raise UsageError. May be called again."""
        if self._engine is not None:
            with self._world.call("close", timeout_s=self._job.run.timeout_s):
                self._engine.free()
        self._drop()

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self.close()
        self._drop()  # after an exception of this rank alone, the others would not close

    def _drop(self) -> None:
        self._engine = None
        if self._renderer is not None:
            self._renderer.close()

    def _with(self, sampling: SamplingParams | None) -> Job:
        given = sampling or SamplingParams()
        return msgspec.structs.replace(self._job, sampling=given.applied_to(self._job.sampling))

    def _run(self, name: str, rows: list[dict[str, Any]], job: Job) -> list[RequestRecord]:
        """Run the requests that `rows` with the keys of prompt lines make; all records in order. Collective, blocks."""
        if self._engine is None:
            raise UsageError(f"{name}: this LLM is closed")
        with np.printoptions(threshold=sys.maxsize):
            digest = xxhash.xxh3_128_hexdigest(repr((job, rows)).encode("utf-8", "surrogatepass"))
        with self._world.call(f"{name} of {len(rows)} prompts (digest {digest})", timeout_s=job.run.timeout_s):
            try:
                return _compute(self._engine, rows, job)
            except BaseException:
                self._drop()  # its queue and its cache may hold parts of the call
                raise


def _load(job: Job, weights: WeightFile) -> Engine:
    """The engine, with a cache for as many sequences of all positions as it computes at a time; collective, blocks."""
    world = script_world()

    def check() -> tuple[int, Sequence[int]]:
        if weights.tokenizer and world.rank == 0:
            check_tokenizer(weights.tokenizer, origin=str(weights.path))  # before other ranks read it
        num_gpus = count_gpus(job.run)
        return num_gpus, [num_gpus, has_fast_products(job.run)]

    num_gpus, (fewest_gpus, is_fast) = world.collectively_least(check, num=2)
    job = with_products(job, is_fast=bool(is_fast), world=world)
    deployment = deploy(job, world, weights, num_gpus=num_gpus, has_gpus=fewest_gpus > 0, text_everywhere=True)
    useful = len(deployment.slots) * pages_for(weights.architecture.max_positions)
    _, pages = deployment.with_cache_pages(lambda: (None, useful))
    idle = Recorder([], task=job.task, writes_records=False, on_progress=lambda counts: None)
    engine = load_engine(deployment, idle, Stop(), pages=pages, progress=Progress(0, enabled=False))
    if engine is None:
        raise RuntimeError("the loading was stopped, which nothing requests")
    return engine


def _compute(engine: Engine, rows: list[dict[str, Any]], job: Job) -> list[RequestRecord]:
    """The records of all requests, on every rank in order; collective, blocks."""
    deployment, records = engine.deployment, list[Record]()
    prompts = [_without_replay(prompt) for prompt in make_prompts(rows, sampling=job.sampling)]
    counts, codec = PromptCounts(), PromptCodec(job.sampling)
    counts.add(prompts)
    chats = GroupChats(deployment) if counts.chats else None
    with admit(
        [deployment.own(prompts)],
        deployment,
        task=job.task,
        chats=chats,
        spool=lambda: PromptSpool(codec, gettempdir()),
    ) as admitted:
        if chats is not None:
            chats.free()
        deployment.world.collectively(admitted.require_whole)
        writes_records = deployment.rank_layout.writes_records
        recorder = Recorder(records, task=job.task, writes_records=writes_records, on_progress=lambda counts: None)
        recorder.record(admitted.take_refused())
        recorder.record(admitted.too_long(engine.pages))
        engine.submit(admitted)
        engine.run(make_task(job, deployment.tokenizer, top=counts.top_logprobs), recorder)
    of_ranks: list[list[Record]] = deployment.world.comm.allgather(records)
    return with_likeliest(chain.from_iterable(of_ranks))


def _without_replay(prompt: PromptLine) -> PromptLine:
    """The prompt; with an error if it names a file of routing, which only a job reads."""
    if prompt.replay is None:
        return prompt
    error = "replay: only a job replays routing"
    return structs.replace(prompt, text=None, tokens=None, chat=None, replay=None, error=error)


def _rows(prompts: Iterable[Prompt]) -> list[dict[str, Any]]:
    """The prompts with the keys of prompt lines; what is no prompt becomes the error of its request."""
    return [_row(prompt) for prompt in ([prompts] if isinstance(prompts, (str, Mapping)) else prompts)]


def _row(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    is_tokens = isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, str)
    return {"tokens": list(prompt)} if is_tokens else {"prompt": prompt}
