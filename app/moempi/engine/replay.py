"""Replay: a routing policy that gives rows the experts of a file, and counts them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from msgspec import structs

from moempi.arrays import Float32Array, IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.config.architecture import Architecture, Router
from moempi.config.job import Job
from moempi.engine.request import Request
from moempi.errors import DataError, MoempiError
from moempi.layout.layout import require_replayable
from moempi.model.router_balance import RoutingPolicy
from moempi.runtime.world import World
from moempi.storage.closeable import Closeable, close_all
from moempi.storage.files import digest_file
from moempi.storage.prompt_spool import PromptSpool
from moempi.storage.prompts import Prompt
from moempi.storage.replay_file import NOT_GIVEN, ReplayFile

MOST_FILES = 256
"""Files that the lines of a prompt file may name; all are open during a run."""


@dataclass(frozen=True, slots=True)
class Replay(Closeable):
    """The routing of `files` for the requests of a job: request i is `requests[i]`, a file and a request of it.

    Both are -1 if it has none. With `weights`, the weights of the experts are the files' too.
    """

    files: Sequence[ReplayFile]
    requests: IntArray
    weights: bool

    def problem_of(self, request: Request) -> str:
        """Why a request cannot replay its own file, which has more positions of it than the job may compute; else "".

        Raises DataError if the job's file has.
        """
        file, number = self.requests[request.prompt.index].tolist()
        positions = self.files[file].num_positions(number) if file >= 0 else 0
        if positions <= request.capacity:
            return ""
        problem = (
            f"{self.files[file].path}: request {request.prompt.id[:100]!r} has routing of {positions} positions, "
            f"the job computes at most {request.capacity}"
        )
        if request.prompt.replay is None:
            raise DataError(problem)
        return problem

    def close(self) -> None:
        """Close the files."""
        close_all(self.files)


class LineFiles(Closeable):
    """The files of routing that prompts name, from the folder of the prompt file; each is read once.

    Calls `on_block` as `ReplayFile.require_valid` does.
    """

    def __init__(self, job: Job, architecture: Architecture, *, on_block: Callable[[], object]) -> None:
        self._job = job
        self._architecture = architecture
        self._on_block = on_block
        self._files: dict[str, ReplayFile] = {}
        self._problems: dict[str, str] = {}

    def check(self, prompt: Prompt) -> Prompt:
        """The prompt; with an error if its file does not fit the model, the job or the prompt."""
        if prompt.replay is None or prompt.error:
            return prompt
        problem = self._problem_of(line_file(self._job, prompt.replay), prompt)
        if not problem:
            return structs.replace(prompt, replay=str(PurePath(prompt.replay)))
        return structs.replace(prompt, text=None, tokens=None, chat=None, replay=None, error=f"replay: {problem}")

    def close(self) -> None:
        """Close the files."""
        close_all(self._files.values())

    def _problem_of(self, path: str, prompt: Prompt) -> str:
        if path in self._problems:
            return self._problems[path]
        try:
            if path not in self._files:
                self._files[path] = self._open(path)
        except MoempiError as error:
            if len(self._problems) < MOST_FILES:
                self._problems[path] = str(error)
            return str(error)
        try:
            self._files[path].request_of(_names(prompt))
        except MoempiError as error:
            return str(error)
        return ""

    def _open(self, path: str) -> ReplayFile:
        """Open and read a file; raises NoInputError, DataError or ConfigError."""
        require_replayable(self._job, self._architecture, what=path)
        if len(self._files) == MOST_FILES:
            raise DataError(f"{path}: is one file more than {MOST_FILES}")
        with suppress(OSError):
            if Path(path).samefile(self._job.output.results):
                raise DataError(f"{path}: is the output of the job")
        file = ReplayFile(path, self._architecture)
        try:
            file.read_ids()
            if self._job.replay.weights and not file.has_weights:
                raise DataError(f"{path}: has no weights, which replay.weights requests")
            file.require_valid(weights=self._job.replay.weights, on_block=self._on_block)
        except BaseException:
            file.close()
            raise
        return file


def line_file(job: Job, name: str) -> str:
    """The path of a file that a prompt line names, from the folder of the prompt file."""
    return str(Path(job.input.prompts).parent / name)


def open_replay(
    job: Job, architecture: Architecture, world: World, prompts: PromptSpool, names: Iterable[str]
) -> Replay | None:
    """The routing that a job and its prompts are given; None if they are given none. Collective, blocks.

    Rank 0 has the `prompts`, which `LineFiles` has checked, and the `names` of files in them; it reads the job's whole
    file once, a block at a time. Ends all ranks with a NoInputError, or with a DataError if the file does not fit, or
    if nodes have different files of prompts.
    """
    section = job.replay
    of_job = [section.routing] if section.routing else []
    names = world.comm.bcast(list(names))
    paths = [*of_job, *(line_file(job, name) for name in names)]
    if not paths:
        return None

    def open_files() -> tuple[list[ReplayFile], IntArray | None]:
        files = [ReplayFile(path, architecture) for path in paths]
        if of_job and section.weights and not files[0].has_weights:
            raise DataError(f"{section.routing}: has no weights, which replay.weights requests")
        if world.rank > 0:
            return files, None
        for file in files:
            file.read_ids()
        requests = np.full((len(prompts), 2), -1, np.int64)
        if of_job:
            files[0].require_valid(weights=section.weights, on_block=lambda: world.alive(world.where))
            requests[:, 1] = files[0].requests_of([prompt.id for prompt in prompts])
            requests[:, 0] = np.where(requests[:, 1] >= 0, 0, -1)
        numbers = {name: number for number, name in enumerate(names, start=len(of_job))}
        for prompt in prompts:
            if prompt.replay is not None:
                number = numbers[prompt.replay]
                requests[prompt.index] = number, files[number].request_of(_names(prompt))
        return files, requests

    files, requests = world.collectively(open_files)
    if names:
        _require_same_files(paths[len(of_job) :], world)
    return Replay(files, world.comm.bcast(requests), section.weights)


def _names(prompt: Prompt) -> list[str]:
    """The ids by which a file may hold the routing of a prompt: its own id, then the id of its first sample."""
    return [prompt.id] if prompt.prompt_id is None else [prompt.id, prompt.prompt_id]


def _require_same_files(paths: Sequence[str], world: World) -> None:
    """End all ranks with a DataError if nodes have other files than rank 0; collective."""
    own = world.collectively(lambda: [digest_file(path) for path in paths] if world.local_rank == 0 else None)
    of_ranks = [found for found in world.comm.allgather(own) if found is not None]
    different = [path for path, *found in zip(paths, *of_ranks, strict=True) if len(set(found)) > 1]
    if different:
        problem = f"{different[0]}: the nodes have different routing: is the file the same on every node?"
        world.raise_together(DataError(problem))


class ReplayPolicy(RoutingPolicy):
    """Gives the rows of one lane the experts of a replay; a row that has none is routed by the model.

    The weights are the router's own for these experts, or the replay's. `replayed` counts the routes that were given,
    one a row and layer, and `changed` those that differ from the router's own choice of experts.
    """

    def __init__(self, replay: Replay, layers: Sequence[int], first_layer: int) -> None:
        self.replayed = self.changed = 0
        self._replay = replay
        self._layers = {layer: number for number, layer in enumerate(layers)}
        self._of_file = slice(first_layer, first_layer + len(layers))
        self._experts: IntArray = np.zeros((0, len(layers), 0), np.int32)
        self._weights: Float32Array | None = None

    def begin_step(self, requests: IntArray, positions: IntArray) -> None:
        """See the base class; reads the routes of the rows."""
        breaks = np.flatnonzero((np.diff(requests) != 0) | (np.diff(positions) != 1)) + 1
        parts = [self._read(requests[rows], positions[rows]) for rows in np.split(np.arange(len(requests)), breaks)]
        self._experts = np.concatenate([experts for experts, _ in parts])
        if self._replay.weights:
            self._weights = np.concatenate([weights for _, weights in parts if weights is not None])

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """See the base class; blocks the host to download the router's own choices, if a row has a route."""
        own, own_weights = backend.choose_experts(logits, router, correction=correction)
        number = self._layers[layer]
        given = self._experts[:, number]
        is_given = given[:, :1] != NOT_GIVEN
        if not is_given.any():
            return own, own_weights
        on_host = backend.download(own)
        chosen = np.where(is_given, given, on_host).astype(on_host.dtype, copy=False)
        differs = (np.sort(on_host, axis=1) != np.sort(chosen, axis=1)).any(axis=1)
        self.replayed += int(is_given.sum())
        self.changed += int(differs.sum())
        experts = backend.upload(np.ascontiguousarray(chosen))
        if self._weights is not None:
            weights = np.where(is_given, self._weights[:, number], backend.download(own_weights))
            return experts, backend.upload(np.ascontiguousarray(weights, np.float32))
        is_own = (chosen == on_host).all(axis=1, keepdims=True)
        if is_own.all():
            return own, own_weights
        # A backend may round the weights of experts that it is given in another way than those of its own choice.
        weighed = backend.download(backend.weigh_experts(logits, experts, router))
        weights = np.where(is_own, backend.download(own_weights), weighed)
        return experts, backend.upload(np.ascontiguousarray(weights, np.float32))

    def _read(self, requests: IntArray, positions: IntArray) -> tuple[IntArray, Float32Array | None]:
        """The routes of consecutive positions of one request."""
        top_k = self._replay.files[0].top_k
        file, number = self._replay.requests[requests[0]].tolist() if len(requests) else (-1, -1)
        if file < 0:
            shape = (len(requests), len(self._layers), top_k)
            return np.full(shape, NOT_GIVEN, np.int32), np.zeros(shape, np.float32)
        first = int(positions[0])
        return self._replay.files[file].read(number, first, first + len(positions), self._of_file)
