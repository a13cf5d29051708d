"""machine.toml: what a rank and its links can do, as reached, not as printed on the box; jobs/machines has some.

Keys: `name`, `tflops` of products and `memory_gb_s` of a rank, `turn_us`, the host's time for each turn of a lane
however few its rows, `reads_ahead`, whether weights are read while products are computed (GPUs) or before (a processor
whose products pack them first), and `levels`, the links as topology.json has them.
"""

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from moempi.config.architecture import LARGEST, Positive
from moempi.config.reading import read_toml
from moempi.config.topology_file import LEVEL_NAMES, Level
from moempi.errors import ConfigError


class MachineFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole machine file."""

    name: str
    tflops: Positive
    memory_gb_s: Positive
    levels: tuple[Level, ...]
    turn_us: Annotated[float, Meta(ge=0, le=LARGEST)] = 0.0
    reads_ahead: bool = True


def read_machine(path: str | Path) -> MachineFile:
    """Read a machine; raises NoInputError when it cannot be read, ConfigError that says what is wrong otherwise."""
    machine = read_toml(path, MachineFile)
    if tuple(level.name for level in machine.levels) != LEVEL_NAMES:
        raise ConfigError(f"{path}: levels are not {', '.join(LEVEL_NAMES)}")
    return machine
