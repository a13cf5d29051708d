"""A backend that computes nothing: matrices without numbers, whose products are zeros."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from moempi.arrays import Float32Array
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.values import Array, Cache, Segment, Stored
from moempi.config.job import RunSection
from moempi.engine import deployment


@dataclass(frozen=True, slots=True)
class ZeroMatrix:
    """A matrix of zeros, of which only the number of outputs is in memory."""

    outputs: int

    def times(self, x: Float32Array) -> Float32Array:
        """The products of rows (T, inputs): zeros (T, outputs)."""
        return np.zeros((len(x), self.outputs), np.float32)


class ZerosBackend(NumpyBackend):
    """`NumpyBackend` without its products: for models of plain attention."""

    def matrix(self, *stored: Stored, transposed: bool = False) -> ZeroMatrix:
        """Without its numbers."""
        return ZeroMatrix(sum(part.shape[1 if transposed else 0] for part in stored))

    def take_outputs(self, matrix: ZeroMatrix, outputs: range) -> ZeroMatrix:
        """Zeros."""
        return ZeroMatrix(len(outputs))

    def linear(self, x: Float32Array, matrix: ZeroMatrix, bias: Float32Array | None = None) -> Float32Array:
        """Zeros."""
        return matrix.times(x)

    def logits(self, x: Float32Array, head: ZeroMatrix, bias: Array | None = None) -> Float32Array:
        """Zeros."""
        return head.times(x)

    def attend(
        self,
        queries: Float32Array,
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        window: int = 0,
        sinks: Float32Array | None = None,
    ) -> Float32Array:
        """Zeros."""
        return np.zeros((*queries.shape[:2], cache.values.shape[-1]), np.float32)


@contextmanager
def without_arithmetic() -> Iterator[None]:
    """Inside the block, the ranks that jobs are deployed on have such a backend."""
    names, name = vars(deployment), "make_backend"
    original, names[name] = names[name], _make_backend
    try:
        yield
    finally:
        names[name] = original


def _make_backend(run: RunSection, *, progress: Callable[[], None] = lambda: None, **_options: Any) -> ZerosBackend:
    return ZerosBackend(precision=run.precision, progress=progress)
