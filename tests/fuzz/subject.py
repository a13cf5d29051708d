"""A kind of file that the program reads: how inputs of it are made, and what the program does with them."""

from abc import ABC, abstractmethod
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from moempi.errors import DataError, NoInputError

Use = Callable[[], object]


class Subject(ABC):
    """One class of inputs; every input lies in a folder of its own, which is the current folder.

    `file` is the file that inputs differ in. `codes` are the exit codes that a refusal may have, `named` the texts of
    which it must name one. `commands` are command lines of the program that use an input, one after the other.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    codes: ClassVar[Sequence[int]] = (DataError.exit_code, NoInputError.exit_code)
    named: ClassVar[Sequence[str]] = ()
    commands: ClassVar[Sequence[str]] = ()

    def __init__(self, seeds: Path) -> None:  # noqa: B027
        """Read what inputs are made from; `seeds` holds undamaged files (see seeds.py), also as `../seeds`."""

    @abstractmethod
    def write(self, random: Random) -> Any:
        """Write an input into the current folder, as a function of `random` alone; returns what `uses` must know."""

    @abstractmethod
    def uses(self, known: Any) -> Sequence[Use]:
        """What the program does with an input; each raises a MoempiError if it refuses it, WrongError if it must."""


class WrongError(Exception):
    """The program accepted an input and read something else than it holds."""


def require(condition: bool, what: str) -> None:
    """Raise WrongError unless a condition holds."""
    if not condition:
        raise WrongError(what)


def main(words: str) -> int:
    """Run a command line without `moempi` and quotes, like `run`."""
    return run(*words.split())


def run(name: str, *words: str) -> int:
    """Run one command and return its exit status; raises what the command raises."""
    module, parser = _command(name)
    code: int = module.run(parser.parse_args(words))
    return code


@cache
def _command(name: str) -> tuple[Any, ArgumentParser]:
    module, parser = import_module(f"moempi.commands.{name}"), ArgumentParser()
    module.add_flags(parser)
    parser.set_defaults(debug=False)
    return module, parser
