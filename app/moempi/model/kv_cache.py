"""The key-value cache of a rank: pages of rows in every layer, and the pages that each slot holds."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import NO_PAGES, Cache, Segments
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
        self._free: IntArray = np.arange(pages)
        self._pages = np.zeros(0, object)
        """The pages of each slot (m,)."""
        self._num_pages: IntArray = np.zeros(0, np.int64)
        self._first_slot = first_slot

    def segments(self, batch: Batch) -> Segments:
        """Free the batch's freed slots, allocate pages for its new slots, and return a segment per sequence."""
        if len(batch.freed):
            self._release(batch.freed)
        unknown = int(batch.slots.max(initial=-1)) + 1 - len(self._pages)
        if unknown > 0:
            self._pages = np.append(self._pages, np.zeros(unknown, object))
            self._num_pages = np.append(self._num_pages, np.zeros(unknown, np.int64))
        new = (self._num_pages[batch.slots] == 0).nonzero()[0]
        if len(new):
            self._allocate(batch.slots[new], batch.capacities[new])
        pages = np.concatenate([NO_PAGES, *self._pages[batch.slots]])
        states = batch.slots - self._first_slot
        return Segments(batch.lengths, batch.starts, self._num_pages[batch.slots], pages, states)

    def _release(self, slots: IntArray) -> None:
        pages = np.sort(np.concatenate([NO_PAGES, *self._pages[slots]]))
        self._free = np.insert(self._free, np.searchsorted(self._free, pages), pages)
        self._pages[slots], self._num_pages[slots] = None, 0

    def _allocate(self, slots: IntArray, capacities: IntArray) -> None:
        """Allocate pages for slots that hold none, and set their rows to zero."""
        for slot, capacity in zip(slots.tolist(), capacities.tolist(), strict=True):
            self._pages[slot] = self._take(pages_for(capacity))
            self._num_pages[slot] = len(self._pages[slot])
        pages = np.concatenate(self._pages[slots])
        for cache in self.layers:
            self._backend.clear(cache, pages)
            if cache.index is not None:
                self._backend.clear(cache.index, pages)

    def _take(self, count: int) -> IntArray:
        """Take the first adjacent pages if there are enough, else the lowest free ones."""
        free = self._free
        distances = free[count - 1 :] - free[: len(free) - count + 1]
        first = int(np.argmax(distances == count - 1)) if len(distances) else 0
        self._free = np.concatenate([free[:first], free[first + count :]])
        return free[first : first + count].copy()  # without the list of all free pages
