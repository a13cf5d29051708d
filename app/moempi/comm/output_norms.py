"""Norms of the outputs of chosen experts, which a lane may record."""

from collections.abc import Callable

import numpy as np

from moempi.arrays import Float32Array, widen
from moempi.backend.protocol import Array, Backend
from moempi.comm.transfers import Transfer

OnNorms = Callable[[Float32Array], None]
"""Takes the norms (T, K) of the outputs of one layer's choices."""
OnLateNorms = Callable[[Transfer[Float32Array]], None]
"""Takes a transfer of them, which may finish after the step."""


def norms_of(backend: Backend, rows: Array, output_rows: Array) -> Float32Array:
    """The Euclidean norms (T, K) of rows[output_rows] of a comm buffer. Blocks the host to download the rows."""
    return row_norms(backend, backend.unpack(rows, output_rows.reshape(-1))).reshape(output_rows.shape)


def row_norms(backend: Backend, rows: Array) -> Float32Array:
    """The Euclidean norms (N,) of rows (N, D). Blocks the host to download them."""
    found = backend.download(rows)
    values = widen(found) if found.dtype == np.uint16 else found
    norms: Float32Array = np.sqrt(np.square(values).sum(axis=1))
    return norms
