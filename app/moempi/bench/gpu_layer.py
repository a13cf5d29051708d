"""Whole layers on one GPU, computed as a run computes them on one rank: by the model's classes and the exchange.

The rows that the rank sends to itself stay in device memory. So a layer has all its kernels and all the
host's work, but no network.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
from msgspec.structs import replace

from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.products import Matrix
from moempi.backend.values import Array, Expert
from moempi.bench.gpu_parts import NORM_EPS, Make
from moempi.bench.gpu_report import OURS, Bench, Case
from moempi.bench.random_layer import WEIGHT_DEVIATION, Sizes, make_exchange, run_to_end
from moempi.bench.random_values import RandomValues, random_layer, random_matrix
from moempi.comm.batch import NONE, Batch
from moempi.comm.combine import HomeCombine
from moempi.comm.hop import Hop
from moempi.comm.lane_comm import LaneComm, make_lane_comm
from moempi.comm.rank_groups import RankGroups
from moempi.comm.row_shape import RowShape
from moempi.comm.transfers import Transfers, Waits
from moempi.comm.transport_factory import TransportFactory
from moempi.comm.transports.loopback import Loopback
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.interleave import interleave
from moempi.layout.grid import Grid, Stage
from moempi.layout.layout import Layout
from moempi.layout.memory import pages_for
from moempi.layout.placement import linear
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import EXCHANGE_PHASES, Point
from moempi.layout.topology import Topology
from moempi.model.attention import Attention
from moempi.model.feed_forward import MixtureOfExperts
from moempi.model.kv_cache import KVCache
from moempi.model.norm import Norm
from moempi.model.router_balance import MODEL_ROUTING
from moempi.model.transformer import Layer, Transformer, with_graphs

HOST_PASSES = 5
CAPTURED_AT = 2
"""Steps until a graph is launched alone: the second records it."""
CACHE_BYTES = 24e9
"""Memory for the caches of all layers and lanes, which limits the number of layers."""


@dataclass(frozen=True, slots=True)
class Step:
    """The step of every lane: `sequences` with `rows` new rows each, which end at position `context`."""

    name: str
    sequences: int
    rows: int
    context: int


def layer_cases(bench: Bench, sizes: Namespace, comm: Any) -> Iterator[Make]:
    """Attention, router, dispatch, expert and combine, by numbers of heads and lanes; times are of one layer and lane.

    The rank hosts one expert. `comm` is a communicator of one rank.
    """
    steps = (
        Step("decode", sizes.layer_sequences, 1, sizes.layer_context),
        Step("prefill", 1, sizes.context, sizes.context),
    )
    for step in steps:
        for heads in sizes.layer_heads:
            for lanes in sizes.layer_lanes:
                yield "layer", partial(_layer, bench, sizes, comm, step=step, heads=heads, lanes=lanes)


def _layer(bench: Bench, sizes: Namespace, comm: Any, *, step: Step, heads: int, lanes: int) -> Case:
    pages = lanes * step.sequences * pages_for(step.context)
    layers = max(1, min(sizes.layers, int(CACHE_BYTES / (pages * PAGE_ROWS * heads * sizes.head_dim * 4))))
    architecture = Architecture(
        family="benchmark",
        vocab_size=1,
        width=sizes.width,
        num_layers=layers,
        max_positions=step.context,
        attention=AttentionShape(num_heads=heads, num_kv_heads=heads, head_dim=sizes.head_dim),
        experts=Experts(num=1, width=sizes.expert_width, router=Router(top_k=1, renormalize=True)),
    )
    model = _random_model(bench, architecture, pages=pages)
    rig = _Rig(bench, model, comm, step=step, lanes=lanes)
    for _ in range(CAPTURED_AT if model.layers[0].fused_attention is not None else 0):
        rig.run()
    return Case(
        "layer",
        f"{step.name}, {step.sequences * step.rows:,} rows, {heads} heads, {lanes} lanes, {layers} layers",
        0,
        "",
        {OURS: rig.run},
        units=lanes * layers,
        wall_repeats=2,
        blocks=True,
        remark=rig.host_us,
    )


def _random_model(bench: Bench, architecture: Architecture, *, pages: int) -> Transformer:
    """A model without embedding and head, whose layers share their weights: more than a GPU's cache holds."""
    backend, shape, width = bench.backend, architecture.attention, architecture.width
    heads = shape.num_heads * shape.head_dim
    norm = Norm("rms", NORM_EPS, bench.values.rows(width))
    qkv, output = random_matrix(bench.values, 3 * heads, width), random_matrix(bench.values, width, heads)
    experts = random_layer(bench.values, Sizes(width, architecture.experts.width, num_experts=1, top_k=1), num_hosted=1)
    attention = Attention(shape=shape, eps=NORM_EPS, qkv=qkv, output=output)
    layers = [
        with_graphs(Layer(index, norm, attention, norm, replace(experts, layer=index)), backend)
        for index in range(architecture.num_layers)
    ]
    cache = KVCache(backend, shape, layers=len(layers), pages=pages)
    return Transformer(architecture, backend, embedding=None, layers=layers, head=None, cache=cache)


