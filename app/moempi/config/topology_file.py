"""topology.json: how quick links are, and which ranks share a node. `moempi check --measure` writes it.

    {"version": 1,
     "levels": [{"name": "self", "latency_us": 0.4, "bandwidth_gb_s": 9.1},
                {"name": "node", "latency_us": 3.1, "bandwidth_gb_s": 5.2},
                {"name": "network", "latency_us": 9.0, "bandwidth_gb_s": 1.1}],
     "nodes": [0, 0, 1, 1]}

A message of n bytes takes its level's latency and n over its bandwidth, which is that of one rank that sends.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from moempi.config.architecture import LARGEST, Index, Positive
from moempi.config.reading import read_json
from moempi.errors import ConfigError

NAMES = ("self", "node", "network")


class Level(Struct, frozen=True, forbid_unknown_fields=True):
    """One level of links: to the rank itself, inside its node, between nodes."""

    name: Literal["self", "node", "network"]
    latency_us: Annotated[float, Meta(ge=0, le=LARGEST)]
    bandwidth_gb_s: Positive


class TopologyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole topology file: its three levels from near to far, and the node of each rank, counted node by node."""

    version: Literal[1]
    levels: tuple[Level, ...]
    nodes: tuple[Index, ...]

    def problem(self) -> str | None:
        """What makes this topology impossible, or None."""
        if tuple(level.name for level in self.levels) != NAMES:
            return f"levels are not {', '.join(NAMES)}"
        if not self.nodes or self.nodes[0] != 0 or any(b - a not in (0, 1) for a, b in pairwise(self.nodes)):
            return "nodes do not count up from 0"
        return None


def read_topology(path: str | Path) -> TopologyFile:
    """Read a topology; raises NoInputError when it cannot be read, ConfigError that says what is wrong otherwise."""
    file = read_json(path, TopologyFile)
    problem = file.problem()
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return file
