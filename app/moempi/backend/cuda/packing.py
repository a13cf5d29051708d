"""The rows of an exchange: sorted by expert, packed, unpacked, and added up: kernels/grouping.cu and packing.cu."""

from collections.abc import Sequence
from math import prod

import numpy as np

from moempi.backend.cuda.host_copies import HostCopies
from moempi.backend.cuda.launches import Launches
from moempi.backend.values import Array, RmsNorm
from moempi.errors import ConfigError

COMBINED_NUMBERS = 1024
"""Numbers of a row per block of `combine`."""
GROUPED_CHOICES = 8
"""Choices per thread of kernels/grouping.cu; more than a block's are sorted by several blocks."""
MOST_IDS = 8192
"""Physical experts of a layer that kernels/grouping.cu sorts by."""
MOST_CHOICES = 2048
"""Choices that are sorted and packed by one kernel; equals MOST_CHOICES of kernels/packing.cu."""


class Packing:
    """The verbs of `protocol.ExpertVerbs` that sort, move and add up rows."""

    def __init__(self, launches: Launches, copies: HostCopies) -> None:
        self._launches = launches
        self._device = launches.device
        self._copies = copies

    def pick_replicas(self, experts: Array, period: int) -> Array:
        out = self._launches.empty(experts.shape, np.int32)
        count, sizes = prod(out.shape), (prod(out.shape), out.shape[1], period)
        self._launches.launch("grouping", "pick_replicas", (-(-count // 256), 1, 1), 256, experts, out, *sizes, IDS=64)
        return out

    def group(self, experts: Array, physical_ids: Array, *, num_ids: int) -> tuple[Array, Array, Array]:
        """Choices of more than one block are counted and scanned before they are sorted."""
        choices, slots = prod(experts.shape), experts.shape[1]
        upload, empty = self._copies.upload, self._launches.empty
        if not choices:
            return upload(np.zeros(0, np.int32)), experts, upload(np.zeros(num_ids, np.int32))
        source_rows, output_rows = empty((choices,), np.int32), empty(experts.shape, np.int32)
        counts, ids = empty((num_ids,), np.int32), max(64, 1 << (num_ids - 1).bit_length())
        if ids > MOST_IDS:
            raise ConfigError(
                f"a layer has {num_ids} physical experts; the GPU backend takes at most {MOST_IDS}: use fewer replicas"
            )
        threads = 32 * min(8, MOST_IDS // ids)
        blocks = min(1024, -(-choices // (threads * GROUPED_CHOICES)))
        given, before = (experts, upload(physical_ids)), None
        if blocks > 1:
            before = empty((num_ids, blocks), np.int32)
            counted = (*given, before, choices, num_ids)
            self._launches.launch("grouping", "count_choices", (blocks, 1, 1), threads, *counted, IDS=ids)
            scan_threads = 32 * -(-blocks // 32)
            scanned = (before, counts, blocks)
            self._launches.launch("grouping", "scan_blocks", (num_ids, 1, 1), scan_threads, *scanned, IDS=ids)
        results, sizes = (source_rows, output_rows, counts), (choices, slots, num_ids)
        self._launches.launch("grouping", "group", (blocks, 1, 1), threads, *given, before, *results, *sizes, IDS=ids)
        return source_rows, output_rows, counts

    def group_and_pack(
        self, rows: Array, experts: Array, physical_ids: Array, out: Array, *, num_ids: int, spans: Array | None
    ) -> tuple[Array, Array]:
        """The choices of rows whose span is NO_ROW are sorted behind all others, and neither packed nor counted."""
        results = self._launches.empty(experts.shape, np.int32), self._launches.empty((num_ids,), np.int32)
        given = (rows, experts, self._copies.upload(physical_ids), spans, out, *results)
        sizes = (len(out), experts.shape[1], num_ids, out.shape[1])
        self._launches.by_segment("packing", "pack_choices", out, *given, *sizes)
        return results

    def take_rows(self, rows: Array, index: Array) -> Array:
        out = self._launches.rows((len(index), *rows.shape[1:]))
        self.pack(rows, index, out)
        return out

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        given, width = (rows, index if index is None else self._copies.upload(index), out), prod(out.shape[1:])
        if self._device.holds(rows) and self._device.holds(out):
            self._launches.by_segment("packing", "take_rows", out, *given, width)
        else:
            self._launches.over_bus("packing", "take_rows_over_bus", out, *given, len(out), width)

    def unpack(self, buffer: Array, index: Array | None) -> Array:
        """Rows in device memory that keep their order stay in the buffer."""
        if index is None and self._device.holds(buffer):
            return buffer
        out = self._launches.rows((len(buffer) if index is None else len(index), *buffer.shape[1:]))
        self.pack(buffer, index, out)
        return out

    def join(self, parts: Sequence[Array]) -> Array:
        out, first = self._launches.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype), 0
        for part in parts:
            self._device.copy(part, out[first : first + len(part)])
            first += len(part)
        return out

    def combine(self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array] = ()) -> Array:
        out = self._launches.rows((len(output_rows), buffer.shape[1]))
        given = (buffer, output_rows, weights, *_both(addends), out)
        grid = (len(out), -(-buffer.shape[1] // COMBINED_NUMBERS), 1)
        self._launches.launch("packing", "combine", grid, 128, *given, output_rows.shape[1], buffer.shape[1])
        return out

    def combine_rms_norm(
        self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array], norm: RmsNorm
    ) -> tuple[Array, Array]:
        shape = (len(output_rows), buffer.shape[1])
        total, out = self._launches.rows(shape), self._launches.rows(shape)
        given = (buffer, output_rows, weights, *_both(addends), norm.weight, total, out)
        sizes = (output_rows.shape[1], buffer.shape[1], norm.eps, norm.rounded)
        self._launches.by_norm("combine_rms_norm", out, *given, *sizes, weight=norm.weight)
        return total, out


def _both(addends: Sequence[Array]) -> tuple[Array | None, ...]:
    """At most two addends as two arguments of a kernel."""
    return (*addends, *[None] * (2 - len(addends)))
