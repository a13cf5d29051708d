"""The cost of a step on a rank of a stage: seconds of arithmetic, memory and links, from sizes alone. Pure.

A matrix product takes the maximum of its arithmetic and the reading of its weights (the roofline model of Williams,
Waterman and Patterson 2009), or their sum on a machine that does not read ahead. A message takes the latency of its
level plus its bytes over the bandwidth. Routing is assumed to be uniform. `moempi bench plan` compares this model with
measurements.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, comb, inf, log2, prod

import numpy as np

from moempi.arrays import Float64Array
from moempi.config.architecture import Architecture
from moempi.config.machine_file import MachineFile
from moempi.config.tensors import TENSOR_PARALLEL, Tensor, layer_path, layer_tensors, stage_tensors
from moempi.layout.schedule import (
    AGREE,
    EXCHANGE_PHASES,
    GATHER_OUTPUT,
    HEAD_POINTS,
    ROWS,
    TENSOR_PHASES,
    TOKENS,
    Point,
)
from moempi.layout.topology import NETWORK, NODE, Topology
from moempi.planning.simulate import Phase, Transmission

COUNT_BYTES = 8
CHOICE_BYTES = 8
LOGIT_BYTES = 4
DISPATCH, COMBINE = EXCHANGE_PHASES


@dataclass(frozen=True, slots=True)
class StepLoad:
    """One lane's step in one data parallel group: `rows` of `sequences`, each row attending to `context` positions.

    `cached` positions are read from the cache of each sequence; 0 stands for `context`.
    """

    rows: float
    sequences: float
    context: float
    cached: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Costs on the busiest rank of a stage, which hosts `hosted` experts of each layer.

    `topology` is that of the stage's ranks, `tensor` the size of a tensor group. A row is sent as `row_bytes`; a number
    of weights and cache takes `value_bytes`. `stage_link_level` is the level of the links to the next stage.
    """

    machine: MachineFile
    architecture: Architecture
    topology: Topology
    tensor: int
    hops: int
    hosted: int
    row_bytes: int
    value_bytes: int
    stage_link_level: int = NETWORK

    def step(self, layers: range, load: StepLoad, *, is_first: bool, is_last: bool) -> list[Phase]:
        """The phases of one lane's step through `layers`, one per point of `schedule.step_points`.

        The first phase ends the step before: it sends that step's rows or tokens to another stage.
        """
        phases: list[Phase] = []
        pending_s = 0.0
        for layer in layers:
            for phase in self._layer(layer, load):
                phases.append(replace(phase, compute_s=phase.compute_s + pending_s))
                pending_s = 0.0
            pending_s += self._undivided_dense_layer(layer, load)
        for phase in self._end(layers, load, is_last=is_last):
            phases.append(replace(phase, compute_s=phase.compute_s + pending_s))
            pending_s = 0.0
        if is_last and self.tensor == 1:
            pending_s += self._head_s(layers, load)
        sent = None if is_first and is_last else self._stage_link(load, is_last=is_last)
        host_overhead_s = self.machine.turn_us * 1e-6
        phases = [*self._begin(pending_s, sent, is_first=is_first), *phases]
        return [replace(phase, compute_s=phase.compute_s + host_overhead_s) for phase in phases]

    def _begin(self, compute_s: float, sent: Transmission | None, *, is_first: bool) -> list[Phase]:
        """The phases before the first layer; rows and tokens of other stages have arrived in a full pipeline."""
        agreement = [self._collective(COUNT_BYTES)]
        if not is_first:
            return [Phase(ROWS, compute_s, sent=sent)]
        if sent is None:
            return [Phase(AGREE, compute_s, agreement)]
        return [Phase(TOKENS, compute_s, sent=sent), Phase(AGREE, 0.0, agreement)]

    def _layer(self, layer: int, load: StepLoad) -> Iterator[Phase]:
        """The phases of a layer; a dense layer without a tensor group has none (`_undivided_dense_layer`)."""
        attention_s = self._attention(layer, load)
        if self.tensor > 1:
            yield from self._divided(layer, attention_s, load)
            attention_s = 0.0
        if self.architecture.is_moe(layer):
            yield from self._mixture_of_experts(layer, attention_s, load)
        elif self.tensor > 1:
            yield from self._divided(layer, self._dense(layer, load), load)

    def _divided(self, layer: int, compute_s: float, load: StepLoad) -> Iterator[Phase]:
        """Computation that a tensor group divides, between its all-gather and reduce-scatter of all rows."""
        for name, seconds in zip(TENSOR_PHASES, (0.0, compute_s), strict=True):
            yield Phase(Point(layer, name), seconds, [self._tensor_group(load)])

    def _mixture_of_experts(self, layer: int, attention_s: float, load: StepLoad) -> Iterator[Phase]:
        """The phases of an exchange: computation up to each, and its transfer.

        In two hops, choices and the counts inside the node travel beside the rows across nodes.
        """
        path, own = layer_path(layer), load.rows / self.tensor
        routing_s = attention_s + self._products(layer, f"{path}/router", own)
        shared_s = self._products(layer, f"{path}/shared", own)
        experts_s = self._experts(layer, load)
        counts = self._collective(COUNT_BYTES)
        if self.hops == 1:
            rows = self._one_hop(own)
            dispatch, combine = [counts, rows], [rows]
        else:
            across, inside = self._across_nodes(own), self._inside_node(own)
            choices = self._across_nodes(own, row_bytes=CHOICE_BYTES * self._top_k)
            latency_s = max(across.latency_s, choices.latency_s + counts.latency_s)
            dispatch = [counts, Transmission(choices.link_s + across.link_s, latency_s), inside]
            combine = [inside, across]
        yield Phase(Point(layer, DISPATCH), routing_s, dispatch, beside_s=shared_s)
        yield Phase(Point(layer, COMBINE), experts_s, combine)

    def _undivided_dense_layer(self, layer: int, load: StepLoad) -> float:
        """Seconds of a dense layer that no tensor group divides, 0 for other layers; it delays the next phase."""
        if self.tensor > 1 or self.architecture.is_moe(layer):
            return 0.0
        return self._attention(layer, load) + self._dense(layer, load)

    @property
    def _top_k(self) -> int:
        return self.architecture.experts.router.top_k

    def _attention(self, layer: int, load: StepLoad) -> float:
        heads = self.architecture.attention
        window = self.architecture.window(layer)
        context, read = (min(positions, window or inf) for positions in (load.context, load.cached or load.context))
        dims = heads.cached_dim + heads.latent.key_value_rank if heads.latent else heads.head_dim + heads.value_dim
        flops = 2 * load.rows * context * heads.num_heads * dims / self.tensor
        cached = heads.cached_values / (1 if heads.latent else self.tensor)
        core_s = self._roofline(flops, load.sequences * read * cached * self.value_bytes)
        return core_s + self._products(layer, f"{layer_path(layer)}/attention", load.rows)

    def _dense(self, layer: int, load: StepLoad) -> float:
        return self._products(layer, f"{layer_path(layer)}/dense", load.rows)

    def _experts(self, layer: int, load: StepLoad) -> float:
        """Expert products on the busiest rank, which reads the weights of the experts that any row chose."""
        experts = self.architecture.experts
        choices = load.rows * self._num_groups * self._top_k
        sizes = [prod(tensor.shape) for tensor in self._tensors(layer, f"{layer_path(layer)}/experts")]
        values = sum(sizes) / experts.num
        chosen = self.hosted * (1 - (1 - 1 / experts.num) ** choices)
        return self._roofline(2 * choices * self.hosted / experts.num * values, chosen * values * self.value_bytes)

    def _end(self, layers: range, load: StepLoad, *, is_last: bool) -> list[Phase]:
        """A tensor group all-gathers the rows; on the last stage it exchanges slices of the logits, then tokens."""
        if self.tensor == 1:
            return []
        if not is_last:
            return [Phase(GATHER_OUTPUT, 0.0, [self._tensor_group(load)])]
        logits_bytes = LOGIT_BYTES * self.architecture.vocab_size / self.tensor
        rows, logits, sampled = (
            [self._all_to_all(load.sequences, num_bytes)] for num_bytes in (self.row_bytes, logits_bytes, COUNT_BYTES)
        )
        computing_s = (0.0, self._head_s(layers, load), 0.0)
        return list(map(Phase, HEAD_POINTS, computing_s, (rows, logits, sampled)))

    def _head_s(self, layers: range, load: StepLoad) -> float:
        """The logits of one row of each sequence."""
        matrices = [tensor for tensor in stage_tensors(self.architecture, layers) if tensor.name == "head"]
        return self._matrices(matrices, load.sequences)

    def _products(self, layer: int, path: str, rows: float) -> float:
        return self._matrices(self._tensors(layer, path), rows)

    def _tensors(self, layer: int, path: str) -> list[Tensor]:
        """The matrices of a layer at or below a path."""
        return [
            tensor
            for tensor in layer_tensors(self.architecture, layer)
            if len(tensor.shape) > 1 and (tensor.name == path or tensor.name.startswith(f"{path}/"))
        ]

    def _matrices(self, tensors: Iterable[Tensor], rows: float) -> float:
        values = sum(prod(one.shape) / (self.tensor if one.share in TENSOR_PARALLEL else 1) for one in tensors)
        return self._roofline(2 * rows * values, values * self.value_bytes if rows else 0.0)

    def _roofline(self, flops: float, num_bytes: float) -> float:
        computing, reading = flops / (self.machine.tflops * 1e12), num_bytes / (self.machine.memory_gb_s * 1e9)
        return max(computing, reading) if self.machine.reads_ahead else computing + reading

    @property
    def _num_ranks(self) -> int:
        return len(self.topology.nodes)

    @property
    def _num_groups(self) -> int:
        return self._num_ranks // self.tensor

    def _one_hop(self, rows: float) -> Transmission:
        """Each row to the ranks of its experts, in one hop: seconds of the link, and latency."""
        hosting = min(self._num_ranks, self.architecture.experts.num)
        choices = rows * self._top_k
        probability = 1 - (1 - 1 / hosting) ** choices
        counts = np.bincount(self.topology.levels(0)[:hosting], minlength=len(self.machine.levels))
        return self._transfer(counts * probability, counts / hosting * choices * self.row_bytes)

    def _across_nodes(self, rows: float, *, row_bytes: int = 0) -> Transmission:
        """Each row once to every other node that hosts one of its experts."""
        num_experts, nodes = self.architecture.experts.num, self.topology.num_nodes
        on_node = num_experts // nodes
        share = 1 - comb(num_experts - on_node, self._top_k) / comb(num_experts, self._top_k)
        levels = self.topology.levels(0)
        counts = np.zeros(len(self.machine.levels))
        for node in range(1, nodes):
            counts[levels[self.topology.nodes.index(node)]] += 1
        probability = 1 - (1 - share) ** rows
        return self._transfer(counts * probability, counts * rows * share * (row_bytes or self.row_bytes))

    def _inside_node(self, rows: float) -> Transmission:
        """Rows from the forwarders of a node to the ranks of their experts there."""
        levels = self.topology.levels(0)
        counts = np.bincount(levels[levels <= NODE], minlength=len(self.machine.levels))
        choices = rows * self._top_k
        probability = 1 - (1 - 1 / counts.sum()) ** choices
        return self._transfer(counts * probability, counts / counts.sum() * choices * self.row_bytes)

    def _tensor_group(self, load: StepLoad) -> Transmission:
        """All rows of a tensor group: each rank sends its part to every other."""
        return self._all_to_all(load.rows, self.row_bytes)

    def _all_to_all(self, rows: float, num_bytes: float) -> Transmission:
        """`num_bytes` for each of a rank's part of `rows`, to every other rank of the tensor group."""
        others = np.zeros(len(self.machine.levels))
        others[NODE] = self.tensor - 1
        return self._transfer(others, others * rows / self.tensor * num_bytes)

    def _stage_link(self, load: StepLoad, *, is_last: bool) -> Transmission:
        """A rank's rows to the next stage; the last stage sends tokens to the first."""
        messages = np.zeros(len(self.machine.levels))
        messages[self.stage_link_level] = 1
        num_bytes = COUNT_BYTES * load.sequences if is_last else load.rows / self.tensor * self.row_bytes
        return self._transfer(messages, messages * num_bytes)

    def _collective(self, num_bytes: int) -> Transmission:
        """An all-to-all of `num_bytes` per pair of ranks, in log2(ranks) messages (Bruck et al. 1997)."""
        farthest = self.machine.levels[int(self.topology.levels(0).max())]
        messages = ceil(log2(self._num_ranks)) if self._num_ranks > 1 else 0
        bytes_s = num_bytes * self._num_ranks / (farthest.bandwidth_gb_s * 1e9)
        return Transmission(0.0, messages * farthest.latency_us * 1e-6 + bytes_s)

    def _transfer(self, messages: Float64Array, num_bytes: Float64Array) -> Transmission:
        """Seconds of the link for the bytes of each level, and latency of the messages, which leaves the link free."""
        bytes_per_s = np.array([level.bandwidth_gb_s * 1e9 for level in self.machine.levels])
        latencies_s = np.array([level.latency_us * 1e-6 for level in self.machine.levels])
        return Transmission(float((num_bytes / bytes_per_s).sum()), float((messages * latencies_s).sum()))
