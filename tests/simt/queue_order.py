"""Finds work of one queue whose order with work of another is missing: on a GPU both may run at the same time.

Work is in order if it is of one queue, or if the host has seen the earlier work done when it submits the later.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moempi.backend.cuda.device import ExpertTable, Kernel


class Use(NamedTuple):
    """What one array of some work is used for: bytes [first, end) of memory."""

    queue: int
    number: int
    name: str
    first: int
    end: int
    is_write: bool


class QueueOrder:
    """The uses of memory by work that is not done; uses of `divided` memory never conflict."""

    def __init__(self) -> None:
        self._uses: list[Use] = []
        self._divided: list[tuple[int, int]] = []

    def divide(self, values: Any) -> None:
        """Queues use different parts of this memory, as sequences use different pages of a cache."""
        self._divided.append(_bounds(values))

    def submit(
        self, queue: int, number: int, name: str, done: dict[int, int], uses: Iterable[tuple[Any, bool]]
    ) -> None:
        """Work `number` of a queue uses these arrays, and writes some; queue q has done its work up to done[q].

        Raises AssertionError if another queue's unfinished work writes one of them, or uses one that is written.
        """
        self._uses = [use for use in self._uses if use.number > done[use.queue]]
        added = [Use(queue, number, name, *_bounds(values), is_write) for values, is_write in uses if values.size]
        for use in added:
            for other in self._uses:
                assert not self._conflict(use, other), (
                    f"{use.name} of queue {use.queue} {'writes' if use.is_write else 'reads'} memory that "
                    f"{other.name} of queue {other.queue} {'writes' if other.is_write else 'reads'}, which is not done"
                )
        self._uses += added

    def _conflict(self, use: Use, other: Use) -> bool:
        overlap = (max(use.first, other.first), min(use.end, other.end))
        if use.queue == other.queue or not (use.is_write or other.is_write) or overlap[0] >= overlap[1]:
            return False
        return not any(first <= overlap[0] and overlap[1] <= end for first, end in self._divided)


def uses_of(kernel: Kernel, arguments: Iterable[Any]) -> Iterable[tuple[Any, bool]]:
    """The arrays of a launch, and whether the kernel may write them: all but those behind a pointer to const."""
    for given, argument in zip(_types(kernel), arguments, strict=True):
        if isinstance(argument, ExpertTable):
            arrays = (*argument.matrices, *argument.biases)
            yield from ((values, False) for values in arrays if values is not None)
        elif isinstance(argument, np.ndarray):
            yield argument, not given.startswith("const ")


@cache
def _types(kernel: Kernel) -> tuple[str, ...]:
    """The types of the parameters, for which the kernel's source is read."""
    return kernel.parameter_types


def _bounds(values: Any) -> tuple[int, int]:
    first, end = np.lib.array_utils.byte_bounds(values)
    return int(first), int(end)
