"""What a step costs a rank of a stage: seconds of products, memory and links, from sizes alone. Pure.

Products take the longer of their arithmetic and the reading of their weights (the roofline of Williams, Waterman and
Patterson 2009), or on a machine that does not read ahead their sum; a transfer takes, for every message, its level's
latency and its bytes over the bandwidth. Routing is taken to be even. All that is a model; `moempi bench plan` compares
it with what happens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, comb, log2, prod

import numpy as np

from moempi.arrays import Float64Array
from moempi.config.architecture import Architecture
from moempi.config.machine_file import MachineFile
from moempi.config.tensors import TENSOR_PARALLEL, Tensor, layer_path, layer_tensors, stage_tensors
from moempi.layout.schedule import AGREE, GATHER_OUTPUT, ROWS, SENT, TOKENS, Point
from moempi.layout.topology import NETWORK, NODE, Topology
from moempi.planning.simulate import Phase

COUNT_BYTES = 8
CHOICE_BYTES = 8
LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class StepLoad:
    """A step of one lane in one data parallel group: so many rows, of so many sequences, each seeing `context` keys."""

    rows: float
    sequences: float
    context: float


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Of one rank among those of a stage, which stand as `topology` says, with `hosted` experts of each layer.

    `row_bytes` travel for each row; weights and cache take `value_bytes` a number. `onward` is the level of the links
    to the next stage.
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
        """The legs of one lane's step through `layers`, one for each of `schedule.step_points`."""
        alone = is_first and is_last
        legs = [Phase(AGREE if is_first else ROWS, 0.0, *self._collective(COUNT_BYTES))]
        pending = 0.0
        for layer in layers:
            for leg in self._layer(layer, load):
                legs.append(replace(leg, compute_s=leg.compute_s + pending))
                pending = 0.0
            pending += self._after(layer, load)
        if is_last:
            pending += self._head(layers, load)
        if not is_last and self.tensor > 1:
            legs.append(Phase(GATHER_OUTPUT, pending, *self._tensor_group(load)))
            pending = 0.0
        if not alone:
            legs.append(Phase(TOKENS if is_first else SENT, pending, *self._stage_link(load, is_last=is_last)))
        elif pending:
            legs[0] = replace(legs[0], compute_s=pending)
        turn = self.machine.turn_us * 1e-6
        return [replace(leg, compute_s=leg.compute_s + turn) for leg in legs]

    def _layer(self, layer: int, load: StepLoad) -> Iterator[Phase]:
        """The legs of a layer; what is computed behind the last of them is `_after`."""
        attention = self._attention(layer, load)
        if self.tensor > 1:
            yield Phase(Point(layer, "gather"), 0.0, *self._tensor_group(load))
            yield Phase(Point(layer, "scatter"), attention, *self._tensor_group(load))
            attention = 0.0
        if not self.architecture.is_moe(layer):
            if self.tensor > 1:
                yield Phase(Point(layer, "gather"), 0.0, *self._tensor_group(load))
                yield Phase(Point(layer, "scatter"), self._dense(layer, load), *self._tensor_group(load))
            return
        path, own = layer_path(layer), load.rows / self.tensor
        routing = attention + self._products(layer, f"{path}/router", own)
        shared = self._products(layer, f"{path}/shared", own)
        experts = self._experts(layer, load)
        if self.hops == 1:
            rows = self._one_hop(own)
            yield Phase(Point(layer, "counts"), routing, *self._collective(COUNT_BYTES))
            yield Phase(Point(layer, "dispatch"), shared, *rows, eager=True)
            yield Phase(Point(layer, "combine"), experts, *rows)
            return
        across, inside = self._across_nodes(own), self._inside_node(own)
        yield Phase(Point(layer, "counts"), routing, *self._collective(COUNT_BYTES))
        yield Phase(Point(layer, "choices"), 0.0, *self._across_nodes(own, row_bytes=CHOICE_BYTES * self._top_k))
        yield Phase(Point(layer, "counts inside"), 0.0, *self._collective(COUNT_BYTES))
        yield Phase(Point(layer, "dispatch"), shared, *across)
        yield Phase(Point(layer, "dispatch inside"), 0.0, *inside)
        yield Phase(Point(layer, "combine"), experts, *inside)
        yield Phase(Point(layer, "combine across"), 0.0, *across)

    def _after(self, layer: int, load: StepLoad) -> float:
        """Seconds of a layer that lie behind its last leg: all of a dense layer that no tensor group divides."""
        if self.tensor > 1 or self.architecture.is_moe(layer):
            return 0.0
        return self._attention(layer, load) + self._dense(layer, load)

    @property
    def _top_k(self) -> int:
        return self.architecture.experts.router.top_k

    def _attention(self, layer: int, load: StepLoad) -> float:
        heads = self.architecture.attention
        window = self.architecture.window(layer)
        context = min(load.context, window) if window else load.context
        dims = heads.cached_dim + heads.latent.key_value_rank if heads.latent else heads.head_dim + heads.value_dim
        flops = 2 * load.rows * context * heads.num_heads * dims / self.tensor
        cached = heads.cached_values / (1 if heads.latent else self.tensor)
        core = self._seconds(flops, load.sequences * context * cached * self.value_bytes)
        return core + self._products(layer, f"{layer_path(layer)}/attention", load.rows)

    def _dense(self, layer: int, load: StepLoad) -> float:
        return self._products(layer, f"{layer_path(layer)}/dense", load.rows)

    def _experts(self, layer: int, load: StepLoad) -> float:
        """Those of the busiest rank, of which rows choose some."""
        experts = self.architecture.experts
        choices = load.rows * self._num_groups * self._top_k
        sizes = [prod(tensor.shape) for tensor in self._tensors(layer, f"{layer_path(layer)}/experts")]
        values = sum(sizes) / experts.num
        hit = self.hosted * (1 - (1 - 1 / experts.num) ** choices)
        return self._seconds(2 * choices * self.hosted / experts.num * values, hit * values * self.value_bytes)

    def _head(self, layers: range, load: StepLoad) -> float:
        """The last product, for a row of each sequence; a group's rows and parts of their logits travel, and block."""
        held = [tensor for tensor in stage_tensors(self.architecture, layers) if tensor.name == "head"]
        logits_bytes = LOGIT_BYTES * self.architecture.vocab_size / self.tensor
        moved = (self._among(load.sequences, size) for size in (self.row_bytes, logits_bytes))
        return self._of(held, load.sequences) + sum(map(sum, moved))

    def _products(self, layer: int, path: str, rows: float) -> float:
        return self._of(self._tensors(layer, path), rows)

    def _tensors(self, layer: int, path: str) -> list[Tensor]:
        """The matrices of a layer below a path."""
        return [
            tensor
            for tensor in layer_tensors(self.architecture, layer)
            if len(tensor.shape) > 1 and (tensor.name == path or tensor.name.startswith(f"{path}/"))
        ]

    def _of(self, tensors: Iterable[Tensor], rows: float) -> float:
        values = sum(prod(one.shape) / (self.tensor if one.share in TENSOR_PARALLEL else 1) for one in tensors)
        return self._seconds(2 * rows * values, values * self.value_bytes if rows else 0.0)

    def _seconds(self, flops: float, num_bytes: float) -> float:
        computing, reading = flops / (self.machine.tflops * 1e12), num_bytes / (self.machine.memory_gb_s * 1e9)
        return max(computing, reading) if self.machine.reads_ahead else computing + reading

    @property
    def _num_ranks(self) -> int:
        return len(self.topology.nodes)

    @property
    def _num_groups(self) -> int:
        return self._num_ranks // self.tensor

    def _one_hop(self, rows: float) -> tuple[float, float]:
        """Each row to the ranks of its experts, in one hop: seconds of the link, and until the last has arrived."""
        hosting = min(self._num_ranks, self.architecture.experts.num)
        choices = rows * self._top_k
        reached = 1 - (1 - 1 / hosting) ** choices
        counts = np.bincount(self.topology.levels(0)[:hosting], minlength=len(self.machine.levels))
        return self._travel(counts * reached, counts / hosting * choices * self.row_bytes)

    def _across_nodes(self, rows: float, *, row_bytes: int = 0) -> tuple[float, float]:
        """Each row once to every other node that hosts one of its experts, over the farthest links there are."""
        num_experts, nodes = self.architecture.experts.num, self.topology.num_nodes
        of_node = num_experts // nodes
        share = 1 - comb(num_experts - of_node, self._top_k) / comb(num_experts, self._top_k)
        levels = self.topology.levels(0)
        counts = np.zeros(len(self.machine.levels))
        for node in range(1, nodes):
            counts[levels[self.topology.nodes.index(node)]] += 1
        reached = 1 - (1 - share) ** rows
        return self._travel(counts * reached, counts * rows * share * (row_bytes or self.row_bytes))

    def _inside_node(self, rows: float) -> tuple[float, float]:
        """Rows that entered a node to the ranks of their experts there."""
        levels = self.topology.levels(0)
        counts = np.bincount(levels[levels <= NODE], minlength=len(self.machine.levels))
        choices = rows * self._top_k
        reached = 1 - (1 - 1 / counts.sum()) ** choices
        return self._travel(counts * reached, counts / counts.sum() * choices * self.row_bytes)

    def _tensor_group(self, load: StepLoad) -> tuple[float, float]:
        """All rows of a tensor group, each rank's part to every other."""
        return self._among(load.rows, self.row_bytes)

    def _among(self, rows: float, num_bytes: float) -> tuple[float, float]:
        """So many bytes for each of a tensor group's rows from each of its ranks to every other."""
        others = np.zeros(len(self.machine.levels))
        others[NODE] = self.tensor - 1
        return self._travel(others, others * rows / self.tensor * num_bytes)

    def _stage_link(self, load: StepLoad, *, is_last: bool) -> tuple[float, float]:
        """A rank's rows to the next stage; from the last one only tokens return."""
        there = np.zeros(len(self.machine.levels))
        there[self.stage_link_level] = 1
        num_bytes = COUNT_BYTES * load.sequences if is_last else load.rows / self.tensor * self.row_bytes
        return self._travel(there, there * num_bytes)

    def _collective(self, num_bytes: int) -> tuple[float, float]:
        """A small word of all ranks to all: as many messages as a tree is deep (Bruck et al. 1997)."""
        far = self.machine.levels[int(self.topology.levels(0).max())]
        messages = ceil(log2(self._num_ranks)) if self._num_ranks > 1 else 0
        return 0.0, messages * far.latency_us * 1e-6 + num_bytes * self._num_ranks / (far.bandwidth_gb_s * 1e9)

    def _travel(self, messages: Float64Array, num_bytes: Float64Array) -> tuple[float, float]:
        """Seconds of the link for all bytes; the latencies pass beside it."""
        bytes_per_s = np.array([level.bandwidth_gb_s * 1e9 for level in self.machine.levels])
        latencies_s = np.array([level.latency_us * 1e-6 for level in self.machine.levels])
        return float((num_bytes / bytes_per_s).sum()), float((messages * latencies_s).sum())
