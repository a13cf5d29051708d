"""Benchmarks: each figure beside that of another implementation, measured in turns in the same run."""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn

from moempi.errors import UsageError


class _Parser(ArgumentParser):
    """A parser whose errors end like those of the command line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(name: str, arguments: Sequence[str]) -> int:
    """Run the benchmark `name` on all ranks and print its figures on rank 0; returns the exit status; collective.

    Raises UsageError for flags that the benchmark does not have.
    """
    from moempi.bench import exchange, generate, gpu, immediate, layer, overlap, placement, plan
    from moempi.runtime.world import World

    benchmark = {
        "layer": layer,
        "exchange": exchange,
        "overlap": overlap,
        "immediate": immediate,
        "placement": placement,
        "gpu": gpu,
        "plan": plan,
        "generate": generate,
    }[name]
    parser = _Parser(prog=f"moempi bench {name}", description=benchmark.__doc__)
    benchmark.add_flags(parser)
    chosen = parser.parse_args(arguments)
    world = World.start()
    with world.guard():
        benchmark.run(world, chosen)
    return 0
