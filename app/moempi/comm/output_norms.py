"""Norms of the outputs of chosen experts, which a lane may record."""

from collections.abc import Callable

import numpy as np

from moempi.arrays import Float32Array, widen
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.transfers import Transfer

NUMBERS_AT_ONCE = 1 << 20
"""Numbers of rows that are copied at a time."""
OnNorms = Callable[[Float32Array], None]
"""Takes the norms (T, K) of the outputs of one layer's choices."""
OnLateNorms = Callable[[Transfer[Float32Array]], None]
"""Takes a transfer of such norms, which may finish after the step."""


def norms_of(backend: Backend, rows: Array, output_rows: Array) -> Float32Array:
    """The Euclidean norms (T, K) of rows[output_rows] of a comm buffer. Blocks the host to download the rows."""
    index = output_rows.reshape(-1)
    at_once = max(1, NUMBERS_AT_ONCE // rows.shape[1])
    firsts = range(0, max(len(index), 1), at_once)
    pieces = [row_norms(backend, backend.unpack(rows, index[first : first + at_once])) for first in firsts]
    return np.concatenate(pieces).reshape(output_rows.shape)


def row_norms(backend: Backend, rows: Array) -> Float32Array:
    """The Euclidean norms (N,) of rows (N, D). Blocks the host to download them."""
    found = backend.download(rows)
    values = widen(found) if found.dtype == np.uint16 else found
    norms: Float32Array = np.sqrt(np.square(values).sum(axis=1))
    return norms
