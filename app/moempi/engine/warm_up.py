"""Warm-up: the verbs of this rank's layers run before the first step, so that no rank waits while another compiles.

A machine that compiles kernels on first use, or sets up a queue on first use, does so here.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.values import Array, Cache, PhysicalIds, RmsNorm, Segment
from moempi.comm.addends import Addends
from moempi.comm.exchange import pick_replicas
from moempi.config.tensors import PAGE_ROWS
from moempi.layout.memory import pages_for
from moempi.layout.placement import Placement
from moempi.model.feed_forward import MixtureOfExperts
from moempi.model.rope import rope_angles
from moempi.model.router_balance import MODEL_ROUTING
from moempi.model.sparse_attention import sparse_rows
from moempi.model.transformer import Transformer, add_to_residual
from moempi.runtime.world import World

NUM_ROWS = (1, PAGE_ROWS)
"""Rows of a sequence in decode and in prefill, which attention computes by different kernels."""


FUSED_CALLS = 3
"""Calls of a fused attention after which a backend has nothing to set up: one that records measures, records, launches.
"""


def warm_up(
    model: Transformer, world: World, *, placements: Mapping[int, Placement], lanes: int, group_size: int = 1
) -> None:
    """Run each verb of the model's layers on the queues of all lanes; collective, blocks.

    `group_size` is the number of ranks of a tensor group. `placements` has the placement of each layer whose choices
    the backend groups by physical experts. Does nothing with a backend whose verbs are complete when they return: it
    compiles nothing. The first rank of a node comes first, so that the others find compiled kernels. The cache must
    have no sequence; its first page and the state of its first slot are written. A MoempiError of any rank ends all
    ranks, such as too many physical experts for the backend.
    """
    is_first = world.local_rank == 0
    run = partial(_run_all, model, placements, lanes, group_size)
    world.collectively(lambda: run() if is_first else None)
    world.collectively(lambda: None if is_first else run())


def _run_all(model: Transformer, placements: Mapping[int, Placement], lanes: int, group_size: int) -> None:
    backend = model.backend
    for lane in range(lanes if backend.record_event() is not None else 0):
        with backend.on_queue(lane):
            for num_rows in NUM_ROWS:
                _run_layers(model, placements, num_rows)
            _run_fused(model, placements, group_size)
            indexer = model.architecture.attention.indexer
            if indexer and any(indexer.top_k < len(cache.keys) for cache in model.cache.layers):
                _run_layers(model, placements, 1, start=indexer.top_k)
            done = backend.record_event()
            if done is not None:
                done.synchronize()


def _run_layers(model: Transformer, placements: Mapping[int, Placement], num_rows: int, *, start: int = 0) -> None:
    """Compute rows of zeros, at positions from `start` on of a sequence whose pages are all the cache's first page.

    The results are dropped.
    """
    backend = model.backend
    x, angles, segments, capacities = _zeros(model, num_rows, start=start)
    sparse = sparse_rows(backend, model.architecture.attention, segments, capacities)
    for layer, cache, following in zip(model.layers, model.layer_caches, [*model.layers[1:], None], strict=True):
        rows, next_norm = layer.first_norm(backend, x), None if following is None else following.first_norm
        if layer.attention is not None:
            if not isinstance(cache, Cache) or len(cache.keys):
                rows = layer.attend(backend, rows, angles, cache, segments, sparse)
            _, rows = add_to_residual(backend, x, rows, layer.feed_forward_norm or next_norm)
        if isinstance(layer.feed_forward, MixtureOfExperts):
            norm = None if next_norm is None else next_norm.rms
            _run_experts(model, layer.feed_forward, placements.get(layer.index), rows, norm)
        elif layer.feed_forward is not None:
            add_to_residual(backend, x, layer.feed_forward(backend, rows), next_norm)
    if model.embedding is not None:
        model.embed(np.zeros(num_rows, np.int64))
    if model.head is not None:
        logits = backend.logits(model.head.norm(backend, x), model.head.matrix, model.head.bias)
        backend.score(logits, np.zeros(num_rows, np.int64), top=1)
        backend.scan(logits, np.zeros(num_rows, np.int64), first=0, top=1)
        backend.tokens_above(logits[:1], np.full(1, -np.inf, np.float32))


def _run_fused(model: Transformer, placements: Mapping[int, Placement], group_size: int) -> None:
    """Compute a row of zeros by the layers' fused attentions, so that what the device refuses is an error at once."""
    x, angles, segments, _ = _zeros(model, 1)
    for layer, cache in zip(model.layers, model.layer_caches, strict=True):
        fused = layer.attention_verb(1, group_size=group_size)
        if fused is not None and len(cache.keys):
            is_moe = isinstance(layer.feed_forward, MixtureOfExperts)
            ids = _physical_ids(model, placements.get(layer.index)) if is_moe else None
            for _ in range(FUSED_CALLS):
                fused(x, angles, cache, segments, ids)


