"""Replay of recorded routing: what a placement would send over each level of links, and compute on each rank. Pure.

The counts are those that a run with the same routing and the same steps counts itself (`parallel.transports.counted`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moempi.arrays import Float64Array, IntArray
from moempi.config.topology_file import Level
from moempi.layout.forwarders import Forwarders
from moempi.layout.placement import Placement
from moempi.layout.topology import LEVELS, Topology


@dataclass(frozen=True, slots=True)
class Routes:
    """What was recorded of one layer: T tokens on their `homes` (T,), ranks of the layer's stage, counted from 0.

    `rows` (T,) number the tokens of a home in a step, `steps` (T,) say which travelled together; `experts` (T, K).
    """

    homes: IntArray
    rows: IntArray
    steps: IntArray
    experts: IntArray


@dataclass(frozen=True, slots=True)
class Cluster:
    """The ranks of a stage and where they stand; how rows travel, what links and rows cost.

    Where the answers of a layer go to the next stage, `answers` is off: they are counted nowhere.
    """

    topology: Topology
    hops: int
    row_bytes: int
    levels: Sequence[Level]
    row_s: float
    counts_combine: bool = True

    @property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank (R,)."""
        return self.topology.nodes

    @property
    def latencies_s(self) -> Float64Array:
        """Time of an empty message by level, as LEVELS has them."""
        return np.array([level.latency_us * 1e-6 for level in self.levels])

    @property
    def bytes_per_s(self) -> Float64Array:
        """What a rank sends by level."""
        return np.array([level.bandwidth_gb_s * 1e9 for level in self.levels])


@dataclass(slots=True)
class ExchangeForecast:
    """Per rank: bytes and messages sent by level (R, levels), and rows computed (R,). Time is that of the busiest."""

    cluster: Cluster
    sent_bytes: IntArray
    messages: IntArray
    rows: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def time_s(self) -> float:
        """Rows of the busiest rank, and bytes and messages of the busiest rank's links."""
        links = self.sent_bytes / self.cluster.bytes_per_s + self.messages * self.cluster.latencies_s
        return float(links.sum(axis=1).max() + self.rows.max() * self.cluster.row_s)

    @property
    def imbalance(self) -> float:
        """(max - mean) / mean of the rows of the ranks; 0 without any."""
        mean = float(self.rows.mean())
        return float(self.rows.max()) / mean - 1 if mean else 0.0


def replay(routes: Routes, placement: Placement, cluster: Cluster) -> ExchangeForecast:
    """What the layer's exchanges would send and compute under this placement."""
    num_ranks = len(cluster.nodes)
    forecast = ExchangeForecast(cluster, *(np.zeros((num_ranks, len(LEVELS)), np.int64) for _ in range(2)))
    hosts = placement.ranks[_physical_ids(routes, placement, cluster)]
    forecast.rows = np.bincount(hosts.reshape(-1), minlength=num_ranks)
    levels = np.stack([cluster.topology.levels(rank) for rank in range(num_ranks)])
    if cluster.hops == 1:
        homes, steps = (np.repeat(column, hosts.shape[1]) for column in (routes.homes, routes.steps))
        _travel(forecast, levels, steps, homes, hosts.reshape(-1))
        return forecast
    gates = np.stack([Forwarders(cluster.nodes, rank).ranks for rank in range(num_ranks)])
    nodes = np.array(cluster.nodes)[hosts]
    crosses = np.zeros((len(nodes), cluster.topology.num_nodes), bool)
    crosses[np.arange(len(nodes))[:, None], nodes] = True
    tokens, entered = np.nonzero(crosses)
    _travel(forecast, levels, routes.steps[tokens], routes.homes[tokens], gates[routes.homes[tokens], entered])
    entrances = gates[routes.homes[:, None], nodes].reshape(-1)
    _travel(forecast, levels, np.repeat(routes.steps, hosts.shape[1]), entrances, hosts.reshape(-1))
    return forecast


def _physical_ids(routes: Routes, placement: Placement, cluster: Cluster) -> IntArray:
    """The key that each choice goes to (T, K)."""
    tables = np.stack([placement.physical_ids(rank, cluster.topology) for rank in range(len(cluster.nodes))])
    turns = (routes.rows % placement.replica_period)[:, None]
    found: IntArray = tables[routes.homes[:, None], routes.experts * placement.replica_period + turns]
    return found


def _travel(
    forecast: ExchangeForecast, levels: IntArray, steps: IntArray, sources: IntArray, targets: IntArray
) -> None:
    """Add rows that go from sources to targets, a message for all of a step and pair; and the way back."""
    num_ranks = len(levels)
    pairs = sources * num_ranks + targets
    rows = np.bincount(pairs, minlength=num_ranks**2).reshape(num_ranks, num_ranks)
    together = np.unique(steps * num_ranks**2 + pairs) % num_ranks**2
    messages = np.bincount(together, minlength=num_ranks**2).reshape(num_ranks, num_ranks)
    for sent, told in ((rows, messages), (rows.T, messages.T))[: 1 + forecast.cluster.counts_combine]:
        for level in range(len(LEVELS)):
            forecast.sent_bytes[:, level] += np.where(levels == level, sent, 0).sum(axis=1) * forecast.cluster.row_bytes
            forecast.messages[:, level] += np.where(levels == level, told, 0).sum(axis=1)
