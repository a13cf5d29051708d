"""A rank's share of a weight file: the row ranges that its place in the grid calls for."""

from typing import Any

import msgspec
import numpy.typing as npt

from moempi.config.architecture import Architecture
from moempi.config.tensors import TENSOR_PARALLEL
from moempi.storage.weights import WeightFile


class Shard:
    """Part `part` of `parts` of every tensor that a tensor group divides; all of the others.

    `architecture` is that of the share: its attention counts the heads of this part. `num_bytes` have been read.
    """

    def __init__(self, file: WeightFile, *, part: int, parts: int) -> None:
        self._file = file
        self._part = part
        self._parts = parts
        self.num_bytes = 0
        heads = file.architecture.attention
        self.architecture: Architecture = msgspec.structs.replace(
            file.architecture,
            attention=msgspec.structs.replace(
                heads, num_heads=heads.num_heads // parts, num_kv_heads=heads.num_kv_heads // parts
            ),
        )

    def read(self, name: str) -> npt.NDArray[Any]:
        """This part's rows of a tensor, verified; raises DataError naming file and tensor."""
        return self.read_part(name) if self._file.tensor(name).share in TENSOR_PARALLEL else self._read(name)

    def read_part(self, name: str) -> npt.NDArray[Any]:
        """This part's rows of a tensor, even of one that other uses need whole: see `part_range`."""
        rows = self._file.tensor(name).shape[0]
        return self._read(name, self._part * rows // self._parts, (self._part + 1) * rows // self._parts)

    def has(self, name: str) -> bool:
        """Whether the model has a tensor `name`."""
        return self._file.has(name)

    @property
    def is_first(self) -> bool:
        """Whether this is part 0, which alone adds what counts once in the sum of all parts."""
        return self._part == 0

    def read_expert(self, name: str, expert: int) -> npt.NDArray[Any]:
        """One expert's matrix of a stack, verified."""
        matrix: npt.NDArray[Any] = self._read(name, expert, expert + 1)[0]
        return matrix

    def _read(self, name: str, *rows: int) -> npt.NDArray[Any]:
        values = self._file.read(name, *rows)
        self.num_bytes += values.nbytes
        return values