def _zeros(
    model: Transformer, num_rows: int, *, start: int = 0
) -> tuple[Array, tuple[Array, Array], Sequence[Segment], IntArray]:
    """Rows of zeros, with the angles, segments and capacities of their positions from `start` on."""
    backend, architecture = model.backend, model.architecture
    x = backend.tensor(np.zeros((num_rows, architecture.width), np.uint16))
    positions, capacities = start + np.arange(num_rows), np.full(num_rows, start + num_rows)
    segments = (Segment(0, num_rows, start, np.zeros(pages_for(start + num_rows), np.int64)),)
    return x, rope_angles(backend, architecture.attention, positions, capacities), segments, capacities


def _physical_ids(model: Transformer, placement: Placement | None) -> PhysicalIds:
    """Physical ids of the shape that a layer's exchange uses."""
    num_experts = model.architecture.experts.num
    num_ids, period = (num_experts, 1) if placement is None else (len(placement.experts), placement.replica_period)
    return PhysicalIds(model.backend.upload(np.arange(num_experts * period) % num_ids), num_ids, period)


def _run_experts(
    model: Transformer, experts: MixtureOfExperts, placement: Placement | None, x: Array, norm: RmsNorm | None
) -> None:
    """The router, the exchange's packing and sums with the next norm, and each expert and shared one of this rank."""
    backend, hosted = model.backend, len(experts.experts)
    logits = backend.logits(x, experts.router, experts.router_bias)
    chosen, weights = MODEL_ROUTING.choose(backend, experts.layer, logits, experts.rule, experts.router_correction)
    physical = _physical_ids(model, placement)
    ids, num_ids, chosen = physical.ids, physical.num_ids, pick_replicas(backend, chosen, physical.period)
    routed = x if experts.latent is None else backend.linear(x, experts.latent.down)
    source_rows, output_rows, _ = backend.group(chosen, ids, num_ids=num_ids)
    buffer = backend.comm_buffer(len(source_rows), routed.shape[1])
    backend.pack(routed, source_rows, buffer)
    if len(source_rows) <= backend.most_packed_choices:
        backend.group_and_pack(routed, chosen, ids, backend.row_buffer(*buffer.shape), num_ids=num_ids)
    rows = backend.unpack(buffer, None)
    num_rows = len(rows)
    while hosted and num_rows:  # a backend may compute few rows by other kernels
        counts = np.zeros(hosted, np.int64)
        counts[0] = num_rows
        backend.expert_mlp(rows[:num_rows], experts.experts, counts)
        num_rows //= 2
    together = min(hosted, len(rows))  # and several experts in one launch
    if together:
        backend.expert_mlp(rows[:together], experts.experts, (np.arange(hosted) < together).astype(np.int64))
    if experts.latent is None:
        Addends(x, x, norm).combine(backend, buffer, output_rows, weights)
        backend.combine(buffer, output_rows, weights)  # inside a node, if there are two hops
    else:
        backend.add(x, backend.linear(backend.combine(buffer, output_rows, weights), experts.latent.up))
    if experts.shared is not None:
        shared = experts.shared(backend, x)
        if experts.shared_gate is not None:
            backend.scale_by_sigmoid(shared, backend.linear(x, experts.shared_gate))
