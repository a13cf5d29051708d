"""Attention of few rows as CUDA graphs: what its verbs submit is recorded once, and later submitted in one call.

A graph may have the router behind the attention, up to the rows packed by physical expert. A recording fixes grids,
sizes and addresses. So a graph is of one layer and queue, one number of rows, and one number of splits of their keys;
both are rounded up, and rows beyond the step's are none. What else changes is copied to fixed
addresses: the rows in each layer, their positions, pages and angles once a step. What graphs write beside the cache is
in an arena, which all graphs of a queue share.

The first call of a kind computes as without graphs, which makes what is made once (kernels, counters, memory of the
library) and measures the arena; the second call records; later ones submit the graph. A recording costs many calls, so
that a kind beyond MOST_GRAPHS is recorded only in the place of a graph that is IDLE; until then it computes as without.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moempi.backend.cuda.attention import SPLIT_KEYS, num_splits
from moempi.backend.cuda.attention_layout import NO_ROW, AttentionLayout, SingleRows, StepLayouts
from moempi.backend.cuda.device import Graph
from moempi.backend.cuda.launches import Arena, Launches, rows_from
from moempi.backend.protocol import Attend, Attended
from moempi.backend.values import Array, Cache, PackedChoices, PhysicalIds, Segment
from moempi.config.tensors import PAGE_ROWS

MOST_ROWS = 256
"""Rows of a step whose attention is recorded; more keep a GPU busy while the host submits."""
ROUNDED_ROWS = 16
"""Rows of a graph are a multiple of it; the splits of a graph are a power of two."""
MOST_GRAPHS = 16
"""Graphs of a layer in a queue."""
IDLE = 256
"""Calls of a layer and queue without a launch of a graph, after which another graph may take its place."""

Angles = tuple[Array, Array]


class Kind(NamedTuple):
    """What calls of a layer have in common that launch the same graph.

    `rows` and `splits` of their keys are rounded numbers; by `ids` the rows' choices are packed, if they are.
    """

    queue: int
    rows: int
    splits: int
    ids: PhysicalIds | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a layer's attention reads beside weights and cache: rows x (T, D), angles (T, n), and the rows' layout."""

    x: Array
    angles: Angles
    layout: AttentionLayout


