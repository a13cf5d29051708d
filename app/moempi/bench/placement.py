"""`moempi bench placement`: what placements save, on routing that is made up and on that of a run. Takes no ranks."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moempi.commands.flags import amount, count
from moempi.commands.place import ASSUMED, PlacementRequest, place_experts, row_of
from moempi.layout.topology import LEVELS, NETWORK, Topology
from moempi.observe.placement_table import print_policies
from moempi.planning.policies import POLICIES, choose_placement
from moempi.planning.replay import Cluster, Routes, replay
from moempi.runtime.world import World

WIDTH_BYTES = 14_336
ROWS_PER_STEP = 64
ROW_S = 1e-6
LOYALTY = 0.9


def add_flags(parser: ArgumentParser) -> None:
    """Sizes of the made-up routing, and the results file of a run."""
    parser.add_argument("--tokens", type=count, default=20_000, metavar="T", help="tokens of made-up routing (20000)")
    parser.add_argument("--experts", type=count, default=64, metavar="E", help="experts (64)")
    parser.add_argument("--top-k", type=count, default=8, metavar="K", help="experts of a token (8)")
    parser.add_argument("--ranks", type=count, default=16, metavar="R", help="ranks (16)")
    parser.add_argument("--ranks-per-node", type=count, default=4, metavar="N", help="ranks on a node (4)")
    parser.add_argument("--replicas", type=amount, default=0.25, help="copies for skewed routing, of experts (0.25)")
    parser.add_argument("--results", type=Path, metavar="RESULTS.h5", help="of a run with trace.routing = true")


@dataclass(frozen=True, slots=True)
class RoutingMaker:
    """Makes routing up: T tokens of R homes, each in steps of ROWS_PER_STEP, for K of E experts."""

    tokens: int
    experts: int
    top_k: int
    ranks: int

    def routes(self, liking: np.ndarray[tuple[int, int], np.dtype[np.float64]], *, seed: int) -> Routes:
        """Routing in which token t chooses expert e in proportion to liking[t, e] (T, E), without repetition."""
        random = np.random.default_rng(seed)
        # The K least of exponential times of rate `liking`: drawing without replacement (Efraimidis & Spirakis 2006).
        times = random.exponential(size=(self.tokens, self.experts)) / liking
        order = np.arange(self.tokens) // self.ranks
        experts = np.argpartition(times, self.top_k - 1, axis=1)[:, : self.top_k]
        homes = np.arange(self.tokens) % self.ranks
        return Routes(homes, order % ROWS_PER_STEP, order // ROWS_PER_STEP, experts)

    def communities(self, *, num: int, seed: int = 1) -> Routes:
        """Experts form `num` communities, scattered over all numbers; a token's choices are mostly of one."""
        random = np.random.default_rng(seed)
        community = random.permutation(self.experts) % num
        own = community == random.integers(0, num, self.tokens)[:, None]
        size = self.experts / num
        return self.routes(np.where(own, LOYALTY / size, (1 - LOYALTY) / (self.experts - size)), seed=seed)

    def zipf(self, *, seed: int = 2) -> Routes:
        """The i-th liked expert is chosen in proportion to 1 / i."""
        rank = np.random.default_rng(seed).permutation(self.experts)
        return self.routes(np.broadcast_to(1 / (1 + rank), (self.tokens, self.experts)), seed=seed)


def run(world: World, chosen: Namespace) -> None:
    """Print a table for each kind of routing; on rank 0, the others wait."""
    if world.rank == 0:
        maker = RoutingMaker(chosen.tokens, chosen.experts, chosen.top_k, chosen.ranks)
        where = Topology(tuple(rank // chosen.ranks_per_node for rank in range(chosen.ranks)))
        for hops in (1, 2):
            machine = Cluster(where, hops, WIDTH_BYTES, ASSUMED, ROW_S)
            _show(f"{where.num_nodes} communities, hops = {hops}", maker.communities(num=where.num_nodes), machine, 0.0)
        for share in (0.0, chosen.replicas):
            _show(
                f"Zipf, hops = 1, {share:.0%} replicas",
                maker.zipf(),
                Cluster(where, 1, WIDTH_BYTES, ASSUMED, ROW_S),
                share,
            )
        if chosen.results:
            for share in (0.0, chosen.replicas):
                rows = place_experts(chosen.results, PlacementRequest(replicas=share), policy="topology", out=None)
                print_policies(rows, title=f"{chosen.results}, {share:.0%} replicas", levels=LEVELS)
    world.comm.Barrier()


def _show(title: str, routes: Routes, machine: Cluster, share: float) -> None:
    num_experts = int(routes.experts.max()) + 1
    rows = []
    for policy in POLICIES:
        keys = num_experts + round(share * num_experts)
        found = choose_placement(policy, routes, machine, num_experts=num_experts, num_physical=keys)
        rows.append(row_of(policy, [replay(routes, found, machine)]))
    saved = 1 - rows[-1].sent_bytes[NETWORK] / max(rows[0].sent_bytes[NETWORK], 1)
    print_policies(rows, title=f"{title}: topology sends {saved:.0%} less between nodes than linear", levels=LEVELS)
