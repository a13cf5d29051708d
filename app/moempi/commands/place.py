"""`moempi place`: a placement of experts, chosen from the recorded routing of a run, and what it would send."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from moempi.commands.flags import add_force_flag, amount, count, whole_number
from moempi.config.placement_file import HostedLayer, PlacementFile
from moempi.config.topology_file import Level, TopologyFile, read_topology
from moempi.errors import DataError, UsageError
from moempi.layout.placement import Placement
from moempi.layout.topology import LEVELS, Topology, from_file, numbered
from moempi.observe.placement_table import PolicyRow, print_policies
from moempi.planning.policies import POLICIES, choose_placement
from moempi.planning.replay import Cluster, ExchangeForecast, Routes, replay
from moempi.storage.files import atomic, check_output
from moempi.storage.results_layout import NOWHERE
from moempi.storage.routing import RoutingFile

ASSUMED = (
    Level("self", 0.0, 1000.0),
    *(Level(name, 2.0, 150.0) for name in ("island", "node")),
    *(Level(name, 5.0, 25.0) for name in ("switch", "network")),
)
"""Links if no topology was measured: of the order of NVLink and 200 Gbit/s InfiniBand."""
MAX_REPLICAS = 8.0
MAX_STAGE_RANKS = 4096
MAX_ROW_BYTES = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """The ranks and links to choose a placement for, and the number of `replicas` as a share of the experts.

    `topology` holds the measured links, None if there are none. An expert computes a row in `row_s` seconds; 0 stands
    for the run's compute time divided by all rows that its experts computed. With `ranks` above 0 every layer is placed
    on that many ranks, `ranks_per_node` on a node (0: all), else on the ranks of the run. Only the first `tokens` of
    each layer are used.
    """

    replicas: float = 0.0
    topology: TopologyFile | None = None
    ranks: int = 0
    ranks_per_node: int = 0
    row_s: float = 0.0
    tokens: int = 200_000


def add_flags(parser: ArgumentParser) -> None:
    """The recorded run, the policy, and the ranks and links to choose a placement for."""
    parser.add_argument("results", type=Path, metavar="RESULTS.h5", help="of a run with trace.routing and trace.home")
    parser.add_argument("-o", "--out", type=Path, metavar="PLACEMENT.json", help="write the policy's placement")
    add_force_flag(parser)
    parser.add_argument("--policy", choices=["linear", "balanced", "topology"], default="topology", help="(topology)")
    share = "replicas, as a share of the experts (0)"
    parser.add_argument("--replicas", type=float, default=0.0, metavar="SHARE", help=share)
    links = "the links, as check --output wrote them"
    parser.add_argument("--topology", type=Path, metavar="TOPOLOGY.json", help=links)
    parser.add_argument(
        "--ranks",
        type=whole_number(1, MAX_STAGE_RANKS),
        default=0,
        metavar="N",
        help="ranks of a stage (as in the run)",
    )
    parser.add_argument("--ranks-per-node", type=count, default=0, metavar="N", help="with --ranks: ranks on a node")
    row = "time of a row at an expert (as in the run)"
    parser.add_argument("--row-us", type=amount, default=0.0, metavar="US", help=row)
    tokens = "use the first N tokens of each layer (200000)"
    parser.add_argument("--tokens", type=count, default=200_000, metavar="N", help=tokens)


def run(chosen: Namespace) -> int:
    """Print what each policy would send and compute; write the placement of one. Raises UsageError for --replicas."""
    if not 0 <= chosen.replicas <= MAX_REPLICAS:
        raise UsageError(f"--replicas {chosen.replicas}: a share of the experts from 0 to {MAX_REPLICAS}")
    if chosen.out:
        inputs = [path for path in (chosen.results, chosen.topology) if path]
        check_output(chosen.out, inputs=inputs, force=chosen.force)
    request = PlacementRequest(
        replicas=chosen.replicas,
        topology=read_topology(chosen.topology) if chosen.topology else None,
        ranks=chosen.ranks,
        ranks_per_node=chosen.ranks_per_node,
        row_s=chosen.row_us * 1e-6,
        tokens=chosen.tokens,
    )
    rows = place_experts(chosen.results, request, policy=chosen.policy, out=chosen.out)
    print_policies(rows, title=f"{chosen.results}, {chosen.replicas:.0%} replicas", levels=LEVELS)
    return 0


def place_experts(
    results: str | Path, request: PlacementRequest, *, policy: str, out: str | Path | None
) -> list[PolicyRow]:
    """What each policy would send and compute on the routing in `results`; writes the placement of `policy` to `out`.

    The recorded run itself comes first, unless the request is for other ranks. Raises NoInputError or DataError for the
    results, UsageError for ranks that do not fit the topology, StorageError for `out`.
    """
    with RoutingFile(results) as file:
        if not file.has_home:
            raise DataError(f"{results}: does not say where rows were routed; run the job with --set trace.home=true")
        placements: dict[str, list[Placement]] = {name: [] for name in POLICIES}
        forecasts: dict[str, list[ExchangeForecast]] = {}
        for index, layer in enumerate(file.layers):
            cluster, routes = _cluster(file, layer, request), _routes(file, index, request)
            if not request.ranks:
                _add(forecasts, "as run", replay(routes, _recorded_placement(file, layer), cluster))
            for name in POLICIES:
                num_physical = file.num_experts + round(request.replicas * file.num_experts)
                placement = choose_placement(
                    name, routes, cluster, num_experts=file.num_experts, num_physical=num_physical
                )
                placements[name].append(placement)
                _add(forecasts, name, replay(routes, placement, cluster))
        rows = [row_of(name, found) for name, found in forecasts.items()]
        if not request.ranks and request.tokens >= file.num_tokens:
            rows.insert(0, _measured(file))
        if out is not None:
            _write(out, file.num_experts, dict(zip(file.layers, placements[policy], strict=True)))
    return rows


def row_of(name: str, forecasts: Sequence[ExchangeForecast]) -> PolicyRow:
    """The sum of the forecasts of all layers, and the imbalance of each."""
    return PolicyRow(
        name,
        sent_bytes=tuple(sum(forecast.sent_bytes.sum(axis=0) for forecast in forecasts).tolist()),
        messages=tuple(sum(forecast.messages.sum(axis=0) for forecast in forecasts).tolist()),
        imbalance=tuple(forecast.imbalance for forecast in forecasts),
        time_s=sum(forecast.time_s for forecast in forecasts),
    )


def _add(forecasts: dict[str, list[ExchangeForecast]], name: str, forecast: ExchangeForecast) -> None:
    forecasts.setdefault(name, []).append(forecast)


def _cluster(file: RoutingFile, layer: int, request: PlacementRequest) -> Cluster:
    """The ranks to place a layer on."""
    ranks, last_layer = _stage(file, layer)
    hops, row_bytes = (int(file.ranks[name].max()) for name in ("hops", "row_bytes"))
    if hops not in (1, 2) or not 0 < row_bytes <= MAX_ROW_BYTES:
        raise DataError(f"{file.path}: placement/hops or row_bytes: {hops} hops of {row_bytes} bytes are impossible")
    choices = file.num_tokens * len(file.layers) * file.top_k
    is_immediate = bool(file.ranks["departs"][ranks].any()) and layer == last_layer
    return Cluster(
        topology=_requested_topology(request) if request.ranks else _recorded_topology(file, ranks),
        hops=hops,
        row_bytes=row_bytes,
        levels=request.topology.levels if request.topology else ASSUMED,
        row_s=request.row_s or file.compute_s / max(choices, 1),
        counts_combine=not is_immediate or bool(request.ranks),
    )


def _recorded_topology(file: RoutingFile, ranks: list[int]) -> Topology:
    """The topology of a stage's ranks in the run; raises DataError if they are not counted node by node."""
    nodes, islands, switches = (tuple(file.ranks[name][ranks].tolist()) for name in ("node", "island", "switch"))
    if list(nodes) != sorted(nodes):
        raise DataError(f"{file.path}: placement/node: does not ascend with placement/seat")
    return Topology(numbered(nodes), () if NOWHERE in islands else islands, () if NOWHERE in switches else switches)


