"""A file of prompts, whose requests are read a portion at a time, and what is counted of them."""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moempi.config.job import Sampling
from moempi.errors import DataError
from moempi.storage.closeable import Closeable
from moempi.storage.files import file_state
from moempi.storage.prompt_form import find_form
from moempi.storage.prompt_spool import PromptCodec, PromptSpool
from moempi.storage.prompts import Check, Prompt, accept, find_prompts
from moempi.storage.repeated import RepeatedDigests


@dataclass(slots=True)
class PromptCounts:
    """Numbers of requests, and of the texts, chats, errors and replays of an own file among them.

    `top_logprobs` is the largest number of likeliest tokens that a request asks for, `groups` the names of groups of
    prompts, None for prompts without one, `replay_files` the files that replays name, each once.
    """

    requests: int = 0
    texts: int = 0
    chats: int = 0
    refused: int = 0
    top_logprobs: int = 0
    groups: set[str | None] = field(default_factory=set)
    replays: int = 0
    replay_files: dict[str, None] = field(default_factory=dict)

    def add(self, prompts: Collection[Prompt]) -> None:
        """Count prompts."""
        self.requests += len(prompts)
        for prompt in prompts:
            if prompt.text is not None:
                self.texts += 1
            if prompt.chat is not None:
                self.chats += 1
            if prompt.error:
                self.refused += 1
            if prompt.sampling.top_logprobs > self.top_logprobs:
                self.top_logprobs = prompt.sampling.top_logprobs
            if prompt.group not in self.groups:
                self.groups.add(prompt.group)
            if prompt.replay is not None:
                self.replays += 1
                self.replay_files[prompt.replay] = None

    def merge(self, other: "PromptCounts") -> None:
        """Add the counts of other prompts."""
        self.requests += other.requests
        self.texts += other.texts
        self.chats += other.chats
        self.refused += other.refused
        self.top_logprobs = max(self.top_logprobs, other.top_logprobs)
        self.groups |= other.groups
        self.replays += other.replays
        self.replay_files |= other.replay_files


class PromptFile(Closeable):
    """The requests of a file of any form of `find_form`, in order; a line may override `sampling`.

    A prompt with `n` samples becomes n requests; the id of sample i > 0 is that of the prompt, "#" and i. A bad line,
    or a line with the id of an earlier one, becomes a `Prompt` with an error that names file and line, and `check` may
    give any prompt an error; if `strict`, DataError is raised instead. `counts` are of the requests that `read` has
    returned, `is_read` is whether these are all. Memory holds 8 bytes of each, more of repeated ids, groups and
    replayed files, and up to 32 MiB of a portion, of which `folder` takes the rest. Calls `on_block` every few
    requests. Raises NoInputError or DataError as `find_form` does.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sampling: Sampling,
        strict: bool,
        folder: str | Path,
        column: str = "",
        check: Check = accept,
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts = PromptCounts()
        self.is_read = False
        self.check = check
        self._path = path
        self._sampling = sampling
        self._strict = strict
        self._folder = folder
        self._column = column
        self._on_block = on_block
        self._state = file_state(path)
        self._form = find_form(path, column=column)
        self._digests = RepeatedDigests()
        self._knows_repeated = False
        """Whether the digests are of the ids of the whole file."""
        self._blocks = self._find(())

    def read(self, at_least: int | None = None) -> PromptSpool:
        """The next requests, `at_least` as many if there are, or all; all if one of them replays a file.

        The file is read twice again at the first id that is repeated. Raises NoInputError if it cannot be read,
        StorageError if the folder cannot be written, DataError if the file has no requests or not the format in
        jobs/README.md, or changed since it was opened.
        """
        try:
            spool, counts = self._read(at_least)
        except DataError:
            if self._digests.found():  # an earlier line may repeat an id
                self._blocks = self._find(self._digests.found())
                self._read(at_least)
            raise
        if not self._knows_repeated and self._digests.found():
            spool.close()
            self._find_repeated()
            spool, counts = self._read(at_least)
        self.counts.merge(counts)
        if not self.counts.requests:
            raise DataError(f"{self._path}: has no prompts")
        return spool

    def found(self) -> str:
        """What has been found in the file, in one line; the file may have been removed meanwhile."""
        so_far = "" if self.is_read else " so far"
        refused = f", {self.counts.refused} of them refused" if self.counts.refused else ""
        return f"{self._path}: {self.counts.requests} requests{so_far}{refused}, {self._form}"

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()

    def _read(self, at_least: int | None) -> tuple[PromptSpool, PromptCounts]:
        spool, counts = PromptSpool(PromptCodec(self._sampling), self._folder), PromptCounts()
        while at_least is None or counts.requests < at_least or counts.replays:
            prompts = next(self._blocks, None)
            if prompts is None:
                self.is_read = True
                break
            self._add_ids(prompts)
            for prompt in prompts:
                if prompt.error and self._strict:
                    raise DataError(prompt.error)
                spool.append(prompt)
            counts.add(prompts)
        self._require_unchanged()
        return spool, counts

    def _add_ids(self, prompts: Sequence[Prompt]) -> None:
        if not self._knows_repeated:
            self._digests.add(prompt.id for prompt in prompts)

    def _find_repeated(self) -> None:
        """Find the repeated ids of the whole file, and go back to the first request that has not been returned."""
        for prompts in self._blocks:
            self._add_ids(prompts)
        if file_state(self._path) != self._state:  # of a file in its place, the requests may be others
            self._raise_changed()
        self._knows_repeated, self.is_read = True, False
        self._blocks = self._find(self._digests.found())

    def _find(self, repeated: Collection[int]) -> Generator[list[Prompt]]:
        """The requests that have not been returned, a few in memory at a time."""
        found = find_prompts(
            self._path,
            sampling=self._sampling,
            column=self._column,
            repeated=repeated,
            check=self._check,
        )
        first = self.counts.requests
        for prompts in found:
            self._on_block()  # also while the returned ones are read again
            if own := [prompt for prompt in prompts if prompt.index >= first]:
                yield own

    def _check(self, prompt: Prompt) -> Prompt:
        """What `check` does when the prompt is read."""
        return self.check(prompt)

    def _require_unchanged(self) -> None:
        """Raise DataError if what is read has changed; another file in its place is not read."""
        state = file_state(self._path)
        if state[:2] == self._state[:2] and state != self._state:
            self._raise_changed()

    def _raise_changed(self) -> None:
        raise DataError(f"{self._path}: changed while it is read; restore it and start the run again")


def read_prompts(path: str | Path, **options: Any) -> tuple[PromptSpool, PromptCounts]:
    """All requests of a file, and their counts, with the options of `PromptFile`."""
    with PromptFile(path, **options) as file:
        return file.read(), file.counts
