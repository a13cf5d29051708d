"""The calls that a backend makes to its device: recorded, so that they can be submitted again without the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from moempi.backend.cuda.backend import CudaBackend

METHODS = ("launch", "product", "products", "copy", "launch_graph")
"""The methods of a device that submit one kernel, copy or graph."""
Call = Callable[..., None]


@contextmanager
def around_calls(backend: CudaBackend, around: Callable[[str, Call], Call]) -> Iterator[None]:
    """Inside the block, the device's method `name` is `around(name, method)`, for all METHODS."""
    with ExitStack() as stack:
        for name in METHODS:
            method = getattr(backend.device, name)
            stack.enter_context(patch.object(backend.device, name, around(name, method)))
        yield


def record_calls(backend: CudaBackend, run: Callable[[], object]) -> list[Callable[[], None]]:
    """Run once, and return the calls of METHODS in the order of their submission.

    A call keeps its arrays, so submitting it again computes the same.
    """
    calls: list[Callable[[], None]] = []

    def around(_: str, method: Call) -> Call:
        def call(*arguments: Any, **options: Any) -> None:
            submit = partial(method, *arguments, **options)
            calls.append(submit)
            submit()

        return call

    with around_calls(backend, around):
        run()
    return calls


def replay(calls: Sequence[Callable[[], None]]) -> None:
    """Submit all calls to the current queue, one after another."""
    for submit in calls:
        submit()