class _Rig:
    """The lanes of one rank, each with its own step of the model."""

    def __init__(self, bench: Bench, model: Transformer, comm: Any, *, step: Step, lanes: int) -> None:
        self._backend: CudaBackend = bench.backend
        self._timer = bench.clock.timer
        self._model = model
        num_layers, num_rows = len(model.layers), step.sequences * step.rows
        stage = Stage(range(num_layers), range(1))
        grid = Grid((stage,), tensor=1, slots_per_group=lanes * step.sequences)
        layout = Layout(grid, (dict.fromkeys(stage.layers, linear(1, 1)),), (), ())
        shape = RowShape(model.architecture.width, top_k=1, group_rows=num_rows)
        transports = TransportFactory(backend=bench.backend, name=Loopback.name, shape=shape, slot_rows=num_rows)
        self._comms: Sequence[LaneComm] = [
            make_lane_comm(
                RankGroups.make(comm, grid),
                layout,
                Topology((0,)),
                transports=transports,
                transfers=Transfers(bench.backend, bench.pending),
            )
            for _ in range(lanes)
        ]
        self._batches = [_batch(step, first_slot=lane * step.sequences) for lane in range(lanes)]
        self._rows = [bench.values.rows(num_rows, shape.width) for _ in range(lanes)]
        self._points = tuple(Point(layer, phase) for layer in stage.layers for phase in EXCHANGE_PHASES)
        self._pending = bench.pending
        _fill_cache(model, self._batches, bench.values)

    def run(self) -> None:
        """Compute all layers for all lanes, which are interleaved on queues of their own."""
        interleave(
            [self._lane(lane) for lane in range(len(self._comms))],
            self._points,
            pending=self._pending,
            on_queue=self._backend.on_queue,
        )

    def _lane(self, lane: int) -> Waits[None]:
        batch, comm = self._batches[lane], self._comms[lane]
        split = RowSplit((batch.num_rows,), 1)
        yield from self._model.forward(batch, split, self._rows[lane], comm, MODEL_ROUTING, comm.home_combine)

    def host_us(self, num_calls: int) -> str:
        """Launches and microseconds in which the host worked, not waited, per layer and lane; `num_calls` in all."""
        downloading, download = 0.0, self._backend.download

        def timed(values: Array) -> Any:
            nonlocal downloading
            begin = perf_counter()
            result = download(values)
            downloading += perf_counter() - begin
            return result

        self._timer.synchronize()
        waited, begin = self._waited_s(), perf_counter()
        with patch.object(self._backend, "download", timed):
            for _ in range(HOST_PASSES):
                self.run()
        taken = perf_counter() - begin - (self._waited_s() - waited) - downloading
        units = len(self._comms) * len(self._model.layers)
        return f"{num_calls / units:.0f} launches, the host works {taken / HOST_PASSES / units * 1e6:.0f} us"

    def _waited_s(self) -> float:
        return sum(sum(comm.transfers.waits.values()) for comm in self._comms)


def _batch(step: Step, *, first_slot: int) -> Batch:
    slots = np.arange(first_slot, first_slot + step.sequences)
    return Batch(
        tokens=NONE,
        requests=slots,
        slots=slots,
        starts=np.full(step.sequences, step.context - step.rows),
        lengths=np.full(step.sequences, step.rows),
        capacities=np.full(step.sequences, step.context),
        logit_rows=NONE,
        freed=NONE,
        prompts=np.full(step.sequences, step.context),
    )


def _fill_cache(model: Transformer, batches: Sequence[Batch], values: RandomValues) -> None:
    """Random keys and values, on pages that the sequences hold already: a page is zeroed when it is taken."""
    for batch in batches:
        model.cache.segments(batch)
    for cache in model.cache.layers:
        values.fill(cache.keys)
        values.fill(cache.values)


def block_cases(bench: Bench, sizes: Namespace, comm: Any) -> Iterator[Make]:
    """A MoE layer with all its experts on the rank beside the block of transformers with the same weights."""
    weights: list[tuple[Array, Array, Array]] = []

    def make_weights() -> tuple[Array, Array, Array]:
        if not weights:
            rows, experts = partial(bench.values.rows, deviation=WEIGHT_DEVIATION), sizes.experts
            gate_up = rows(experts, 2 * sizes.expert_width, sizes.width)
            weights.append(
                (rows(experts, sizes.width), gate_up, rows(experts, sizes.width, sizes.expert_width)),
            )
        return weights[0]

    for num_rows in sizes.block_rows:
        yield "MoE layer", partial(_block, bench, sizes, comm, make_weights=make_weights, num_rows=num_rows)


def _block(
    bench: Bench,
    sizes: Namespace,
    comm: Any,
    *,
    make_weights: Callable[[], tuple[Array, Array, Array]],
    num_rows: int,
) -> Case:
    backend, layer_sizes = bench.backend, Sizes.of(sizes)
    router, gate_up, down = make_weights()
    layer = MixtureOfExperts(
        layer=0,
        rule=Router(top_k=sizes.top_k, renormalize=True),
        router=Matrix(router, False),
        experts=[Expert(Matrix(gate_up[e], False), Matrix(down[e], False)) for e in range(sizes.experts)],
    )
    transfers = Transfers(backend, bench.pending)
    transport = Loopback(partial(backend.row_buffer, width=sizes.width))
    hop = Hop(comm, backend, transfers=transfers, transport=transport)
    exchange = make_exchange(hop, linear(sizes.experts, 1))
    combine, x = HomeCombine(exchange), bench.values.rows(num_rows, sizes.width)
    peers = bench.peers.moe_block(layer_sizes, x, router, gate_up, down)
    return Case(
        "MoE layer",
        f"{num_rows:,} rows, {sizes.experts} experts, top-{sizes.top_k}",
        6 * num_rows * sizes.top_k * sizes.width * sizes.expert_width,
        "TFLOP/s",
        {OURS: lambda: run_to_end(layer.forward(backend, x, exchange, combine)).rows, **peers},
        wall_repeats=5,
        blocks=True,
        same=tuple(peers),
        remark=lambda num_calls: f"{num_calls} launches",
    )
