"""The deployment of a job on the ranks, before its model is loaded: backends, layout, tokenizer, and the requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from moempi.backend.protocol import Backend
from moempi.backend.select import count_gpus, make_backend
from moempi.comm.device_memory import takes_device_memory
from moempi.comm.transfers import PendingTransfers
from moempi.config.job import Job
from moempi.engine.admission import make_requests
from moempi.engine.chat import ChatText, render_chats, template_day
from moempi.engine.rank_layout import RankLayout, available_bytes, lay_out_rank, rank_threads
from moempi.engine.request import Request
from moempi.engine.tokenizer import TextTokenizer
from moempi.layout.memory import affordable_pages
from moempi.runtime.world import World
from moempi.storage.prompts import Prompt
from moempi.storage.tokenizer_check import check_tokenizer
from moempi.storage.weights import WeightFile

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deployment:
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

    def make_requests(self, own: Sequence[Prompt], *, task: str) -> list[Request]:
        """The requests of this rank's group for its `own` prompts; the ones that cannot be computed have failed.

        The group's first rank renders their chats, so that all have the same. Collective.
        """
        chats: dict[int, ChatText] = {}
        if self.world.comm.allreduce(any(prompt.chat is not None for prompt in own), max):
            chats = self._render_chats(own)
        return make_requests(own, self.tokenizer, self.weights.architecture, task=task, chats=chats)

    def cache_pages(self, useful: int) -> int:
        """Cache pages of each group of the first stage: as many as are `useful` to it and every rank can allocate.

        `useful` is 0 beyond the first stage. Collective.
        """
        job, world, memory = self.job, self.world, self.rank_layout.memory
        available = available_bytes(job.topology, world, self.backend)
        affordable = world.collectively(lambda: affordable_pages(job.run, memory, available=available))
        pages: int = min(world.comm.allreduce(affordable, min), world.comm.allreduce(useful, max))
        return pages

    def _render_chats(self, own: Sequence[Prompt]) -> dict[int, ChatText]:
        world, coords, section = self.world, self.rank_layout.coords, self.job.chat
        start = datetime.fromisoformat(world.comm.bcast(datetime.now().isoformat()))
        today = world.collectively(lambda: template_day(section, start))
        chats = world.collectively(
            lambda: render_chats(
                own if coords.tensor == 0 else [],
                self.weights.chat,
                self.tokenizer,
                section=section,
                today=today,
                on_chat=lambda: world.alive(world.where),
            )
        )
        group = self.rank_layout.ranks.Split(coords.data if coords.stage == 0 else world.size, coords.tensor)
        of_group: dict[int, ChatText] = group.bcast(chats)
        group.Free()
        return of_group


def deploy(job: Job, world: World, weights: WeightFile) -> Deployment:
    """Deploy a job on the ranks of `world`; collective, blocks. A MoempiError of any rank ends all ranks."""
    backend, pending = _backend(job, world)
    on_gpu = backend.name == "cupy"
    rank_layout = lay_out_rank(job, world, weights.architecture, on_gpu=on_gpu, widened=backend.widened)
    tokenizer = _tokenizer(job, world, weights)
    return Deployment(job, world, weights, backend, pending, rank_layout, tokenizer)


def _backend(job: Job, world: World) -> tuple[Backend, PendingTransfers]:
    """This rank's backend, and the transfers that it progresses; collective, blocks.

    All ranks have comm buffers in device memory, or all on the host.
    """
    pending = PendingTransfers()
    gpus = world.collectively(lambda: count_gpus(job.run))
    device_buffers = takes_device_memory(job.exchange, world, has_gpu=gpus > 0)
    threads = rank_threads(job.run, world)
    backend = world.collectively(
        lambda: make_backend(
            job.run,
            local_rank=world.local_rank,
            device_buffers=device_buffers,
            threads=threads,
            progress=pending.progress,
        )
    )
    return backend, pending


def _tokenizer(job: Job, world: World, weights: WeightFile) -> TextTokenizer:
    """The tokenizer of the weight file; collective. Rank 0 first checks that it does not end the process."""
    text, origin = weights.tokenizer, str(weights.path)
    world.collectively(lambda: check_tokenizer(text, origin=origin) if text and world.rank == 0 else None)
    return world.collectively(
        lambda: TextTokenizer(
            text,
            eos_tokens=weights.architecture.eos_tokens,
            origin=origin,
            reads_special=job.input.special_tokens,
            writes_special=job.output.special_tokens,
        )
    )
