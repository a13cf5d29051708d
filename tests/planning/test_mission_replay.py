"""The schedule replayed with the mission's shapes: 61 stages of 64 ranks in 8 nodes, or one stage of 61 layers."""

import pytest

from moempi.config.architecture import Architecture
from moempi.config.machine_file import read_machine
from moempi.config.reading import read_toml
from moempi.layout.topology import virtual
from moempi.planning.simulate import overlapped_s, waiting_s
from moempi.planning.step_cost import StepCosts, StepLoad
from mpirun import ROOT

RANKS, RANKS_PER_NODE = 64, 8
ROW_BYTES = 2 * 7168
ONE_LAYER, ALL_LAYERS = range(30, 31), range(61)
PREFILL, DECODE = StepLoad(4096, 2, 2048), StepLoad(58, 58, 2048)


def replay(layers, load, *, lanes, tensor=1):
    """Seconds of a step over the longer of compute and travel, overlapped and waiting; two hops."""
    architecture = read_toml(ROOT / "jobs" / "arch" / "mission.toml", Architecture)
    machine = read_machine(ROOT / "jobs" / "machines" / "mission-h100.toml")
    topology = virtual(RANKS, RANKS_PER_NODE)
    costs = StepCosts(
        machine, architecture, topology, tensor=tensor, hops=2, hosted=1, row_bytes=ROW_BYTES, value_bytes=2
    )
    whole = len(layers) == architecture.num_layers
    phases = costs.step(layers, load, is_first=whole, is_last=whole)
    compute_s = sum(phase.compute_s + phase.beside_s for phase in phases)
    travel_s = max(sum(phase.travel_s for phase in phases), sum(phase.link_s for phase in phases))
    assert travel_s > 0.03 * compute_s
    longer = lanes * max(compute_s, travel_s)
    return overlapped_s(phases, lanes=lanes) / longer, waiting_s(phases, lanes=lanes) / longer


@pytest.mark.parametrize(("load", "waiting_at_least"), [(PREFILL, 1.4), (DECODE, 1.03)])
@pytest.mark.parametrize("layers", [ONE_LAYER, ALL_LAYERS])
def test_two_lanes_hide_the_travel_of_two_hops(layers, load, waiting_at_least):
    overlapped, waiting = replay(layers, load, lanes=2)
    assert overlapped <= 1.03
    assert waiting >= waiting_at_least


@pytest.mark.parametrize("load", [PREFILL, DECODE])
def test_at_most_six_lanes_hide_the_travel_of_tensor_groups_of_a_node(load):
    group = StepLoad(load.rows * 8, load.sequences * 8, load.context) if load is PREFILL else load
    best = min(replay(ONE_LAYER, group, lanes=lanes, tensor=8) for lanes in range(2, 7))
    assert best[0] <= 1.12
    assert best[1] >= 1.2
