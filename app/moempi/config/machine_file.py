"""machine.toml: achieved, not nominal, performance of a rank and its links; jobs/machines has examples.

`tflops` and `memory_gb_s` are the arithmetic and memory rates of a rank's matrix products. `turn_us` is the host
overhead per resumption of a lane, `tensor_overhead_us` that after a transfer of its tensor group (`turn_us` by
default), which plans no rows. `memory_gb` is the memory of a rank, 0 if unknown. `reads_ahead` is true if reading of
weights overlaps with arithmetic (GPUs), false if it comes first (a CPU whose products pack the weights).
`preempts_attention` is true if kernels of attention give way to those of other lanes (GPUs, which schedule kernels by
priority), false if a rank computes one phase after another (CPUs). `levels` are the links, as in topology.json.
"""

from pathlib import Path

from msgspec import Struct

from moempi.config.reading import read_toml
from moempi.config.topology_file import LEVEL_NAMES, Cost, Level, Rate
from moempi.errors import ConfigError


class MachineFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A machine file."""

    name: str
    tflops: Rate
    memory_gb_s: Rate
    levels: tuple[Level, ...]
    memory_gb: Cost = 0.0
    turn_us: Cost = 0.0
    tensor_overhead_us: Cost | None = None
    reads_ahead: bool = True
    preempts_attention: bool = False


def read_machine(path: str | Path) -> MachineFile:
    """Read a machine file; raises NoInputError if it cannot be read, ConfigError if it is wrong."""
    machine = read_toml(path, MachineFile)
    if tuple(level.name for level in machine.levels) != LEVEL_NAMES:
        raise ConfigError(f"{path}: levels are not {', '.join(LEVEL_NAMES)}")
    return machine
