"""The key-value cache of a rank: pages of rows in every layer, and the pages that each slot holds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend, Cache, Segment
from moempi.comm.batch import Batch
from moempi.config.architecture import AttentionShape
from moempi.layout.memory import pages_for


class KVCache:
    """Pages shared by all slots. A slot holds its pages from its first step until it is freed.

    A slot takes `pages_for` its capacity. The scheduler must not exceed the number of pages. Slots are numbered from
    `first_slot` on. `index_dims` are the sizes of the keys of the layers' indexers, 0 for a layer without one; () if no
    layer has one.
    """

    def __init__(
        self,
        backend: Backend,
        attention: AttentionShape,
        *,
        layers: int,
        pages: int,
        first_slot: int = 0,
        index_dims: Sequence[int] = (),
    ) -> None:
        latent = attention.latent.key_value_rank if attention.latent else 0
        self.layers: Sequence[Cache] = [
            replace(
                backend.cache(pages, attention.cached_heads, attention.cached_dim, latent=latent),
                index=backend.cache(pages, 1, dim, latent=dim) if dim else None,
            )
            for dim in index_dims or [0] * layers
        ]
        self._backend = backend
        self._free = list(range(pages))
        self._held: dict[int, IntArray] = {}
        self._first_slot = first_slot

    def segments(self, batch: Batch) -> tuple[Segment, ...]:
        """Free the batch's freed slots, allocate pages for its new slots, and return a segment per sequence."""
        for slot in batch.freed.tolist():
            self._free = sorted([*self._free, *self._held.pop(slot).tolist()])
        row, segments = 0, []
        for slot, start, length, capacity in zip(
            batch.slots.tolist(), batch.starts.tolist(), batch.lengths.tolist(), batch.capacities.tolist(), strict=True
        ):
            if slot not in self._held:
                self._held[slot] = self._take(pages_for(capacity))
            segments.append(Segment(row, length, start, self._held[slot], slot - self._first_slot))
            row += length
        return tuple(segments)

    def _take(self, count: int) -> IntArray:
        """Take adjacent pages if there are enough, else the lowest free ones, and set their rows to zero."""
        free = self._free
        runs = (first for first in range(len(free) - count + 1) if free[first + count - 1] - free[first] == count - 1)
        first = next(runs, 0)
        taken = np.array(free[first : first + count], np.int64)
        self._free = free[:first] + free[first + count :]
        for cache in self.layers:
            self._backend.clear(cache, taken)
            if cache.index is not None:
                self._backend.clear(cache.index, taken)
        return taken
