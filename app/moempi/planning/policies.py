"""Choosing where the experts of one layer stand, from its recorded routing. Pure.

`linear` is the default of a run. `balanced` evens the load of the ranks, wherever their tokens come from. `topology`
also gathers experts by node, with several prices on uneven nodes, and takes what `replay` foretells the least time for:
rows of the busiest rank, bytes and messages of the busiest links. A rank hosts no more experts of a layer than an even
share, so one at most where there are as many ranks as experts and copies.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moempi.layout.placement import Placement, linear
from moempi.planning.colocate import Uses, clusters, gather
from moempi.planning.load_balance import copies, even_out, fill, rooms
from moempi.planning.replay import Machine, Routes, replay

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

POLICIES = ("linear", "balanced", "topology")
PRICES = (0.0, 0.3, 3.0)
"""Prices of uneven nodes, in crossings, that `topology` tries."""
SAMPLED_TOKENS = 8192
UNUSED = 1e-6
"""Load of an expert that no token chose: it stands somewhere all the same."""


def place(policy: str, routes: Routes, machine: Machine, *, num_experts: int, num_keys: int) -> Placement:
    """The placement of a policy; `num_keys` counts experts and copies, at most one of each expert on a rank."""
    if policy == "linear":
        return _linear(routes, machine, num_experts, num_keys)
    if policy == "balanced":
        return _balanced(routes, machine, num_experts, num_keys)
    tried = [_linear(routes, machine, num_experts, num_keys), _balanced(routes, machine, num_experts, num_keys)]
    if machine.topology.num_nodes > 1:
        tried += _gathered(routes, machine, num_experts, num_keys)
    return min(dict.fromkeys(tried), key=lambda placement: replay(routes, placement, machine).time_s)


def _linear(routes: Routes, machine: Machine, num_experts: int, num_keys: int) -> Placement:
    """Copies of the hottest experts go to the ranks that host fewest."""
    demand = _demand(routes, machine, num_experts)
    hosts = np.zeros(demand.shape, bool)
    for rank, experts in enumerate(linear(num_experts, len(hosts)).hosted):
        hosts[rank, list(experts)] = True
    room = rooms(num_experts, num_keys, len(hosts)) - hosts.sum(axis=1)
    more = copies(demand.sum(axis=0), num_keys, len(hosts)) - 1
    _fill_copies(hosts, np.where(more > 0, 1.0, 0.0), more, room, by_node=None)
    return _placement(hosts)


def _balanced(routes: Routes, machine: Machine, num_experts: int, num_keys: int) -> Placement:
    demand = _demand(routes, machine, num_experts)
    hosts = np.zeros(demand.shape, bool)
    counts = copies(demand.sum(axis=0), num_keys, len(hosts))
    _fill_copies(hosts, demand.sum(axis=0) / counts, counts, rooms(num_experts, num_keys, len(hosts)), by_node=None)
    even_out(hosts, demand, machine.nodes, within_nodes=False)
    return _placement(hosts)


def _gathered(routes: Routes, machine: Machine, num_experts: int, num_keys: int) -> Iterator[Placement]:
    """Experts by node from two starts and several prices, then evenly among the ranks of each node."""
    demand = _demand(routes, machine, num_experts)
    counts = copies(demand.sum(axis=0), num_keys, len(demand))
    room = rooms(num_experts, num_keys, len(demand))
    nodes = np.array(machine.nodes)
    own_room = np.bincount(nodes, rooms(num_experts, num_experts, len(demand))).astype(np.int64)
    uses = _uses(routes, machine, num_experts)
    for start in (np.repeat(np.arange(machine.topology.num_nodes), own_room), clusters(uses, own_room)):
        for price in PRICES:
            node_of = gather(uses, start, ranks_of_node=np.bincount(nodes), evenness=price)
            hosts, left = np.zeros(demand.shape, bool), room.copy()
            fill(hosts, demand.sum(axis=0) / counts, left, nodes[:, None] == node_of)
            _fill_copies(hosts, demand.sum(axis=0) / counts, counts - 1, left, by_node=nodes)
            even_out(hosts, demand, machine.nodes, within_nodes=True)
            yield _placement(hosts)


def _fill_copies(
    hosts: BoolArray, load: FloatArray, more: IntArray, room: IntArray, *, by_node: IntArray | None
) -> None:
    """Add `more` (E,) copies of each expert; with `by_node` (R,) first to nodes that have none."""
    for done in range(int(more.max(initial=0))):
        allowed = np.ones(hosts.shape, bool)
        if by_node is not None:
            allowed = ~np.stack([hosts[by_node == node].any(axis=0) for node in by_node])
        fill(hosts, np.where(more > done, load, 0.0), room, allowed)


def _demand(routes: Routes, machine: Machine, num_experts: int) -> FloatArray:
    """Rows that each rank has for each expert (R, E)."""
    num_ranks = len(machine.nodes)
    wanted = (routes.homes[:, None] * num_experts + routes.experts).reshape(-1)
    counts = np.bincount(wanted, minlength=num_ranks * num_experts).reshape(num_ranks, num_experts)
    return counts.astype(np.float64) + UNUSED


def _uses(routes: Routes, machine: Machine, num_experts: int) -> Uses:
    """Those of some tokens, evenly drawn; with one hop each choice travels alone."""
    every = max(1, -(-len(routes.homes) // SAMPLED_TOKENS))
    experts, homes = routes.experts[::every], np.array(machine.nodes)[routes.homes[::every]]
    if machine.hops == 1:
        experts, homes = experts.reshape(-1, 1), np.repeat(homes, experts.shape[1])
    return Uses.of(experts, homes, num_experts)


def _placement(hosts: BoolArray) -> Placement:
    return Placement(tuple(tuple(np.flatnonzero(on_rank).tolist()) for on_rank in hosts))
