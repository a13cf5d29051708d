"""Replay of recorded routing: what a placement would send over each level of links and compute on each rank. Pure.

The counts equal those that a run with the same routing and steps counts itself (`comm.transports.counted`).
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
    """Recorded routing of one layer: T tokens with `homes` (T,), ranks of the layer's stage counted from 0.

    `rows` (T,) number the tokens of a home in a step, `steps` (T,) are the steps, `experts` (T, K) the choices.
    """

    homes: IntArray
    rows: IntArray
    steps: IntArray
    experts: IntArray


@dataclass(frozen=True, slots=True)
class Cluster:
    """The ranks of a stage, the number of hops, and the costs of links and rows (`row_s` seconds per row at an expert).

    `counts_combine` is False for a layer with immediate routing, whose combine transfers leave the stage and are not
    counted.
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
        """Latency by level, in the order of LEVELS."""
        return np.array([level.latency_us * 1e-6 for level in self.levels])

    @property
    def bytes_per_s(self) -> Float64Array:
        """Bandwidth of a rank by level, in the order of LEVELS."""
        return np.array([level.bandwidth_gb_s * 1e9 for level in self.levels])


@dataclass(slots=True)
class ExchangeForecast:
    """Per rank: bytes and messages sent by level (R, levels), and rows computed (R,)."""

    cluster: Cluster
    sent_bytes: IntArray
    messages: IntArray
    rows: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def time_s(self) -> float:
        """Compute time of the busiest rank plus transfer time of the rank with the busiest links."""
        links = self.sent_bytes / self.cluster.bytes_per_s + self.messages * self.cluster.latencies_s
        return float(links.sum(axis=1).max() + self.rows.max() * self.cluster.row_s)

    @property
    def imbalance(self) -> float:
        """(max - mean) / mean of the rows of the ranks; 0 without rows."""
        mean = float(self.rows.mean())
        return float(self.rows.max()) / mean - 1 if mean else 0.0


def replay(routes: Routes, placement: Placement, cluster: Cluster) -> ExchangeForecast:
    """Forecast what the layer's exchanges would send and compute with this placement."""
    num_ranks = len(cluster.nodes)
    forecast = ExchangeForecast(cluster, *(np.zeros((num_ranks, len(LEVELS)), np.int64) for _ in range(2)))
    hosts = placement.ranks[_physical_ids(routes, placement, cluster)]
    forecast.rows = np.bincount(hosts.reshape(-1), minlength=num_ranks)
    levels = np.stack([cluster.topology.levels(rank) for rank in range(num_ranks)])
    if cluster.hops == 1:
        homes, steps = (np.repeat(column, hosts.shape[1]) for column in (routes.homes, routes.steps))
        _add_transfers(forecast, levels, steps, homes, hosts.reshape(-1))
        return forecast
    forwarders = np.stack([Forwarders(cluster.nodes, rank).ranks for rank in range(num_ranks)])
    nodes = np.array(cluster.nodes)[hosts]
    reached = np.zeros((len(nodes), cluster.topology.num_nodes), bool)
    reached[np.arange(len(nodes))[:, None], nodes] = True
    tokens, targets = np.nonzero(reached)
    homes = routes.homes[tokens]
    _add_transfers(forecast, levels, routes.steps[tokens], homes, forwarders[homes, targets])
    sources = forwarders[routes.homes[:, None], nodes].reshape(-1)
    _add_transfers(forecast, levels, np.repeat(routes.steps, hosts.shape[1]), sources, hosts.reshape(-1))
    return forecast


def _physical_ids(routes: Routes, placement: Placement, cluster: Cluster) -> IntArray:
    """The physical expert of each choice (T, K)."""
    tables = np.stack([placement.physical_ids(rank, cluster.topology) for rank in range(len(cluster.nodes))])
    residues = (routes.rows % placement.replica_period)[:, None]
    found: IntArray = tables[routes.homes[:, None], routes.experts * placement.replica_period + residues]
    return found


def _add_transfers(
    forecast: ExchangeForecast, levels: IntArray, steps: IntArray, sources: IntArray, targets: IntArray
) -> None:
    """Add rows from sources to targets, one message per step and pair of ranks, and their combine."""
    num_ranks = len(levels)
    pairs = sources * num_ranks + targets
    rows = np.bincount(pairs, minlength=num_ranks**2).reshape(num_ranks, num_ranks)
    pairs_of_steps = np.unique(steps * num_ranks**2 + pairs) % num_ranks**2
    messages = np.bincount(pairs_of_steps, minlength=num_ranks**2).reshape(num_ranks, num_ranks)
    directions = ((rows, messages), (rows.T, messages.T))
    for num_rows, num_messages in directions[: 1 + forecast.cluster.counts_combine]:
        num_bytes = num_rows * forecast.cluster.row_bytes
        for level in range(len(LEVELS)):
            forecast.sent_bytes[:, level] += np.where(levels == level, num_bytes, 0).sum(axis=1)
            forecast.messages[:, level] += np.where(levels == level, num_messages, 0).sum(axis=1)
