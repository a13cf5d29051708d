"""topology.json: how quick links are, and which ranks stand where. `moempi check -o` writes it.

    {"version": 2,
     "levels": [{"name": "self", "latency_us": 0.4, "bandwidth_gb_s": 9.1},
                {"name": "island", "latency_us": 3.1, "bandwidth_gb_s": 5.2},
                {"name": "node", "latency_us": 3.1, "bandwidth_gb_s": 5.2},
                {"name": "switch", "latency_us": 9.0, "bandwidth_gb_s": 1.1},
                {"name": "network", "latency_us": 9.0, "bandwidth_gb_s": 1.1}],
     "nodes": [0, 0, 1, 1], "islands": [], "switches": []}

A message of n bytes takes its level's latency and n over its bandwidth, which is that of one rank that sends. Islands
(inside nodes) and switches (above them) are numbered like nodes; an empty list means that they are not told apart.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from moempi.config.architecture import LARGEST, Index, Positive
from moempi.config.reading import read_json
from moempi.errors import ConfigError

LEVEL_NAMES = ("self", "island", "node", "switch", "network")
"""Levels of links from near to far: to the rank itself, in its island, its node, to other nodes, other switches."""


class Level(Struct, frozen=True, forbid_unknown_fields=True):
    """One level of links."""

    name: Literal["self", "island", "node", "switch", "network"]
    latency_us: Annotated[float, Meta(ge=0, le=LARGEST)]
    bandwidth_gb_s: Positive


class TopologyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole topology file: its levels from near to far, and node, island and switch of each rank, node by node."""

    version: Literal[2]
    levels: tuple[Level, ...]
    nodes: tuple[Index, ...]
    islands: tuple[Index, ...] = ()
    switches: tuple[Index, ...] = ()

    def problem(self) -> str | None:
        """What makes this topology impossible, or None."""
        if tuple(level.name for level in self.levels) != LEVEL_NAMES:
            return f"levels are not {', '.join(LEVEL_NAMES)}"
        if not self.nodes or self.nodes[0] != 0 or any(b - a not in (0, 1) for a, b in pairwise(self.nodes)):
            return "nodes do not count up from 0"
        for name, places in (("islands", self.islands), ("switches", self.switches)):
            if places and len(places) != len(self.nodes):
                return f"{len(places)} {name} for {len(self.nodes)} ranks"
        if self.islands and not _lies_in(self.islands, self.nodes):
            return "an island lies in several nodes"
        if self.switches and not _lies_in(self.nodes, self.switches):
            return "a node hangs on several switches"
        return None


def read_topology(path: str | Path) -> TopologyFile:
    """Read a topology; raises NoInputError when it cannot be read, ConfigError that says what is wrong otherwise."""
    file = read_json(path, TopologyFile)
    problem = file.problem()
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return file


def _lies_in(parts: Sequence[int], wholes: Sequence[int]) -> bool:
    """Whether ranks of one part are of one whole."""
    return len({*zip(parts, wholes, strict=True)}) == len({*parts})
