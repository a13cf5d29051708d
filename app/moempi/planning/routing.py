"""Uneven routing in virtual time: how many tokens of a micro-batch choose each expert, and what ranks compute. Pure."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moempi.arrays import Float64Array, IntArray
from moempi.layout.placement import Placement
from moempi.layout.topology import Topology
from moempi.planning.step_cost import RoutedRows


class Routing(Protocol):
    """How often each expert of a layer is chosen in a step."""

    def counts(self, layer: int, steps: range, tokens: int) -> Float64Array:
        """The tokens of each step that choose each expert (n, E), if a step has `tokens` tokens."""


class DrawnRouting:
    """Tokens choose `top_k` experts, the i-th most popular of a layer in proportion to 1 / i ** exponent.

    With exponent 0 it is uniform. The tokens of an expert are drawn from a binomial distribution, each expert by
    itself; the same step has the same tokens in each forecast.
    """

    def __init__(self, num_experts: int, top_k: int, *, exponent: float) -> None:
        self._shares = inclusion_shares(np.arange(1.0, num_experts + 1) ** -exponent, top_k)

    def counts(self, layer: int, steps: range, tokens: int) -> Float64Array:
        """See Routing."""
        shares = np.random.default_rng(layer).permutation(self._shares)
        drawn = [np.random.default_rng((layer, step)).binomial(tokens, shares) for step in steps]
        return np.array(drawn, np.float64)


class RecordedRouting:
    """Recorded routing, repeated: step n has the recorded tokens that follow those of step n - 1.

    read(layer) gives the experts of all recorded tokens of a layer (T, K), T > 0, which are kept in the smallest type
    that holds them. Of fewer tokens than a step has, all count in proportion.
    """

    def __init__(self, read: Callable[[int], IntArray], num_experts: int) -> None:
        self._read = read
        self._num_experts = num_experts
        self._recorded: dict[int, NDArray[np.unsignedinteger]] = {}

    def counts(self, layer: int, steps: range, tokens: int) -> Float64Array:
        """See Routing."""
        if layer not in self._recorded:
            self._recorded[layer] = self._read(layer).astype(np.min_scalar_type(self._num_experts - 1))
        experts = self._recorded[layer]
        used = min(tokens, len(experts))
        first_tokens = (step % (len(experts) // used) * used for step in steps)
        windows = [experts[first : first + used].reshape(-1) for first in first_tokens]
        counts = [np.bincount(window, minlength=self._num_experts) for window in windows]
        return np.array(counts, np.float64) * (tokens / used)


def inclusion_shares(preferences: Float64Array, top_k: int) -> Float64Array:
    """The share of tokens that choose each expert, if each draws `top_k` without replacement by these preferences (E,).

    Drawn one after another, expert i is among them with probability 1 - exp(-t * preference), where t makes the sum
    `top_k` (asymptotically; Rosen 1972, successive sampling).
    """
    if top_k >= len(preferences):
        return np.ones(len(preferences))
    low, high = 0.0, 1.0
    while _shares(preferences, high).sum() < top_k:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _shares(preferences, middle).sum() < top_k else (low, middle)
    return _shares(preferences, high)


def _shares(preferences: Float64Array, time: float) -> Float64Array:
    shares: Float64Array = -np.expm1(-time * preferences)
    return shares


def routed_rows(counts: Float64Array, tokens: int, placement: Placement, topology: Topology) -> RoutedRows:
    """What the ranks of a stage compute and receive of a layer, if its experts have these counts (n, E) in n steps.

    Replicas of an expert share its rows evenly. Tokens are taken to choose the experts of a node independently.
    """
    num_experts, num_ranks = counts.shape[1], len(placement.hosted)
    hosted = np.zeros((num_experts, num_ranks))
    hosted[placement.experts, placement.ranks] = 1.0
    replicas = hosted.sum(axis=1)
    rows = counts @ (hosted / replicas[:, None])
    nodes = np.asarray(topology.nodes)
    on_node = np.zeros((num_experts, topology.num_nodes))
    for rank, experts in enumerate(placement.hosted):
        on_node[list(experts), nodes[rank]] += 1 / replicas[list(experts)]
    even = counts.sum(axis=1, keepdims=True) / num_experts
    reach, even_reach = (_reach(chosen / tokens, on_node) for chosen in (counts, np.broadcast_to(even, counts.shape)))
    ratio = np.divide(reach, even_reach, out=np.ones_like(reach), where=even_reach > 0)
    fields: tuple[Any, ...] = rows, (counts > 0).astype(float) @ hosted, ratio[:, nodes]
    return RoutedRows(*fields)


def _reach(shares: Float64Array, on_node: Float64Array) -> Float64Array:
    """The share of tokens with an expert on each node (n, nodes)."""
    missed: Float64Array = np.log1p(-np.minimum(shares, 1 - 1e-12)) @ on_node
    return -np.expm1(missed)
