"""placement.json: which ranks host which experts of each Mixture-of-Experts layer. `moempi place` writes it.

    {"version": 1, "num_experts": 4, "layers": [{"layer": 1, "hosted": [[0, 3], [1, 2, 3]]}]}

`hosted` has one list per rank of the layer's stage; ranks are counted node by node. An expert on several ranks has
replicas there.
"""

from itertools import count
from pathlib import Path
from typing import Literal

from msgspec import Struct

from moempi.config.architecture import Count, Index
from moempi.config.job import Job
from moempi.config.reading import read_json
from moempi.errors import ConfigError


class HostedLayer(Struct, frozen=True, forbid_unknown_fields=True):
    """The experts of one layer on each rank of its stage."""

    layer: Index
    hosted: tuple[tuple[Index, ...], ...]

    def problem(self, num_experts: int) -> str | None:
        """The error that makes this impossible for `num_experts` experts, or None."""
        for rank, experts in enumerate(self.hosted):
            if len(set(experts)) < len(experts):
                return f"layer {self.layer}: rank {rank} lists an expert twice"
            if max(experts, default=0) >= num_experts:
                return f"layer {self.layer}: rank {rank} lists expert {max(experts)} of {num_experts}"
        hosted = set().union(*self.hosted)
        if len(hosted) < num_experts:
            return f"layer {self.layer}: no rank hosts expert {next(i for i in count() if i not in hosted)}"
        return None


class PlacementFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole placement file; `layers` ascend."""

    version: Literal[1]
    num_experts: Count
    layers: tuple[HostedLayer, ...]

    def problem(self) -> str | None:
        """The error that makes this placement impossible for any model, or None."""
        numbers = [layer.layer for layer in self.layers]
        if numbers != sorted(set(numbers)):
            return "layers do not ascend"
        return next(filter(None, (layer.problem(self.num_experts) for layer in self.layers)), None)


def read_job_placement(job: Job) -> PlacementFile | None:
    """Read the placement file of a job, None if it names none; raises as `read_placement` does."""
    return read_placement(job.placement.file) if job.placement.file else None


def read_placement(path: str | Path) -> PlacementFile:
    """Read a placement file; raises NoInputError if it cannot be read, ConfigError if it is wrong."""
    file = read_json(path, PlacementFile)
    problem = file.problem()
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return file
