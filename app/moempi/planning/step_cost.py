"""The cost of a step on a rank of a stage: seconds of arithmetic, memory and links, from sizes alone. Pure.

A matrix product takes the maximum of its arithmetic and the reading of its weights (the roofline model of Williams,
Waterman and Patterson 2009), or their sum on a machine that does not read ahead. A message takes the latency of its
level plus its bytes over the bandwidth. Routing is even unless a load has `routed` layers. `moempi bench plan`
compares this model with measurements. Where a machine preempts attention, its kernels give way to other lanes; its
products do not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil, inf, log2, prod
from typing import Literal, NamedTuple

import numpy as np

from moempi.arrays import IntArray, larger
from moempi.config.architecture import Architecture, DeltaRule, Indexer, StateSpace
from moempi.config.machine_file import MachineFile
from moempi.config.tensors import TENSOR_PARALLEL, layer_path, layer_tensors, stage_tensors
from moempi.config.topology_file import Level
from moempi.layout.row_buffers import CHOICE_BYTES, scored_rows, share_of_rows
from moempi.layout.schedule import (
    AGREE,
    EXCHANGE_PHASES,
    GATHER_OUTPUT,
    HEAD_COUNTS,
    HEAD_POINTS,
    HEAD_ROWS,
    LOGITS,
    ROWS,
    SAMPLED,
    TENSOR_PHASES,
    TOKENS,
    Point,
    head_points,
)
from moempi.layout.topology import NETWORK, NODE, Topology
from moempi.planning.simulate import Phase, Transmission

COUNT_BYTES = 8
LOGIT_BYTES = 4
STATE_BYTES = 4
STATE_FLOPS = 7
DISPATCH, COMBINE = EXCHANGE_PHASES


class RoutedRows(NamedTuple):
    """Uneven routing of a layer in n steps, on each of R ranks: arrays (n, R).

    The experts of a rank compute `rows`, and `experts` of them have any. `node_tokens` is the number of tokens with an
    expert on the rank's node, relative to that of even routing.
    """

    rows: float
    experts: float
    node_tokens: float


class Computing(NamedTuple):
    """Seconds of computing, of which the kernels of attention take `preemptible_s`."""

    seconds: float = 0.0
    preemptible_s: float = 0.0

    def after(self, other: "Computing") -> "Computing":
        """Both, one after the other."""
        return Computing(other.seconds + self.seconds, other.preemptible_s + self.preemptible_s)

    def before(self, phase: Phase) -> Phase:
        """A phase that begins with this."""
        if self is NOTHING:
            return phase
        seconds, preemptible_s = Computing(phase.compute_s, phase.preemptible_s).after(self)
        return phase._replace(compute_s=seconds, preemptible_s=preemptible_s)


NOTHING = Computing()


@dataclass(frozen=True, slots=True)
class StepLoad:
    """One lane's step in one data parallel group: `rows` of `sequences`, each row attending to `context` positions.

    `cached` positions are read from the cache of each sequence; 0 stands for `context`. For the sums over phases of
    many loads at once, `rows` and `sequences` may be arrays (n,), and so are then the numbers of the phases. `routed`
    layers have uneven routing, all others even routing; numbers of their phases are arrays (n, R). One row of each
    sequence needs logits, all rows if they are `scored`.
    """

    rows: float
    sequences: float
    context: float
    cached: float = 0.0
    scored: bool = False
    routed: Mapping[int, RoutedRows] = field(default_factory=dict, compare=False)

    @property
    def logit_rows(self) -> float:
        """Rows that need logits."""
        return self.rows if self.scored else self.sequences


@dataclass(frozen=True)
class StepCosts:
    """Costs on the busiest rank of a stage, which hosts `hosted` experts of each layer.

    `topology` is that of the stage's ranks, `tensor` the size of a tensor group. A row is sent as `row_bytes`; a number
    of weights and cache takes `value_bytes`. `stage_link_level` is the level of the links to the next stage, to which
    the experts of the last layer send their outputs with `immediate` routing. A "tensor" group divides the LM head, or
    all ranks of the "stage".
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
    immediate: bool = False
    head: Literal["tensor", "stage"] = "tensor"

    def step(self, layers: range, load: StepLoad, *, is_first: bool, is_last: bool) -> list[Phase]:
        """The phases of one lane's step through `layers`, one per point of `schedule.step_points`.

        The first phase ends the step before: it sends that step's rows or tokens to another stage.
        """
        phases: list[Phase] = []
        pending = NOTHING
        equal_layers: dict[object, tuple[list[Phase], Computing]] = {}
        for layer in layers:
            kind: object = self.architecture.kind(layer)
            if layer in load.routed:
                kind = layer
            if kind not in equal_layers:
                equal_layers[kind] = list(self._layer(layer, load)), self._last(layer, load)
            of_layer, last = equal_layers[kind]
            for phase in of_layer:
                phases.append(pending.before(phase._replace(point=Point(layer, phase.point.phase))))
                pending = NOTHING
            pending = last.after(pending)
        if self.immediate:
            pending = Computing(phases.pop().compute_s).after(pending)  # of the experts, whose outputs do not return
        for phase in self._end(layers, load, is_last=is_last):
            phases.append(pending.before(phase))
            pending = NOTHING
        if is_last and self.head_ranks == 1:
            pending = Computing(self._head_s(layers, load)).after(pending)
        sent = None if is_first and is_last else self._stage_link(layers, load, is_last=is_last)
        begin, *others = self._begin(sent, is_first=is_first)
        phases = [pending.before(begin), *others, *phases]
        return [phase._replace(compute_s=phase.compute_s + self.host_overhead_s(phase.point)) for phase in phases]

    def host_overhead_s(self, point: Point) -> float:
        """Seconds of the host's overhead when a lane is resumed at `point`; rows of a rank alone stay with it."""
        if self._num_ranks == 1 and point.phase in EXCHANGE_PHASES:
            return 0.0
        of_tensor_group = self.machine.tensor_overhead_us
        if of_tensor_group is None or not (point.phase in TENSOR_PHASES or point in HEAD_POINTS):
            return self.machine.turn_us * 1e-6
        return of_tensor_group * 1e-6

    def _begin(self, sent: Transmission | None, *, is_first: bool) -> list[Phase]:
        """The phases before the first layer; rows and tokens of other stages have arrived in a full pipeline."""
        agreement = [self._collective(COUNT_BYTES)]
        if not is_first:
            return [Phase(ROWS, 0.0, sent=sent)]
        if sent is None:
            return [Phase(AGREE, 0.0, agreement)]
        return [Phase(TOKENS, 0.0, sent=sent), Phase(AGREE, 0.0, agreement)]

    def _layer(self, layer: int, load: StepLoad) -> Iterator[Phase]:
        """The phases of a layer; a dense layer without a tensor group has none (`_last`)."""
        attention = self._attention(layer, load)
        if self.tensor > 1 and self.architecture.has_attention(layer):
            yield from self._divided(layer, attention, load)
            attention = NOTHING
        if self.architecture.is_moe(layer):
            dispatch, combine = self._mixture_of_experts(layer, load)
            yield from (attention.before(dispatch), combine)
        elif self.tensor > 1 and self.architecture.has_feed_forward(layer):
            yield from self._divided(layer, Computing(self._dense(layer, load)), load)

    def _divided(self, layer: int, computing: Computing, load: StepLoad) -> Iterator[Phase]:
        """Computation that a tensor group divides, between its all-gather and reduce-scatter of all rows."""
        for name, one in zip(TENSOR_PHASES, (NOTHING, computing), strict=True):
            yield one.before(Phase(Point(layer, name), 0.0, [self._tensor_group(load)]))

    def _mixture_of_experts(self, layer: int, load: StepLoad) -> Iterator[Phase]:
        """The phases of an exchange: computation up to each, and its transfer.

        Counts travel beside the rows; in two hops, choices and then the counts inside the node do, too.
        """
        own = load.rows / self.tensor
        routing_s = self._products(layer, "router", own) + self._products(layer, "latent/down", own)
        shared_s = self._products(layer, "shared", own)
        experts_s = self._experts(layer, load)
        counts, busiest = self._collective(COUNT_BYTES), self._busiest(layer, load)
        if self.hops == 1:
            rows = self._one_hop(own, busiest)
            dispatch = [Transmission(rows.link_s, larger(rows.latency_s, counts.latency_s))]
            combine = [rows]
        else:
            reach = larger(1.0, load.routed[layer].node_tokens) if layer in load.routed else busiest
            across, inside = self._across_nodes(own, reach), self._inside_node(own, busiest)
            choices = self._across_nodes(own, reach, row_bytes=CHOICE_BYTES * self._top_k)
            planned_s = larger(choices.latency_s, counts.latency_s) + counts.latency_s
            latency_s = larger(across.latency_s, planned_s)
            dispatch = [Transmission(choices.link_s + across.link_s, latency_s), inside]
            combine = [inside, across]
        yield Phase(Point(layer, DISPATCH), routing_s, dispatch, beside_s=shared_s)
        yield Phase(Point(layer, COMBINE), experts_s, combine)

    def _last(self, layer: int, load: StepLoad) -> Computing:
        """What a layer computes after its last phase, which delays the next: all of a dense layer without phases."""
        if self.architecture.is_moe(layer):
            return Computing(self._products(layer, "latent/up", load.rows / self.tensor))
        if self.tensor > 1:
            return NOTHING
        return Computing(self._dense(layer, load)).after(self._attention(layer, load))

    @property
    def _routed_bytes(self) -> int:
        """Bytes of a row on its way to an expert and back."""
        return self.row_bytes * self.architecture.routed_width // self.architecture.width

    @property
    def _top_k(self) -> int:
        return self.architecture.experts.router.top_k

    def _attention(self, layer: int, load: StepLoad) -> Computing:
        if not self.architecture.has_attention(layer):
            return NOTHING
        if self.architecture.recurrence and self.architecture.has_state(layer):
            kernels_s = self._recurrence(self.architecture.recurrence, load)
            products_s = self._products(layer, "delta", load.rows) + self._products(layer, "state_space", load.rows)
        else:
            kernels_s = self._kernels_s(layer, load)
            products_s = self._products(layer, "attention", load.rows)
        return Computing(kernels_s + products_s, kernels_s * self.machine.preempts_attention)

    def _kernels_s(self, layer: int, load: StepLoad) -> float:
        """Scores and sums of attention over the cache, and the choice of positions, without the products of rows."""
        heads = self.architecture.attention
        window = self.architecture.window(layer)
        context, read = (min(positions, window or inf) for positions in (load.context, load.cached or load.context))
        index_s = 0.0
        if heads.indexer and load.context > heads.indexer.top_k:
            index_s = self._choice(heads.indexer, layer, load)
            context, read = heads.indexer.top_k, heads.indexer.top_k * load.rows / larger(load.sequences, 1.0)
        dims = heads.cached_dim + heads.latent.key_value_rank if heads.latent else heads.head_dim + heads.value_dim
        flops = 2 * load.rows * context * heads.num_heads * dims / self.tensor
        cached = heads.cached_values / (1 if heads.latent else self.tensor)
        return self._roofline(flops, load.sequences * read * cached * self.value_bytes) + index_s

    def _choice(self, indexer: Indexer, layer: int, load: StepLoad) -> float:
        """The scores of an indexer for the whole context, and their keys; every rank of a tensor group computes all."""
        if not self.architecture.has_indexer(layer):
            return 0.0
        flops = 2 * load.rows * load.context * indexer.num_heads * indexer.head_dim
        cached = load.sequences * (load.cached or load.context) * indexer.head_dim
        return self._roofline(flops, cached * self.value_bytes)

    def _recurrence(self, rule: DeltaRule | StateSpace, load: StepLoad) -> float:
        """Each row decays, reads, changes and reads the state; a step reads and writes that of each sequence."""
        values = rule.state_values / self.tensor
        return self._roofline(STATE_FLOPS * load.rows * values, 2 * STATE_BYTES * load.sequences * values)

    def _dense(self, layer: int, load: StepLoad) -> float:
        return self._products(layer, "dense", load.rows)

    def _experts(self, layer: int, load: StepLoad) -> float:
        """Expert products on the busiest rank, which reads the weights of the experts that any row chose."""
        experts = self.architecture.experts
        values = _num_values(self.architecture, layer, "experts", 1) / experts.num
        choices = load.rows * self._num_groups * self._top_k
        rows, chosen = choices * self.hosted / experts.num, self.hosted * (1 - (1 - 1 / experts.num) ** choices)
        if layer in load.routed:
            rows, chosen, _ = load.routed[layer]
        return self._roofline(2 * rows * values, chosen * values * self.value_bytes)

    def _end(self, layers: range, load: StepLoad, *, is_last: bool) -> list[Phase]:
        """The rows of a tensor group are all-gathered; on the last stage the head ends a step."""
        if is_last:
            return self._head(layers, load)
        if self.tensor == 1 or self.immediate:
            return []
        return [Phase(GATHER_OUTPUT, 0.0, [self._tensor_group(load)])]

    def _head(self, layers: range, load: StepLoad) -> list[Phase]:
        """The ranks that divide the head gather their rows and exchange slices of logits, and tensor groups tokens.

        Several tensor groups first exchange their numbers of rows; rows and logits then travel in two levels.
        """
        rounds = self._head_rounds(load)
        own, all_rows = load.logit_rows / self.tensor, load.logit_rows * self.head_ranks / self.tensor
        logits_bytes = LOGIT_BYTES * self.architecture.vocab_size / self.head_ranks
        counts: list[Transmission] = []
        rows, logits = ([self._all_to_all(all_rows, size)] for size in (self.row_bytes, logits_bytes))
        if self.head_ranks > self.tensor:
            counts.append(self._all_gather_across(COUNT_BYTES * self.tensor))
            rows.insert(0, self._all_gather_across(own * self.row_bytes))
            others = self._count(self._levels[:: self.tensor][1:])
            logits.append(self._transfer(others, 1.0, own * logits_bytes * self.tensor))
        phases = (
            Phase(HEAD_COUNTS, 0.0, counts),
            Phase(HEAD_ROWS, 0.0, [Transmission(one.link_s, rounds * one.latency_s) for one in rows]),
            Phase(
                LOGITS, self._head_s(layers, load), [Transmission(one.link_s, rounds * one.latency_s) for one in logits]
            ),
            Phase(SAMPLED, 0.0, [self._all_to_all(load.logit_rows, COUNT_BYTES)]),
        )
        points = head_points(tensor=self.tensor, head=self.head_ranks)
        return [phase for phase in phases if phase.point in points]

    def _head_s(self, layers: range, load: StepLoad) -> float:
        """The logits of all groups that divide the head, which is read once for the rows that are scored at a time."""
        matrices = [tensor for tensor in stage_tensors(self.architecture, layers) if tensor.name == "head"]
        values = sum(prod(one.shape) for one in matrices) / self.head_ranks
        rows = load.logit_rows * self.head_ranks / self.tensor
        return self._roofline(2 * rows * values, self._head_rounds(load) * values * self.value_bytes * (rows > 0))

    def _head_rounds(self, load: StepLoad) -> float:
        """How many times a rank takes rows through the head in a step."""
        if not load.scored:
            return 1.0
        at_once = scored_rows(self.architecture.vocab_size, self.head_ranks)
        return larger(1.0, np.ceil(load.logit_rows / self.tensor / at_once))

    def _products(self, layer: int, part: str, rows: float) -> float:
        """The products of rows with the matrices of a part of a layer."""
        return self._matrices(_num_values(self.architecture, layer, part, self.tensor), rows)

    def _matrices(self, values: float, rows: float) -> float:
        return self._roofline(2 * rows * values, values * self.value_bytes * (rows > 0))

    def _roofline(self, flops: float, num_bytes: float) -> float:
        computing, reading = flops / (self.machine.tflops * 1e12), num_bytes / (self.machine.memory_gb_s * 1e9)
        return larger(computing, reading) if self.machine.reads_ahead else computing + reading

    @property
    def _num_ranks(self) -> int:
        return len(self.topology.nodes)

    @property
    def head_ranks(self) -> int:
        """Ranks that divide the LM head."""
        return self._num_ranks if self.head == "stage" else self.tensor

    @property
    def _num_groups(self) -> int:
        return self._num_ranks // self.tensor

    @cached_property
    def _levels(self) -> IntArray:
        return self.topology.levels(0)

    @property
    def _num_hosting(self) -> int:
        """Ranks that host experts: the first of them, if there are more ranks than experts."""
        return min(self._num_ranks, self.architecture.experts.num)

    def _busiest(self, layer: int, load: StepLoad) -> float:
        """Rows that the busiest rank, or each rank, receives for each row that a rank sends; at least 1."""
        if layer in load.routed:
            sent = load.rows / self.tensor * self._top_k
            return larger(1.0, load.routed[layer].rows / sent)
        return max(1.0, self._num_ranks * self.hosted / self.architecture.experts.num)

    def _one_hop(self, rows: float, busiest: float) -> Transmission:
        """Each row to the ranks of its experts, in one hop: seconds of the link, and latency."""
        hosting = self._num_hosting
        choices = rows * self._top_k
        probability = 1 - (1 - 1 / hosting) ** choices
        ranks = self._count(self._levels[:hosting])
        return self._transfer(ranks, probability, busiest * choices / hosting * self._routed_bytes)

    def _across_nodes(self, rows: float, busiest: float, *, row_bytes: int = 0) -> Transmission:
        """Each row once to every other node that hosts one of its experts."""
        nodes, firsts = np.unique(self.topology.nodes[: self._num_hosting], return_index=True)
        share = share_of_rows(self.architecture.experts.num, self._top_k, len(nodes))
        probability = 1 - (1 - share) ** rows
        sent_bytes = busiest * rows * share * (row_bytes or self._routed_bytes)
        return self._transfer(self._count(self._levels[firsts[1:]]), probability, sent_bytes)

    def _inside_node(self, rows: float, busiest: float) -> Transmission:
        """Rows from the forwarders of a node to the ranks of their experts there."""
        ranks = self._count(self._levels[self._levels <= NODE])
        choices, hosting = rows * self._top_k, int(ranks.sum())
        probability = 1 - (1 - 1 / hosting) ** choices
        return self._transfer(ranks, probability, busiest * choices / hosting * self._routed_bytes)

    def _tensor_group(self, load: StepLoad) -> Transmission:
        """All rows of a tensor group: each rank sends its part to every other."""
        return self._all_to_all(load.rows, self.row_bytes)

    def _all_to_all(self, rows: float, num_bytes: float) -> Transmission:
        """`num_bytes` for each of a rank's part of `rows`, to every other rank of the tensor group."""
        return self._transfer(self._count([NODE] * (self.tensor - 1)), 1.0, rows / self.tensor * num_bytes)

    def _stage_link(self, layers: range, load: StepLoad, *, is_last: bool) -> Transmission:
        """A rank's rows to the next stage; the last stage sends tokens to the first."""
        if self.immediate:
            return self._immediate(load.rows / self.tensor, self._busiest(layers[-1], load))
        num_bytes = COUNT_BYTES * load.sequences if is_last else load.rows / self.tensor * self.row_bytes
        return self._transfer(self._count([self.stage_link_level]), 1.0, num_bytes)

    def _immediate(self, rows: float, busiest: float) -> Transmission:
        """The outputs of a rank's experts to the ranks of the next stage, which are as many, and its own residuals."""
        choices = busiest * rows * self._top_k
        probability = 1 - (1 - 1 / self._num_ranks) ** choices
        residuals = 2 * rows if self.architecture.experts.shared_width else rows
        num_bytes = (choices + residuals) / self._num_ranks * self.row_bytes
        return self._transfer(self._count([self.stage_link_level] * self._num_ranks), probability, num_bytes)

    def _collective(self, num_bytes: int) -> Transmission:
        """An all-to-all of `num_bytes` per pair of ranks, in log2(ranks) messages (Bruck et al. 1997)."""
        farthest = self.machine.levels[int(self._levels.max())]
        messages = ceil(log2(self._num_ranks)) if self._num_ranks > 1 else 0
        bytes_s = num_bytes * self._num_ranks / (farthest.bandwidth_gb_s * 1e9)
        return Transmission(0.0, messages * farthest.latency_us * 1e-6 + bytes_s)

    def _all_gather_across(self, num_bytes: float) -> Transmission:
        """`num_bytes` of a rank of each tensor group to all these ranks, over links of the farthest level.

        In log2(groups) messages (Bruck et al. 1997).
        """
        farthest = self.machine.levels[int(self._levels.max())]
        bytes_s = num_bytes * (self._num_groups - 1) / (farthest.bandwidth_gb_s * 1e9)
        return Transmission(bytes_s, ceil(log2(self._num_groups)) * farthest.latency_us * 1e-6)

    def _count(self, levels: IntArray | Sequence[int]) -> IntArray:
        """The number of ranks at each level."""
        return np.bincount(np.asarray(levels, np.int64), minlength=len(self.machine.levels))

    def _transfer(self, ranks: IntArray, messages: float, num_bytes: float) -> Transmission:
        """Messages and bytes to each of these ranks: seconds of the link, and latency, which leaves the link free."""
        byte_s = sum(count / (one.bandwidth_gb_s * 1e9) for count, one in self._present(ranks))
        message_s = sum(count * one.latency_us * 1e-6 for count, one in self._present(ranks))
        return Transmission(byte_s * num_bytes, message_s * messages)

    def _present(self, ranks: IntArray) -> list[tuple[int, Level]]:
        """The levels that have ranks, and their numbers."""
        return [(count, one) for count, one in zip(ranks.tolist(), self.machine.levels, strict=True) if count]


@lru_cache(maxsize=1 << 12)
def _num_values(architecture: Architecture, layer: int, part: str, tensor: int) -> float:
    """Numbers in a rank's matrices of a part of a layer, in a tensor group of `tensor` ranks."""
    path = f"{layer_path(layer)}/{part}"
    return sum(
        prod(one.shape) / (tensor if one.share in TENSOR_PARALLEL else 1)
        for one in layer_tensors(architecture, layer)
        if len(one.shape) > 1 and (one.name == path or one.name.startswith(f"{path}/"))
    )
