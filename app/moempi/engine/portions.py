"""The requests of a job, of which a portion of the prompts is read and admitted at a time."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moempi.engine import phases
from moempi.engine.admitted import AdmittedRequests, admit
from moempi.engine.deployment import Deployment
from moempi.engine.group_chats import GroupChats
from moempi.engine.inputs import Inputs
from moempi.engine.kv_budget import useful_pages
from moempi.engine.request import Request
from moempi.engine.restart import Attempt
from moempi.engine.shares import scatter_prompts
from moempi.layout.memory import pages_for
from moempi.printing import print_error
from moempi.runtime.world import MOST
from moempi.storage.closeable import Closeable
from moempi.storage.prompt_spool import PromptCodec, PromptSpool
from moempi.storage.prompts import Prompt

PER_SLOT = 4
"""Requests of a portion for each slot, at least: the ranks pause after three fourths of them at the earliest."""


class Portions(Closeable):
    """The requests of this rank's data parallel group that earlier attempts have not finished, a portion at a time.

    The portions so far have `num_requests` requests of all groups, which ask for at most `top_logprobs` likeliest
    tokens; `has_more` is whether others are left. All ranks agree on these. Chats have the day on which the first of
    them was read.
    """

    def __init__(self, inputs: Inputs, deployment: Deployment, attempt: Attempt) -> None:
        self.num_requests = inputs.counts.requests
        self.has_more = inputs.has_more
        self.top_logprobs = inputs.counts.top_logprobs
        self._inputs = inputs
        self._deployment = deployment
        self._attempt = attempt
        self._chats: GroupChats | None = None
        self._codec = PromptCodec(deployment.job.sampling)
        self._spool = partial(PromptSpool, self._codec, Path(deployment.job.output.results).parent)
        self._too_long = AdmittedRequests(partial(deployment.make_request, task=deployment.job.task), self._spool)

    def admit_first(self) -> tuple[AdmittedRequests, int]:
        """Admit the prompts that have been read with the inputs; with them the cache pages that are useful.

        Collective, blocks. What fails is kept: see `AdmittedRequests.require_whole`.
        """
        slots, positions = len(self._deployment.slots), self._inputs.weights.architecture.max_positions
        admitted = self._admit(self._inputs.prompts, num_chats=self._inputs.counts.chats)
        useful = useful_pages(admitted.pages, slots=slots)
        return admitted, slots * pages_for(positions) if self.has_more else useful

    def admit_next(self) -> AdmittedRequests:
        """Read and admit the next portion; collective, blocks. A MoempiError of any rank ends all ranks."""
        world = self._deployment.world
        world.alive(phases.INPUTS)
        prompts, numbers = world.collectively_least(self._read, num=4)
        self.num_requests, has_more, num_chats, self.top_logprobs = numbers
        self.has_more = bool(has_more)
        world.collectively(lambda: self._attempt.expect(self.num_requests, has_more=self.has_more))
        with prompts:
            admitted = self._admit(prompts, num_chats=num_chats)
        world.collectively(admitted.require_whole)
        return admitted

    def hold_too_long(self, admitted: AdmittedRequests, pages: int) -> None:
        """Keep the requests of a portion that need more than `pages` pages of cache."""
        for request in admitted.too_long(pages):
            self._too_long.add_piece([request.prompt])
        self._too_long.require_whole()

    def too_long(self, pages: int) -> Iterator[Request]:
        """The requests that were kept, which need more than `pages` pages of cache; each has failed."""
        return self._too_long.too_long(pages)

    def close(self) -> None:
        """Close the prompt file, and remove the requests that were kept; collective, blocks."""
        if self._inputs.file is not None:
            self._inputs.file.close()
        self._too_long.close()
        if self._chats is not None:
            self._chats.free()

    def _admit(self, prompts: PromptSpool, *, num_chats: int) -> AdmittedRequests:
        """The requests of this rank's group from the prompts of rank 0, of which `num_chats` are chats."""
        deployment = self._deployment
        if num_chats and self._chats is None:
            self._chats = GroupChats(deployment)
        chats = self._chats if num_chats else None
        shares = scatter_prompts(self._unfinished(prompts), self._codec, deployment.world, deployment.rank_layout)
        return admit(shares, deployment, task=deployment.job.task, chats=chats, spool=self._spool)

    def _read(self) -> tuple[PromptSpool, Sequence[int]]:
        """The next portion, on rank 0, and what the other ranks have to know of it."""
        file, job, grid = self._inputs.file, self._deployment.job, self._deployment.rank_layout.grid
        if file is None:
            return PromptSpool(self._codec, ""), [MOST] * 4
        slots = sum(len(grid.slots(0, group)) for group in range(grid.num_groups(0)))
        chats = file.counts.chats
        prompts, counts = file.read(max(job.input.ahead, PER_SLOT * slots)), file.counts
        if file.is_read:
            print_error(file.found())
        return prompts, [counts.requests, not file.is_read, counts.chats - chats, counts.top_logprobs]

    def _unfinished(self, prompts: PromptSpool) -> Iterator[Prompt]:
        """The prompts that earlier attempts did not finish; their indices are consecutive."""
        first = self._inputs.counts.requests - len(prompts)
        earlier = self._attempt.earlier.indices
        begin, end = np.searchsorted(earlier, [first, first + len(prompts)])
        is_finished = np.zeros(len(prompts), np.bool_)
        is_finished[earlier[begin:end] - first] = True
        finished = is_finished.tobytes()
        return (prompt for prompt in prompts if not finished[prompt.index - first])
