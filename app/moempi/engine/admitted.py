"""The requests of a data parallel group, of which a few MiB are in memory: they are made when they are needed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from msgspec import structs

from moempi.engine.admission import NO_CHATS
from moempi.engine.deployment import Deployment
from moempi.engine.group_chats import GroupChats
from moempi.engine.request import Request
from moempi.errors import MoempiError
from moempi.layout.memory import pages_for
from moempi.storage.closeable import Closeable
from moempi.storage.prompt_spool import PromptSpool
from moempi.storage.prompts import Prompt

WITHOUT_TEXT = b""
"""The place of a chat that has become tokens."""


class AdmittedRequests(Closeable):
    """The requests that can be computed and the ones that have failed, each in order, and the pages that they need.

    Memory holds up to 32 MiB of each. `make` makes the same request of the same prompt. Raises StorageError.
    """

    def __init__(self, make: Callable[..., Request], spool: Callable[[], PromptSpool]) -> None:
        self.pages: Counter[int] = Counter()
        """The number of requests that need as many pages."""
        self._make = make
        self._failure: MoempiError | None = None
        self._problems: dict[int, str] = {}
        self._to_compute, self._refused = spool(), spool()

    def __iter__(self) -> Iterator[Request]:
        """The requests that can be computed."""
        requests = map(self._make, self._to_compute)
        return requests if not self._problems else filter(lambda one: one.prompt.index not in self._problems, requests)

    def add_piece(self, piece: Sequence[Prompt], chats: GroupChats | None = None) -> None:
        """Add the requests of prompts; collective over the group if there are `chats`.

        A MoempiError is not raised but kept; nothing is added after it.
        """
        try:
            texts = chats.render(piece) if chats else NO_CHATS
            for prompt in () if self._failure else piece:
                self._add(self._make(prompt, chat=texts.get(prompt.index)))
        except MoempiError as error:
            self.fail(error)

    def fail(self, error: MoempiError) -> None:
        """Keep an error, if it is the first."""
        self._failure = self._failure or error

    def require_whole(self) -> None:
        """Raise the first error that was kept."""
        if self._failure is not None:
            raise self._failure

    def refuse(self, problem_of: Callable[[Request], str]) -> None:
        """Fail the requests that have a problem, one line."""
        for request in self:
            if problem := problem_of(request):
                self._problems[request.prompt.index] = problem
                self.pages[pages_for(request.capacity)] -= 1

    def take_refused(self) -> Iterator[Request]:
        """The requests that have failed; this removes them."""
        try:
            yield from map(self._make, self._refused)
        finally:
            self._refused.close()
        for request in map(self._make, self._to_compute if self._problems else ()):
            if problem := self._problems.get(request.prompt.index, ""):
                request.fail(problem)
                yield request

    def num_fitting(self, pages: int) -> int:
        """The number of requests that can be computed with `pages` pages of cache."""
        return sum(count for needed, count in self.pages.items() if needed <= pages)

    def take_fitting(self, pages: int) -> Iterator[Request]:
        """The requests that can be computed with `pages` pages of cache; this removes all that can be computed."""
        try:
            yield from filter(lambda request: pages_for(request.capacity) <= pages, self)  # holds no request
        finally:
            self._to_compute.close()

    def too_long(self, pages: int) -> Iterator[Request]:
        """The requests that can be computed, but not with `pages` pages of cache; each has failed."""
        if not any(needed > pages for needed in self.pages):
            return
        for request in self:
            if (needed := pages_for(request.capacity)) > pages:
                request.fail(
                    f"needs {needed} cache pages, the rank has {pages}; raise run.kv_memory or lower max_tokens"
                )
                yield request

    def close(self) -> None:
        """Remove all requests."""
        self._to_compute.close()
        self._refused.close()

    def _add(self, request: Request) -> None:
        if request.finish:
            self._refused.append(_as_tokens(request))
        else:
            self.pages[pages_for(request.capacity)] += 1
            self._to_compute.append(_as_tokens(request))


def admit(
    pieces: Iterable[Sequence[Prompt]],
    deployment: Deployment,
    *,
    task: str,
    chats: GroupChats | None,
    spool: Callable[[], PromptSpool],
) -> AdmittedRequests:
    """The requests of the prompts in `pieces`, which are the same on all ranks of a data parallel group.

    There are `chats` if a prompt of any group is a chat. All pieces are taken, whatever fails; see
    `AdmittedRequests.require_whole`. Collective, blocks.
    """
    admitted = AdmittedRequests(partial(deployment.make_request, task=task), spool)
    try:
        for piece in pieces:
            deployment.world.alive(deployment.world.where)
            admitted.add_piece(piece, chats)
    except MoempiError as error:
        admitted.fail(error)
    return admitted


def _as_tokens(request: Request) -> Prompt:
    """The prompt of a request, with tokens instead of a text or chat, of which the same request can be made.

    A prompt without tokens keeps its error.
    """
    prompt, has_tokens = request.prompt, len(request.prompt_tokens) > 0
    return structs.replace(
        prompt,
        text=None,
        tokens=request.prompt_tokens if has_tokens else None,
        error="" if has_tokens else request.error,
        chat=None if prompt.chat is None else WITHOUT_TEXT,
    )
