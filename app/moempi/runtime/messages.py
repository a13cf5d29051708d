"""What an object that one rank sends to another may be made of.

mpi4py pickles objects, and a pickle can name any function for its receiver to call. TCP between ranks is not
authenticated, so a received pickle may name only what the pickles of SAMPLES name, and dataclasses and structs of this
package.
"""

import pickle
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import is_dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mpi4py import MPI


class _KeywordRecord(msgspec.Struct, kw_only=True):
    number: int = 0


SAMPLES = (np.zeros(2), np.zeros((2, 2))[:, :1], np.float64(0), Counter[str](), Path(), _KeywordRecord())
"""Objects of each kind that messages hold: how the libraries pickle them depends on their versions."""


def restrict_messages() -> None:
    """From now on, this process receives over MPI no objects but of the kinds of SAMPLES and records of this package.

    A receive of anything else raises pickle.UnpicklingError.
    """
    MPI.pickle.__init__(loads=_load)  # type: ignore[misc]  # mpi4py's way to replace the serializer in use


class _SampleReader(pickle.Unpickler):
    def __init__(self, message: bytes) -> None:
        super().__init__(BytesIO(message))
        self.found: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        return self.found.setdefault((module, name), super().find_class(module, name))


class _MessageReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name)


def _load(message: Any, buffers: Iterable[Any] | None = None) -> Any:
    return _MessageReader(BytesIO(message), buffers=buffers).load()


@cache
def _found_in_samples() -> dict[tuple[str, str], Any]:
    reader = _SampleReader(MPI.pickle.dumps(SAMPLES))
    reader.load()
    return reader.found


@cache
def _find(module: str, name: str) -> Any:
    """What an allowed name stands for; raises pickle.UnpicklingError for any other name. Imports nothing."""
    found = _found_in_samples().get((module, name))
    if found is None and module.startswith("moempi."):
        record = getattr(sys.modules.get(module), name, None)
        found = record if _is_record(record) else None
    if found is None:
        raise pickle.UnpicklingError(f"a message between ranks names {module}.{name}, which no message needs")
    return found


def _is_record(found: Any) -> bool:
    return isinstance(found, type) and (is_dataclass(found) or issubclass(found, msgspec.Struct))
