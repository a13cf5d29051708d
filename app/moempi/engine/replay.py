"""Replay: a routing policy that gives rows the experts of a file, and counts them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moempi.arrays import Float32Array, IntArray
from moempi.backend.protocol import Array, Backend
from moempi.config.architecture import Architecture, Router
from moempi.config.job import ReplaySection
from moempi.engine.request import Request
from moempi.errors import DataError
from moempi.model.router_balance import RoutingPolicy
from moempi.runtime.world import World
from moempi.storage.prompts import Prompt
from moempi.storage.replay_file import NOT_GIVEN, ReplayFile


@dataclass(frozen=True, slots=True)
class Replay:
    """The routing of `file` for the requests of a job: request i is `requests[i]` of the file, -1 if it has none.

    With `weights`, the weights of the experts are the file's too.
    """

    file: ReplayFile
    requests: IntArray
    weights: bool

    def require_fits(self, requests: Sequence[Request]) -> None:
        """Raise DataError if the file has more positions of a request than the job may compute."""
        for request in requests:
            number = int(self.requests[request.prompt.index])
            positions = self.file.num_positions(number) if number >= 0 else 0
            if not request.finish and positions > request.capacity:
                raise DataError(
                    f"{self.file.path}: request {request.prompt.id[:100]!r} has routing of {positions} positions, "
                    f"the job computes at most {request.capacity}"
                )


def open_replay(
    section: ReplaySection, architecture: Architecture, world: World, prompts: Sequence[Prompt]
) -> Replay | None:
    """The routing that a job is given; None if it is given none. Collective, blocks.

    Rank 0 has the `prompts`, and reads the whole file once, a block at a time. Ends all ranks with a NoInputError, or
    with a DataError if the file does not fit.
    """
    if not section.routing:
        return None

    def open_file() -> tuple[ReplayFile, IntArray | None]:
        file = ReplayFile(section.routing, architecture)
        if section.weights and not file.has_weights:
            raise DataError(f"{section.routing}: has no weights, which replay.weights requests")
        if world.rank > 0:
            return file, None
        file.require_valid(weights=section.weights, on_block=lambda: world.alive(world.where))
        return file, file.requests_of([prompt.id for prompt in prompts])

    file, requests = world.collectively(open_file)
    return Replay(file, world.comm.bcast(requests), section.weights)


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
        top_k = self._replay.file.top_k
        number = int(self._replay.requests[requests[0]]) if len(requests) else -1
        if number < 0:
            shape = (len(requests), len(self._layers), top_k)
            return np.full(shape, NOT_GIVEN, np.int32), np.zeros(shape, np.float32)
        first = int(positions[0])
        return self._replay.file.read(number, first, first + len(positions), self._of_file)