class GraphMemory:
    """The memory of the graphs of one queue: their inputs, for a cache of `num_pages`, and the arena."""

    def __init__(self, launches: Launches, inputs: Inputs, num_pages: int) -> None:
        empty = launches.device.empty
        self._device = launches.device
        self._x = launches.rows((MOST_ROWS, inputs.x.shape[1]))
        self._angles = [empty((MOST_ROWS, values.shape[1]), np.float32) for values in inputs.angles]
        self._spans, self._pages = empty((MOST_ROWS, 2), np.int32), empty((num_pages,), np.int32)
        self._no_rows = launches.device.upload(np.tile(np.array(NO_ROW, np.int32), (ROUNDED_ROWS, 1)))
        self._arena: Array | None = None
        self._step: tuple[Angles, AttentionLayout, Inputs] | None = None

    def place(self, inputs: Inputs) -> Inputs:
        """Submit copies of the inputs to their addresses; angles and layout are copied once a step.

        The copied inputs have rounded numbers of rows and splits. Rows beyond the given ones are arbitrary, and none.
        """
        if self._step is None or self._step[0] is not inputs.angles or self._step[1] is not inputs.layout:
            self._step = inputs.angles, inputs.layout, self._place_step(inputs)
        placed = self._step[2]
        self._device.copy(inputs.x, rows_from(placed.x, 0, len(inputs.x)))
        return placed

    def _place_step(self, inputs: Inputs) -> Inputs:
        layout, count, pages = inputs.layout, len(inputs.x), self._pages[: len(inputs.layout.pages)]
        rows, splits = rounded(layout)
        for values, copied in zip((*inputs.angles, layout.spans), (*self._angles, self._spans), strict=True):
            self._device.copy(values, copied[:count])
        self._device.copy(layout.pages, pages)
        if count < rows:
            self._device.copy(self._no_rows[: rows - count], self._spans[count:rows])
        single_rows = [SingleRows(range(rows), splits * SPLIT_KEYS)]
        placed = replace(layout, spans=self._spans[:rows], pages=pages, single_rows=single_rows)
        return Inputs(self._x[:rows], (self._angles[0][:rows], self._angles[1][:rows]), placed)

    def arena(self, num_bytes: int) -> Arena:
        """The arena of a recording, of at least `num_bytes`; a graph keeps the memory of its recording."""
        if self._arena is None or len(self._arena) < num_bytes:
            self._arena = self._device.empty((1 << (num_bytes - 1).bit_length(),), np.uint8)
        return Arena(self._device.empty, self._arena)


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph, and the arrays of its results, which each launch writes anew."""

    graph: Graph
    results: Attended


class Recordings:
    """The recordings of a layer in one queue, at most MOST_GRAPHS."""

    def __init__(self) -> None:
        self._calls = 0
        self._of_kinds: dict[Kind, tuple[Recording, int]] = {}
        """The recordings with the call of their last launch; the one that was launched last is the last."""

    def find(self, kind: Kind) -> Recording | None:
        """The recording of a kind that is called."""
        self._calls += 1
        recording, _ = self._of_kinds.pop(kind, (None, 0))
        if recording is not None:
            self._of_kinds[kind] = recording, self._calls
        return recording

    def take_place(self) -> bool:
        """Whether another has a place, for which a recording that is IDLE may be dropped."""
        if len(self._of_kinds) < MOST_GRAPHS:
            return True
        kind, (_, last_call) = next(iter(self._of_kinds.items()))
        is_idle = self._calls - last_call > IDLE
        if is_idle:
            del self._of_kinds[kind]
        return is_idle

    def add(self, kind: Kind, recording: Recording) -> None:
        """Add the recording of the kind that was called last."""
        self._of_kinds[kind] = recording, self._calls


class CapturedAttention:
    """`protocol.FusedAttention` of the verbs of one layer, which has one cache, as CUDA graphs.

    All layers share `memories`.
    """

    most_rows = MOST_ROWS

    def __init__(
        self,
        attend: Attend,
        launches: Launches,
        layouts: StepLayouts,
        *,
        memories: dict[tuple[int, ...], GraphMemory],
    ) -> None:
        self._attend, self._launches, self._layouts, self._memories = attend, launches, layouts, memories
        self._sizes: dict[Kind, int] = {}
        """The bytes of the arena of each kind of call that was measured."""
        self._recordings: defaultdict[int, Recordings] = defaultdict(Recordings)
        """The recordings of each queue."""

    def __call__(
        self, x: Array, angles: Angles, cache: Cache, segments: Sequence[Segment], ids: PhysicalIds | None = None
    ) -> Attended:
        inputs = Inputs(x, angles, self._layouts.of(cache, segments))
        if not _is_recorded(inputs.layout, cache):
            return self._attend(x, angles, cache, segments, None)
        kind = Kind(self._launches.device.queue, *rounded(inputs.layout), ids)
        recordings, is_measured = self._recordings[kind.queue], kind in self._sizes
        recording = recordings.find(kind)
        if recording is None and is_measured and not recordings.take_place():
            return self._attend(x, angles, cache, segments, None)
        memory = self._memory(inputs, cache)
        placed = memory.place(inputs)
        if not is_measured:
            results = self._measure(placed, cache, kind)
        else:
            if recording is None:
                recording = self._record(placed, cache, memory.arena(self._sizes[kind]), ids)
                recordings.add(kind, recording)
            self._launches.device.launch_graph(recording.graph)
            results = recording.results
        return first_rows(results, len(x))

    def _memory(self, inputs: Inputs, cache: Cache) -> GraphMemory:
        num_pages = len(cache.keys) // PAGE_ROWS
        key = (self._launches.device.queue, num_pages, inputs.x.shape[1], inputs.angles[0].shape[1])
        if key not in self._memories:
            self._memories[key] = GraphMemory(self._launches, inputs, num_pages)
        return self._memories[key]

    def _measure(self, inputs: Inputs, cache: Cache, kind: Kind) -> Attended:
        """The results; the bytes of an arena for them are kept."""
        arena = Arena(self._launches.device.empty)
        with self._launches.allocating(arena):
            results = self._compute(inputs, cache, kind.ids)
        self._sizes[kind] = arena.taken_bytes
        return results

    def _record(self, inputs: Inputs, cache: Cache, arena: Arena, ids: PhysicalIds | None) -> Recording:
        results: list[Attended] = []
        with self._launches.allocating(arena):
            graph = self._launches.device.capture(lambda: results.append(self._compute(inputs, cache, ids)))
        return Recording(graph, results[0])

    def _compute(self, inputs: Inputs, cache: Cache, ids: PhysicalIds | None) -> Attended:
        with self._layouts.placing(inputs.layout):
            return self._attend(inputs.x, inputs.angles, cache, inputs.layout.segments, ids)


def first_rows(results: Attended, count: int) -> Attended:
    """The results of the first `count` rows."""
    total, normalized, packed = results
    if count == len(total):
        return results
    if packed is not None:
        experts, weights, output_rows = (x[:count] for x in (packed.experts, packed.weights, packed.output_rows))
        packed = PackedChoices(experts, weights, packed.rows[: count * experts.shape[1]], output_rows, packed.counts)
    return total[:count], normalized[:count], packed


def rounded(layout: AttentionLayout) -> tuple[int, int]:
    """The numbers of rows and splits of a graph for a layout of one run of single rows."""
    (run,) = layout.single_rows
    rows = -(-len(run.rows) // ROUNDED_ROWS) * ROUNDED_ROWS
    return rows, 1 << (num_splits(run) - 1).bit_length()


def _is_recorded(layout: AttentionLayout, cache: Cache) -> bool:
    """Whether the grids depend on the numbers of rows and splits alone, and the inputs have room."""
    is_one_run = len(layout.single_rows) == 1 and not len(layout.tiles)
    return is_one_run and len(layout.spans) <= MOST_ROWS and len(layout.pages) <= len(cache.keys) // PAGE_ROWS
