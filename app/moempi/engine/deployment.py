"""The deployment of a job on the ranks, before its model is loaded: backends, layout, tokenizer."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.backend.select import make_backend
from moempi.comm.device_memory import takes_device_memory
from moempi.comm.transfers import PendingTransfers
from moempi.config.job import Job
from moempi.engine import phases
from moempi.engine.admission import make_request
from moempi.engine.chat import ChatText
from moempi.engine.rank_layout import RankLayout, available_bytes, find_ranks, rank_layout_on, rank_threads
from moempi.engine.request import Request
from moempi.engine.tokenizer import TextTokenizer
from moempi.layout.memory import affordable_pages
from moempi.runtime.world import World
from moempi.storage.prompts import Prompt
from moempi.storage.weights import WeightFile

log = logging.getLogger(__name__)
T = TypeVar("T")


class Deployment(Struct, frozen=True):
    """A job on the ranks of `world`, on one of them: its `backend`, and its `rank_layout` among all ranks.

    `pending` are the transfers that the backend progresses.
    """

    job: Job
    world: World
    weights: WeightFile
    backend: Backend
    pending: PendingTransfers
    rank_layout: RankLayout
    tokenizer: TextTokenizer

    @property
    def slots(self) -> range:
        """The KV slots of this rank's group; none beyond the first stage."""
        coords = self.rank_layout.coords
        return self.rank_layout.grid.slots(0, coords.data) if self.rank_layout.is_first_stage else range(0)

    def own(self, everything: Sequence[T]) -> Sequence[T]:
        """The share of this rank's data parallel group; nothing beyond the first stage."""
        if not self.rank_layout.is_first_stage:
            return everything[:0]
        return everything[self.rank_layout.coords.data :: self.rank_layout.grid.num_groups(0)]

    def make_request(self, prompt: Prompt, *, task: str, chat: ChatText | None = None) -> Request:
        """The request of a prompt, which has failed if the model cannot compute it; `chat` is the text of a chat."""
        return make_request(prompt, self.tokenizer, self.weights.architecture, task=task, chat=chat)

    def with_cache_pages(self, action: Callable[[], tuple[T, int]]) -> tuple[T, int]:
        """What `action` returns, with the cache pages of each group in the place of the pages that are useful to it.

        They are as many as are useful to any group of the first stage and every rank can allocate. A MoempiError of any
        rank ends all ranks. Collective, blocks.
        """
        available = available_bytes(self.job.topology, self.world, self.backend)

        def act() -> tuple[T, Sequence[int]]:
            value, useful = action()
            affordable = affordable_pages(self.job.run, self.rank_layout.memory, available=available)
            return value, (affordable, -useful)

        value, (affordable, useful) = self.world.collectively_least(act, num=2)
        return value, min(affordable, -useful)


def deploy(
    job: Job,
    world: World,
    weights: WeightFile,
    *,
    num_gpus: int,
    has_gpus: bool,
    text_everywhere: bool = False,
) -> Deployment:
    """Deploy a job on the ranks of `world`; collective, blocks. A MoempiError of any rank ends all ranks.

    `num_gpus` is the number of GPUs of this node that the job can use, `has_gpus` whether every node has some. Ranks
    beyond the first stage, which see no text, get the tokenizer only with `text_everywhere`.
    """
    world.alive(phases.LAYOUT)
    pending = PendingTransfers()
    device_buffers = takes_device_memory(job.exchange, world, has_gpu=True) if has_gpus else False
    threads = rank_threads(job.run, world)
    topology, ranks = find_ranks(job, world, on_gpu=num_gpus > 0)

    def deploy_rank() -> Deployment:
        backend = make_backend(
            job.run,
            local_rank=world.local_rank,
            device_buffers=device_buffers,
            threads=threads,
            progress=pending.progress,
        )
        on_gpu = backend.name == "cupy"
        rank_layout = rank_layout_on(ranks, topology, job, weights.architecture, on_gpu=on_gpu, widened=backend.widened)
        text = weights.tokenizer if rank_layout.is_first_stage or text_everywhere else ""
        tokenizer = _read_tokenizer(job, weights, text)
        return Deployment(job, world, weights, backend, pending, rank_layout, tokenizer)

    return world.collectively(deploy_rank)


def with_products(job: Job, *, is_fast: bool, world: World) -> Job:
    """The job with exact products, unless `is_fast`, whether all ranks have fast ones; rank 0 warns of a difference."""
    if is_fast or job.run.products == "exact":
        return job
    if world.rank == 0:
        log.warning(
            'run.products = "fast": products are not fast, which takes bfloat16, and on all ranks a CPU with AMX-BF16 '
            "that the system lets them use, no GPU, and a C compiler that knows AMX"
        )
    return msgspec.structs.replace(job, run=msgspec.structs.replace(job.run, products="exact"))


def _read_tokenizer(job: Job, weights: WeightFile, text: str) -> TextTokenizer:
    return TextTokenizer(
        text,
        eos_tokens=weights.architecture.eos_tokens,
        origin=str(weights.path),
        reads_special=job.input.special_tokens,
        writes_special=job.output.special_tokens,
    )
