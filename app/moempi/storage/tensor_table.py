"""The tensors of a checkpoint by name, and which of them have a use."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from moempi.config.families import plain_name
from moempi.errors import DataError
from moempi.storage.checkpoint import NUMPY_TYPES, CheckpointTensor


class TensorTable:
    """The tensors of the folder under the names that they have without a multimodal wrapper."""

    def __init__(self, folder: Path, tensors: Mapping[str, CheckpointTensor]) -> None:
        self._folder = folder
        self._tensors: dict[str, CheckpointTensor] = {}
        self._used: set[str] = set()
        for name, tensor in tensors.items():
            if self._tensors.setdefault(plain_name(name), tensor) is not tensor:
                raise DataError(f"{tensor.path}: {name}: is there twice, with and without the prefix of a wrapper")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def is_used(self, name: str) -> bool:
        """Whether `name` was taken."""
        return name in self._used

    def take(self, *names: str) -> CheckpointTensor:
        """The first of `names` that is there; raises DataError if none is or if its type cannot be read."""
        name = next((name for name in names if name in self._tensors), names[0])
        tensor = self._tensors.get(name)
        if tensor is None:
            raise DataError(f"{self._folder}: {name}: is missing")
        if tensor.dtype not in NUMPY_TYPES:
            known = ", ".join(NUMPY_TYPES)
            raise DataError(f"{tensor.path}: {tensor.name}: type {tensor.dtype} is not supported, only {known}")
        self._used.add(name)
        return tensor

    def unused(self) -> Iterator[tuple[str, CheckpointTensor]]:
        """Names and tensors that nobody took."""
        return ((name, tensor) for name, tensor in self._tensors.items() if name not in self._used)
