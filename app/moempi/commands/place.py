"""`moempi place`: from the recorded routing of a run to a placement for the next one, and what it would send."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from moempi.config.placement_file import HostedLayer, PlacementFile
from moempi.config.topology_file import Level, TopologyFile
from moempi.errors import DataError, UsageError
from moempi.layout.placement import Placement
from moempi.layout.topology import LEVELS, Topology, from_file, numbered
from moempi.observe.placement_table import PolicyRow
from moempi.planning.policies import POLICIES, choose_placement
from moempi.planning.replay import Cluster, ExchangeForecast, Routes, replay
from moempi.storage.files import atomic
from moempi.storage.results_layout import NOWHERE
from moempi.storage.routing import RoutingFile

ASSUMED = (
    Level("self", 0.0, 1000.0),
    *(Level(name, 2.0, 150.0) for name in ("island", "node")),
    *(Level(name, 5.0, 25.0) for name in ("switch", "network")),
)
"""Links where no topology was measured: figures of the order of NVLink and 200 Gbit/s InfiniBand."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What to place for: the share of `replicas` among the experts, and links as measured, if they were.

    An expert takes `row_s` for a row; when 0, the computing of the run is divided by all its rows at experts. With
    `ranks` above 0 every layer is placed on so many, `ranks_per_node` on a node; else on the ranks of the run. Of each
    layer the first `tokens` are looked at.
    """

    replicas: float = 0.0
    topology: TopologyFile | None = None
    ranks: int = 0
    ranks_per_node: int = 0
    row_s: float = 0.0
    tokens: int = 200_000


def place_experts(
    results: str | Path, request: PlacementRequest, *, policy: str, out: str | Path | None
) -> list[PolicyRow]:
    """What each policy would send and compute, on routing recorded in `results`; `policy`'s placement goes to `out`.

    Raises NoInputError or DataError for the results, UsageError for ranks that cannot be, StorageError for `out`.
    """
    with RoutingFile(results) as file:
        placed: dict[str, list[Placement]] = {name: [] for name in POLICIES}
        forecasts: dict[str, list[ExchangeForecast]] = {}
        for index, layer in enumerate(file.layers):
            machine, routes = _cluster(file, layer, request), _routes(file, index, request)
            if not request.ranks:
                _add(forecasts, "as run", replay(routes, _recorded_placement(file, layer), machine))
            for name in POLICIES:
                keys = file.num_experts + round(request.replicas * file.num_experts)
                placement = choose_placement(name, routes, machine, num_experts=file.num_experts, num_physical=keys)
                placed[name].append(placement)
                _add(forecasts, name, replay(routes, placement, machine))
        rows = [row_of(name, found) for name, found in forecasts.items()]
        if not request.ranks and request.tokens >= file.num_tokens:
            rows.insert(0, _measured(file.counters))
        if out is not None:
            _write(out, file.num_experts, dict(zip(file.layers, placed[policy], strict=True)))
    return rows


def row_of(name: str, forecasts: Sequence[ExchangeForecast]) -> PolicyRow:
    """The forecasts of all layers in one row."""
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
    """The ranks that a layer is to be placed on."""
    seats, last_layer = _stage(file, layer)
    hops, row_bytes = (int(file.ranks[name].max()) for name in ("hops", "row_bytes"))
    choices = file.num_tokens * len(file.layers) * file.top_k
    departs = bool(file.ranks["departs"][seats].any()) and layer == last_layer
    return Cluster(
        topology=_requested_topology(request) if request.ranks else _recorded_topology(file, seats),
        hops=hops,
        row_bytes=row_bytes,
        levels=request.topology.levels if request.topology else ASSUMED,
        row_s=request.row_s or file.compute_s / max(choices, 1),
        counts_combine=not departs or bool(request.ranks),
    )


def _recorded_topology(file: RoutingFile, seats: list[int]) -> Topology:
    """Where the ranks of a stage stood."""
    nodes, islands, switches = (tuple(file.ranks[name][seats].tolist()) for name in ("node", "island", "switch"))
    return Topology(numbered(nodes), () if NOWHERE in islands else islands, () if NOWHERE in switches else switches)


def _requested_topology(request: PlacementRequest) -> Topology:
    if request.topology and not request.ranks_per_node:
        if len(request.topology.nodes) != request.ranks:
            raise UsageError(f"--ranks {request.ranks}: the topology has {len(request.topology.nodes)} ranks")
        return from_file(request.topology)
    return Topology(tuple(rank // (request.ranks_per_node or request.ranks) for rank in range(request.ranks)))


def _stage(file: RoutingFile, layer: int) -> tuple[list[int], int]:
    """The rows of /placement that are the ranks of a layer's stage, in the order of their seats, and its last layer."""
    if not {"seat", "node", "island", "switch", "stage", "hops", "departs", "row_bytes"} <= file.ranks.keys():
        raise DataError("the results do not say where their ranks stood")
    if len(set(file.ranks["seat"].tolist())) < len(file.ranks["seat"]):
        raise DataError("the results are of several attempts; record the routing of a run that was not interrupted")
    hosting = file.hosted["row"][file.hosted["layer"] == layer]
    if not len(hosting) or not 0 <= hosting.min() <= hosting.max() < len(file.ranks["seat"]):
        raise DataError(f"the results do not say who hosted layer {layer}")
    members = np.flatnonzero(file.ranks["stage"] == file.ranks["stage"][hosting[0]])
    layers = file.hosted["layer"][np.isin(file.hosted["row"], members)]
    return members[np.argsort(file.ranks["seat"][members])].tolist(), int(layers.max())


def _routes(file: RoutingFile, index: int, request: PlacementRequest) -> Routes:
    """What was recorded of a layer; on other ranks than the run's, requests are dealt to them in turn."""
    found = file.layer(index, last=request.tokens)
    steps = np.unique(found["step"], return_inverse=True)[1]
    if request.ranks:
        rows = np.arange(len(steps))
        return Routes(found["request"] % request.ranks, rows, steps, found["experts"])
    seats, _ = _stage(file, file.layers[index])
    homes = found["rank"] - int(file.ranks["seat"][seats[0]])
    if len(homes) and not 0 <= homes.min() <= homes.max() < len(seats):
        raise DataError(f"layer {file.layers[index]} was routed by ranks outside its stage")
    return Routes(homes, found["row"], steps, found["experts"])


def _recorded_placement(file: RoutingFile, layer: int) -> Placement:
    """The placement that the run itself had."""
    seats, _ = _stage(file, layer)
    of_layer = file.hosted["layer"] == layer
    rows, experts = file.hosted["row"][of_layer], file.hosted["expert"][of_layer]
    return Placement(tuple(tuple(experts[rows == seat].tolist()) for seat in seats))


def _measured(counters: Mapping[str, Iterable[int]]) -> PolicyRow:
    """What the run itself counted."""
    sent = [sum(int(count) for count in counters[f"{level}_bytes"]) for level in LEVELS]
    messages = [sum(int(count) for count in counters[f"{level}_messages"]) for level in LEVELS]
    return PolicyRow("measured", tuple(sent), tuple(messages))


def _write(out: str | Path, num_experts: int, placed: Mapping[int, Placement]) -> None:
    layers = tuple(HostedLayer(layer, placement.hosted) for layer, placement in placed.items())
    with atomic(out) as temporary:
        temporary.write_bytes(msgspec.json.encode(PlacementFile(1, num_experts, layers)) + b"\n")
