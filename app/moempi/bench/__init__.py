"""`moempi bench`: figures of moempi and of other implementations, measured alternately in the same run.

Each benchmark is a module with `add_flags(parser)` and `run(world, chosen)`, which is collective and prints on rank 0.
"""

from argparse import REMAINDER, ArgumentParser, Namespace
from importlib import import_module
from typing import NoReturn

from moempi.errors import UsageError
from moempi.runtime.monitor import Monitor
from moempi.runtime.shm_segments import choose_segment_folder

BENCHMARKS = (
    "product",
    "layer",
    "generate",
    "score",
    "exchange",
    "overlap",
    "immediate",
    "placement",
    "plan",
    "start",
    "record",
    "gpu",
)


class _Parser(ArgumentParser):
    """A parser that raises UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_flags(parser: ArgumentParser) -> None:
    """The name of the benchmark, and the arguments for it."""
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("arguments", nargs=REMAINDER, help="the benchmark's own arguments")


def run(chosen: Namespace) -> int:
    """Run the benchmark; collective, blocks. Raises UsageError for flags that the benchmark does not have."""
    choose_segment_folder()
    monitor = Monitor()
    monitor.fork()
    from moempi.runtime.world import World

    benchmark = import_module(f"moempi.bench.{chosen.name}")
    parser = _Parser(prog=f"moempi bench {chosen.name}", description=benchmark.__doc__)
    benchmark.add_flags(parser)
    own = parser.parse_args(chosen.arguments)
    world = World.start(monitor, debug=chosen.debug)
    with world.guard():
        benchmark.run(world, own)
    return 0
