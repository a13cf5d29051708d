"""The texts that occur more than once among very many, of which 8 bytes each are in memory."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 16


def digest(text: str) -> int:
    """64 bits of a text, the same in one process."""
    return hash(text)


class RepeatedDigests:
    """Finds the digests that were added more than once; different texts may have the same digest.

    The digests are kept in sorted runs, each at least twice as long as the next one.
    """

    def __init__(self) -> None:
        self._block: list[int] = []
        self._runs: list[NDArray[np.int64]] = []
        self._repeated: set[int] = set()

    def add(self, texts: Iterable[str]) -> None:
        """Add the digests of texts, of which there are few."""
        self._block.extend(map(digest, texts))
        if len(self._block) >= _BLOCK:
            self._add_block()

    def found(self) -> set[int]:
        """The digests that were added more than once."""
        self._add_block()
        return self._repeated

    def _add_block(self) -> None:
        block, counts = np.unique(np.array(self._block, np.int64), return_counts=True)
        self._block.clear()
        is_repeated = counts > 1
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, block), len(run) - 1)
            is_repeated |= run[places] == block
        self._repeated.update(block[is_repeated].tolist())
        while self._runs and len(self._runs[-1]) < 2 * len(block):
            block = np.sort(np.concatenate([self._runs.pop(), block]), kind="stable")
        if len(block):
            self._runs.append(block)