def _requested_topology(request: PlacementRequest) -> Topology:
    if request.topology and not request.ranks_per_node:
        if len(request.topology.nodes) != request.ranks:
            raise UsageError(f"--ranks {request.ranks}: the topology has {len(request.topology.nodes)} ranks")
        return from_file(request.topology)
    return Topology(tuple(rank // (request.ranks_per_node or request.ranks) for rank in range(request.ranks)))


def _stage(file: RoutingFile, layer: int) -> tuple[list[int], int]:
    """The rows of /placement of a layer's stage, in the rank order of the layout, and the last layer of the stage."""
    if not {"seat", "node", "island", "switch", "stage", "hops", "departs", "row_bytes"} <= file.ranks.keys():
        raise DataError(f"{file.path}: does not say where its ranks were")
    if len(set(file.ranks["seat"].tolist())) < len(file.ranks["seat"]):
        raise DataError(f"{file.path}: is of several attempts; record the routing of a run that was not interrupted")
    hosting = file.hosted["row"][file.hosted["layer"] == layer]
    if not len(hosting):
        raise DataError(f"{file.path}: does not say who hosted layer {layer}")
    members = np.flatnonzero(file.ranks["stage"] == file.ranks["stage"][hosting[0]])
    layers = file.hosted["layer"][np.isin(file.hosted["row"], members)]
    ranks = members[np.argsort(file.ranks["seat"][members])]
    if len(ranks) > MAX_STAGE_RANKS or (np.diff(file.ranks["seat"][ranks]) != 1).any():
        raise DataError(f"{file.path}: placement/seat: the {len(ranks)} ranks of layer {layer} do not count up")
    return ranks.tolist(), int(layers.max())


def _routes(file: RoutingFile, index: int, request: PlacementRequest) -> Routes:
    """The recorded routing of a layer; for other ranks than the run's, request i has its home on rank i modulo R."""
    found = file.layer(index, last=request.tokens)
    steps = np.unique(found["step"], return_inverse=True)[1]
    if request.ranks:
        rows = np.arange(len(steps))
        return Routes(found["request"] % request.ranks, rows, steps, found["experts"])
    ranks, _ = _stage(file, file.layers[index])
    homes = found["rank"] - int(file.ranks["seat"][ranks[0]])
    if len(homes) and not 0 <= homes.min() <= homes.max() < len(ranks):
        raise DataError(f"{file.path}: layer {file.layers[index]} was routed by ranks outside its stage")
    return Routes(homes, found["row"], steps, found["experts"])


def _recorded_placement(file: RoutingFile, layer: int) -> Placement:
    """The placement of a layer in the run; raises DataError if it is impossible."""
    ranks, _ = _stage(file, layer)
    of_layer = file.hosted["layer"] == layer
    rows, experts = file.hosted["row"][of_layer], file.hosted["expert"][of_layer]
    hosted = tuple(tuple(experts[rows == rank].tolist()) for rank in ranks)
    problem = HostedLayer(layer, hosted).problem(file.num_experts)
    if problem:
        raise DataError(f"{file.path}: placement/hosted: {problem}")
    return Placement(hosted)


def _measured(file: RoutingFile) -> PolicyRow:
    """The bytes and messages that the run counted; raises DataError if a level is missing."""
    missing = {f"{level}_{kind}" for level in LEVELS for kind in ("bytes", "messages")} - file.counters.keys()
    if missing:
        raise DataError(f"{file.path}: network/{min(missing)}: is missing")
    sent = [sum(int(count) for count in file.counters[f"{level}_bytes"]) for level in LEVELS]
    messages = [sum(int(count) for count in file.counters[f"{level}_messages"]) for level in LEVELS]
    return PolicyRow("measured", tuple(sent), tuple(messages))


def _write(out: str | Path, num_experts: int, placements: Mapping[int, Placement]) -> None:
    layers = tuple(HostedLayer(layer, placement.hosted) for layer, placement in placements.items())
    with atomic(out) as temporary:
        temporary.write_bytes(msgspec.json.encode(PlacementFile(1, num_experts, layers)) + b"\n")
