"""The base of what is opened and must be closed."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Self


class Closeable(ABC):
    """A context manager that closes itself at the end of its block."""

    @abstractmethod
    def close(self) -> None:
        """Release the open files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all(opened: Iterable[Closeable]) -> None:
    """Close each; an error closes the others first."""
    with ExitStack() as stack:
        for each in opened:
            stack.callback(each.close)
