"""Arithmetic, bytes and seconds of the mission's stages against an independent count from its architecture alone."""

from math import inf
from pathlib import Path

import pytest
from msgspec import structs

from moempi.config.architecture import Architecture
from moempi.config.machine_file import read_machine
from moempi.config.reading import read_toml
from moempi.layout.topology import virtual
from moempi.planning.step_cost import StepCosts, StepLoad

JOBS = Path(__file__).resolve().parent.parent.parent / "jobs"
MISSION = read_toml(JOBS / "arch/mission.toml", Architecture)
MACHINE = read_machine(JOBS / "machines/mission-h100.toml")
FLOPS, MEMORY = 400e12 * 0.6, 1.8e12 * 0.8
D, H, EXPERTS, TOP_K, F, DENSE, VOCAB, RANKS, BF16 = 7168, 128 * 128, 64, 8, 2048, 18432, 129280, 64, 2
DENSE_LAYER, MOE_LAYER, LAST_LAYER = 0, 30, 60


def count(layer, *, rows, sequences, context, tensor):
    """Flops and bytes of each part of a step on a rank; a tensor group of `tensor` ranks has `rows` of `sequences`."""
    matrix = lambda values, of: (2 * values * of, BF16 * values)  # noqa: E731
    keys = values = H / tensor
    parts = {
        "projections": matrix(4 * D * H / tensor, rows),
        "cache": (2 * rows * context * (keys + values), sequences * context * (keys + values) * BF16),
    }
    if layer == DENSE_LAYER:
        parts["dense"] = matrix(3 * D * DENSE / tensor, rows)
    else:
        parts["router"] = matrix(D * EXPERTS, rows / tensor)
        of_an_expert = rows / tensor * RANKS * TOP_K / EXPERTS
        parts["expert"] = matrix(3 * D * F, of_an_expert)
    if layer == LAST_LAYER:
        parts["head"] = matrix(D * VOCAB / tensor, sequences)
    return parts


def compute_s(layer, load, tensor, **machine):
    """Seconds of computing in a step of a stage of one layer, by the model."""
    costs = StepCosts(
        structs.replace(MACHINE, **machine),
        MISSION,
        virtual(RANKS, 8),
        tensor=tensor,
        hops=2,
        hosted=1,
        row_bytes=D * BF16,
        value_bytes=BF16,
    )
    phases = costs.step(range(layer, layer + 1), load, is_first=layer == DENSE_LAYER, is_last=layer == LAST_LAYER)
    return sum(phase.compute_s + phase.beside_s for phase in phases)


@pytest.mark.parametrize("layer", [DENSE_LAYER, MOE_LAYER, LAST_LAYER])
@pytest.mark.parametrize(
    ("rows", "sequences", "context", "tensor"),
    [(4096, 1, 2048, 1), (16384, 4, 2048, 8), (54, 54, 2048, 8), (432, 432, 2048, 8), (54, 54, 2048, 1)],
)
def test_arithmetic_bytes_and_seconds_of_a_stage_are_those_of_an_independent_count(
    layer, rows, sequences, context, tensor
):
    parts = count(layer, rows=rows, sequences=sequences, context=context, tensor=tensor).values()
    load = StepLoad(rows, sequences, context)
    flops, num_bytes = (sum(numbers) for numbers in zip(*parts, strict=True))
    assert compute_s(layer, load, tensor, memory_gb_s=inf) * FLOPS == pytest.approx(flops, rel=0.01)
    assert compute_s(layer, load, tensor, tflops=inf) * MEMORY == pytest.approx(num_bytes, rel=0.01)
    seconds = sum(max(arithmetic / FLOPS, moved / MEMORY) for arithmetic, moved in parts)
    assert compute_s(layer, load, tensor) == pytest.approx(seconds, rel=0.01)
