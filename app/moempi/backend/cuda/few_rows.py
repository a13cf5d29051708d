"""Experts of few rows: kernels/few_rows.cu computes several in two launches, as fast as their weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from moempi.backend.cuda.device import MOST_EXPERTS, ExpertTable, Kernel, find_kernel
from moempi.backend.cuda.launches import Launches
from moempi.backend.values import Array, Expert

MOST_ROWS = 64
"""Rows of an expert in one launch."""
THREADS, WARPS, BLOCK_OUTPUTS, CHUNK = 256, 8, 128, 128
"""Threads, warps and rows of a matrix of a block of kernels/few_rows.cu, and the inputs that it takes at once."""
STAGES = {16: 4, 32: 4, 64: 3}
"""Chunks in shared memory, by the constant ROWS of kernels/few_rows.cu, which is at least the rows of an expert."""
BLOCKS = 132
"""Blocks that a matrix is divided into if it has fewer tiles: the multiprocessors of an H100. The same on every GPU,
since a row's bits depend on it."""
PARTIAL_BYTES = 64 << 20
"""About the most memory of a queue for the sums of splits; more experts are computed in several launches."""


class ExpertRows(NamedTuple):
    """Rows [first, first + num_rows) of a layer's, which go through `expert`."""

    expert: Expert
    first: int
    num_rows: int


def expert_rows(experts: Sequence[Expert], counts: Sequence[int]) -> list[ExpertRows]:
    """The rows of each expert that has some: counts[0] of the first, then counts[1] of the second, and so on.

    Raises ValueError if there are not as many counts as experts.
    """
    own = zip(experts, counts, accumulate(counts), strict=True)
    return [ExpertRows(expert, end - count, count) for expert, count, end in own if count]


@dataclass(frozen=True, slots=True)
class Division:
    """How a launch divides a matrix: the grid is (tiles, splits)."""

    kernel: Kernel
    tiles: int
    splits: int
    split_inputs: int
    partial: int
    """Rows of THREADS float4 for the sums of one expert."""
    shared_bytes: int


class FewRows:
    """Submits the kernels. The bits of a row depend on its expert alone, not on the number of rows or experts."""

    def __init__(self, launches: Launches, *, always: bool) -> None:
        """With `always`, an expert of more than MOST_ROWS is computed in several parts."""
        self._launches = launches
        self._device = launches.device
        self._always = always
        self._has_warpgroups = launches.device.has_warpgroups
        self._sums: dict[int, Array] = {}

    def takes(self, own: ExpertRows) -> bool:
        """Whether the kernels compute these rows."""
        is_few = own.expert.gated and (self._always or own.num_rows <= MOST_ROWS)
        return is_few and self._has_warpgroups and own.expert.gate_up.has_panels and own.expert.down.has_panels

    def expert_mlps(self, rows: Array, chosen: Sequence[ExpertRows], out: Array) -> None:
        """Compute the chosen rows of out (T, D) from the same rows of `rows` (T, D); all experts have one shape."""
        parts: list[ExpertRows] = []
        for own in chosen:
            parts += [own] if own.num_rows <= MOST_ROWS else _divided(own)
        while parts:
            most_rows = max([part.num_rows for part in parts[:MOST_EXPERTS]])
            gate_up, down, partial = _divisions(rows.shape[1], parts[0].expert.down.values.shape[1], most_rows)
            together = min(len(parts), MOST_EXPERTS, max(1, PARTIAL_BYTES // (partial * THREADS * 16)))
            self._expert_mlps(rows, parts[:together], out, gate_up, down, self._partial_sums(together * partial))
            parts = parts[together:]

    def _expert_mlps(
        self, rows: Array, parts: Sequence[ExpertRows], out: Array, gate_up: Division, down: Division, sums: Array
    ) -> None:
        firsts, counts = [part.first for part in parts], [part.num_rows for part in parts]
        *hidden_firsts, num_rows = accumulate(counts, initial=0)
        experts = [part.expert for part in parts]
        hidden = self._launches.rows((num_rows, experts[0].down.values.shape[1]))
        gate_ups, gate_up_biases = [own.gate_up.values for own in experts], [own.gate_up_bias for own in experts]
        downs, down_biases = [own.down.values for own in experts], [own.down_bias for own in experts]
        clamp = experts[0].clamp
        rule = (clamp.alpha, clamp.limit) if clamp else (0.0, 0.0)
        first_table = ExpertTable(gate_ups, gate_up_biases, firsts, hidden_firsts, counts)
        second_table = ExpertTable(downs, down_biases, hidden_firsts, firsts, counts)
        self._launch(gate_up, rows, hidden, sums, first_table, rule)
        self._launch(down, hidden, out, sums, second_table, ())

    def _launch(
        self, division: Division, x: Array, out: Array, sums: Array, table: ExpertTable, rule: tuple[float, ...]
    ) -> None:
        num_experts = len(table.counts)
        arrived = self._launches.counters(num_experts * division.tiles * WARPS)
        sizes = (num_experts, out.shape[1], x.shape[1], division.split_inputs)
        self._device.launch(
            division.kernel,
            (division.tiles, division.splits, 1),
            THREADS,
            (x, out, sums, arrived, table, *sizes, *rule),
            shared_bytes=division.shared_bytes,
            early=True,
        )

    def _partial_sums(self, needed: int) -> Array:
        """The queue's memory for sums of splits, which is kept; it grows by doubling."""
        queue = self._device.queue
        if queue not in self._sums or len(self._sums[queue]) < needed:
            size = 1 << (needed - 1).bit_length()
            self._sums[queue] = self._device.empty((size, THREADS, 4), np.float32)
        return self._sums[queue]


@cache
def divide(name: str, outputs: int, inputs: int, most_rows: int, blocks: int) -> Division:
    """Divide a matrix of `outputs` rows, or of as many gates and ups, between about `blocks` blocks."""
    tiles = -(-outputs // (BLOCK_OUTPUTS // 2 if name == "gate_up_few" else BLOCK_OUTPUTS))
    chunks = -(-inputs // CHUNK)
    split_chunks = -(-chunks // max(1, min(chunks, blocks // tiles)))
    splits = -(-chunks // split_chunks)
    return Division(
        kernel=find_kernel("few_rows.cu", name, (("ROWS", most_rows),)),
        tiles=tiles,
        splits=splits,
        split_inputs=split_chunks * CHUNK,
        partial=tiles * splits * most_rows // 8,
        shared_bytes=STAGES[most_rows] * (BLOCK_OUTPUTS + most_rows) * CHUNK * 2,
    )


@cache
def _divisions(width: int, hidden: int, rows: int) -> tuple[Division, Division, int]:
    """The divisions of both products of experts of at most `rows` rows, and the larger `partial`."""
    most_rows = min(most for most in STAGES if rows <= most)
    gate_up = divide("gate_up_few", hidden, width, most_rows, BLOCKS)
    down = divide("multiply_few", width, hidden, most_rows, BLOCKS)
    return gate_up, down, max(gate_up.partial, down.partial)


def _divided(own: ExpertRows) -> list[ExpertRows]:
    end = own.first + own.num_rows
    return [ExpertRows(own.expert, first, min(MOST_ROWS, end - first)) for first in range(own.first, end, MOST_ROWS)]
