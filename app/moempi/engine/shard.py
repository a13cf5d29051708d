"""The share of a weight file that one rank of a tensor group reads."""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import msgspec
import numpy.typing as npt

from moempi.config.architecture import Architecture
from moempi.config.tensors import TENSOR_PARALLEL, Share, Tensor, stage_tensors
from moempi.storage.read_ahead import ReadAhead
from moempi.storage.weights import WeightFile


class Shard:
    """Part `part` of `parts` of every tensor that a tensor group divides, and all rows of the other tensors.

    `head` is the part, and the number of parts, of the vocabulary's tensors if several tensor groups divide them.
    `architecture` describes the share: its attention, delta rule and state space have the heads of this part.
    `num_bytes` counts the bytes read so far. Every read first calls `on_read`. It raises DataError, which names file
    and tensor, if a checksum is wrong.
    """

    def __init__(
        self,
        file: WeightFile,
        *,
        part: int,
        parts: int,
        head: tuple[int, int] | None = None,
        on_read: Callable[[], object] = lambda: None,
    ) -> None:
        self._file = file
        self._part = part
        self._divisions = dict.fromkeys(TENSOR_PARALLEL, (part, parts)) | {Share.VOCABULARY: head or (part, parts)}
        self._on_read = on_read
        self.num_bytes = 0
        shape, rule, space = file.architecture.attention, file.architecture.delta_rule, file.architecture.state_space
        self.architecture: Architecture = msgspec.structs.replace(
            file.architecture,
            attention=msgspec.structs.replace(
                shape, num_heads=shape.num_heads // parts, num_kv_heads=shape.num_kv_heads // parts
            ),
            delta_rule=rule
            and msgspec.structs.replace(
                rule, num_key_heads=rule.num_key_heads // parts, num_value_heads=rule.num_value_heads // parts
            ),
            state_space=space
            and msgspec.structs.replace(
                space, num_heads=space.num_heads // parts, num_groups=space.num_groups // parts
            ),
        )

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor, verified; only this part's rows if ranks divide it."""
        share = self._file.tensor(name).share
        return self._read_part(name, share) if share in TENSOR_PARALLEL else self._read(name)

    def read_vocabulary(self, name: str) -> npt.NDArray[Any]:
        """This part's rows of a tensor with a row for each token, verified; `part_range` divides them the same way."""
        return self._read_part(name, Share.VOCABULARY)

    def read_ahead(self, layers: range, hosted: Mapping[int, tuple[int, ...]]) -> ReadAhead:
        """Begin to read a stage, with the experts hosted[layer], ahead of the reads; close what it returns."""
        return ReadAhead(self._file.path, self._byte_ranges(layers, hosted), lambda: self.num_bytes)

    def has(self, name: str) -> bool:
        """Whether the model has a tensor `name`."""
        return self._file.has(name)

    @property
    def is_first(self) -> bool:
        """Whether this is part 0, which alone adds the output biases: the parts' results are summed."""
        return self._part == 0

    def read_expert(self, name: str, expert: int) -> npt.NDArray[Any]:
        """One expert's matrix of a stack (E, ...), verified."""
        matrix: npt.NDArray[Any] = self._read(name, expert, expert + 1)[0]
        return matrix

    def _byte_ranges(self, layers: range, hosted: Mapping[int, tuple[int, ...]]) -> Iterator[range]:
        """Where the file has the share of a stage, about in the order of reading: its experts one by one."""
        architecture = self._file.architecture
        for stack, tensors in groupby(stage_tensors(architecture, layers), key=_stack):
            if not stack:
                yield from (self._byte_range(tensor) for tensor in tensors)
                continue
            names = [tensor.name for tensor in tensors]
            for expert in hosted.get(int(stack.split("/")[1]), ()):
                yield from (self._file.byte_range(name, expert, expert + 1) for name in names)

    def _byte_range(self, tensor: Tensor) -> range:
        """Where the file has this part of a tensor; a tied embedding is the head as well."""
        name = tensor.name if self._file.has(tensor.name) else "embedding"
        is_part = tensor.share in TENSOR_PARALLEL
        return self._file.byte_range(name, *(self._rows(name, tensor.share) if is_part else (0, tensor.shape[0])))

    def _rows(self, name: str, share: Share) -> tuple[int, int]:
        """The rows of this part of a tensor that ranks divide along this dimension."""
        (part, parts), rows = self._divisions[share], self._file.tensor(name).shape[0]
        return part * rows // parts, (part + 1) * rows // parts

    def _read_part(self, name: str, share: Share) -> npt.NDArray[Any]:
        return self._read(name, *self._rows(name, share))

    def _read(self, name: str, *rows: int) -> npt.NDArray[Any]:
        self._on_read()
        values = self._file.read(name, *rows)
        self.num_bytes += values.nbytes
        return values


def _stack(tensor: Tensor) -> str:
    """The group of a tensor that stacks the experts of a layer, like `layers/007/experts`; empty for another tensor."""
    return tensor.name.rpartition("/")[0] if tensor.share is Share.EXPERTS else ""
