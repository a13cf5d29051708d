"""topology.json: latency and bandwidth of links, and node, island and switch of each rank. `moempi check -o` writes it.

    {"version": 2,
     "levels": [{"name": "self", "latency_us": 0.4, "bandwidth_gb_s": 9.1},
                {"name": "island", "latency_us": 3.1, "bandwidth_gb_s": 5.2},
                {"name": "node", "latency_us": 3.1, "bandwidth_gb_s": 5.2},
                {"name": "switch", "latency_us": 9.0, "bandwidth_gb_s": 1.1},
                {"name": "network", "latency_us": 9.0, "bandwidth_gb_s": 1.1}],
     "nodes": [0, 0, 1, 1], "islands": [], "switches": []}

A message of n bytes takes the latency of its level plus n / bandwidth; the bandwidth is that of one sending rank.
Islands are NVLink or NUMA domains inside nodes; switches connect nodes. Both are numbered like nodes, and an empty list
means that they are unknown.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from moempi.config.architecture import Index
from moempi.config.reading import read_json
from moempi.errors import ConfigError

Cost = Annotated[float, Meta(ge=0, le=1e12)]
Rate = Annotated[float, Meta(ge=1e-12, le=1e12)]

LEVEL_NAMES = ("self", "island", "node", "switch", "network")
"""Levels of links from near to far: to the rank itself, in its island, in its node, below its switch, beyond it."""


class Level(Struct, frozen=True, forbid_unknown_fields=True):
    """One level of links."""

    name: Literal["self", "island", "node", "switch", "network"]
    latency_us: Cost
    bandwidth_gb_s: Rate


class TopologyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A topology file: levels from near to far, and node, island and switch of each rank (R,), counted node by node."""

    version: Literal[2]
    levels: tuple[Level, ...]
    nodes: tuple[Index, ...]
    islands: tuple[Index, ...] = ()
    switches: tuple[Index, ...] = ()

    def problem(self) -> str | None:
        """The error that makes this topology impossible, or None."""
        if tuple(level.name for level in self.levels) != LEVEL_NAMES:
            return f"levels are not {', '.join(LEVEL_NAMES)}"
        if not self.nodes or self.nodes[0] != 0 or any(b - a not in (0, 1) for a, b in pairwise(self.nodes)):
            return "nodes do not count up from 0"
        for name, numbers in (("islands", self.islands), ("switches", self.switches)):
            if numbers and len(numbers) != len(self.nodes):
                return f"{len(numbers)} {name} for {len(self.nodes)} ranks"
        if self.islands and not _is_nested(self.islands, self.nodes):
            return "an island lies in several nodes"
        if self.switches and not _is_nested(self.nodes, self.switches):
            return "a node hangs on several switches"
        return None


def read_topology(path: str | Path) -> TopologyFile:
    """Read a topology file; raises NoInputError if it cannot be read, ConfigError if it is wrong."""
    file = read_json(path, TopologyFile)
    problem = file.problem()
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return file


def _is_nested(inner: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether all ranks with the same inner number have the same outer number."""
    return len({*zip(inner, outer, strict=True)}) == len({*inner})
