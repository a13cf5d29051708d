"""`moempi bench placement`: bytes that placements save, with synthetic routing and with the routing of a run.

Everything is computed on one rank.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moempi.arrays import Float64Array
from moempi.commands.flags import amount, count
from moempi.commands.place import ASSUMED, PlacementRequest, place_experts, row_of
from moempi.layout.topology import LEVELS, NETWORK, Topology
from moempi.observe.placement_table import print_policies
from moempi.planning.policies import POLICIES, choose_placement
from moempi.planning.replay import Cluster, Routes, replay
from moempi.runtime.world import World

ROW_BYTES = 14_336
ROWS_PER_STEP = 64
ROW_S = 1e-6
"""Seconds in which an expert computes a row."""
COMMUNITY_SHARE = 0.9
"""Share of a token's choices that are experts of its own community."""


def add_flags(parser: ArgumentParser) -> None:
    """Sizes of the synthetic routing, and the results file of a run."""
    parser.add_argument("--tokens", type=count, default=20_000, metavar="T", help="tokens of synthetic routing (20000)")
    parser.add_argument("--experts", type=count, default=64, metavar="E", help="experts (64)")
    parser.add_argument("--top-k", type=count, default=8, metavar="K", help="experts of a token (8)")
    parser.add_argument("--ranks", type=count, default=16, metavar="R", help="ranks (16)")
    parser.add_argument("--ranks-per-node", type=count, default=4, metavar="N", help="ranks on a node (4)")
    parser.add_argument("--replicas", type=amount, default=0.25, help="replicas for skewed routing, as a share (0.25)")
    parser.add_argument("--results", type=Path, metavar="RESULTS.h5", help="of a run with trace.routing and trace.home")


@dataclass(frozen=True, slots=True)
class RoutingMaker:
    """Makes synthetic routing: T tokens choose K of E experts; each of R home ranks has ROWS_PER_STEP rows per step."""

    tokens: int
    experts: int
    top_k: int
    ranks: int

    def routes(self, preferences: Float64Array, *, seed: int) -> Routes:
        """Routing in which a token draws experts without replacement, in proportion to its preferences (T, E)."""
        random = np.random.default_rng(seed)
        # The K smallest exponential times, with the preferences as rates, are such a draw (Efraimidis & Spirakis 2006).
        times = random.exponential(size=(self.tokens, self.experts)) / preferences
        order = np.arange(self.tokens) // self.ranks
        experts = np.argpartition(times, self.top_k - 1, axis=1)[:, : self.top_k]
        homes = np.arange(self.tokens) % self.ranks
        return Routes(homes, order % ROWS_PER_STEP, order // ROWS_PER_STEP, experts)

    def communities(self, *, num: int, seed: int = 1) -> Routes:
        """Routing in which experts form `num` communities, in random order, and most choices of a token are in one."""
        random = np.random.default_rng(seed)
        community = random.permutation(self.experts) % num
        own = community == random.integers(0, num, self.tokens)[:, None]
        size = self.experts / num
        inside, outside = COMMUNITY_SHARE / size, (1 - COMMUNITY_SHARE) / (self.experts - size)
        return self.routes(np.where(own, inside, outside), seed=seed)

    def zipf(self, *, seed: int = 2) -> Routes:
        """Routing in which the i-th most popular expert is chosen in proportion to 1 / i."""
        rank = np.random.default_rng(seed).permutation(self.experts)
        return self.routes(np.broadcast_to(1 / (1 + rank), (self.tokens, self.experts)), seed=seed)


def run(world: World, chosen: Namespace) -> None:
    """Print a table for each kind of routing on rank 0, for which the other ranks wait; collective."""
    if world.rank == 0:
        maker = RoutingMaker(chosen.tokens, chosen.experts, chosen.top_k, chosen.ranks)
        topology = Topology(tuple(rank // chosen.ranks_per_node for rank in range(chosen.ranks)))
        clusters = {hops: Cluster(topology, hops, ROW_BYTES, ASSUMED, ROW_S) for hops in (1, 2)}
        routes = maker.communities(num=topology.num_nodes)
        for hops, cluster in clusters.items():
            _print_policies(f"{topology.num_nodes} communities, hops = {hops}", routes, cluster, replicas=0.0)
        for share in (0.0, chosen.replicas):
            _print_policies(f"Zipf, hops = 1, {share:.0%} replicas", maker.zipf(), clusters[1], replicas=share)
        if chosen.results:
            for share in (0.0, chosen.replicas):
                rows = place_experts(chosen.results, PlacementRequest(replicas=share), policy="topology", out=None)
                print_policies(rows, title=f"{chosen.results}, {share:.0%} replicas", levels=LEVELS)
    world.comm.Barrier()


def _print_policies(title: str, routes: Routes, cluster: Cluster, *, replicas: float) -> None:
    num_experts = int(routes.experts.max()) + 1
    rows = []
    for policy in POLICIES:
        num_physical = num_experts + round(replicas * num_experts)
        placement = choose_placement(policy, routes, cluster, num_experts=num_experts, num_physical=num_physical)
        rows.append(row_of(policy, [replay(routes, placement, cluster)]))
    saved = 1 - rows[-1].sent_bytes[NETWORK] / max(rows[0].sent_bytes[NETWORK], 1)
    print_policies(rows, title=f"{title}: topology sends {saved:.0%} less between nodes than linear", levels=LEVELS)
