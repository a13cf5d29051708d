"""The lanes of a rank: how they are made, and how they run interleaved."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moempi.comm.lane_comm import LaneComm, LaneOptions, make_lane_comm, slot_rows
from moempi.comm.rank_groups import RankGroups
from moempi.comm.row_shape import RowShape
from moempi.comm.select_transport import ChosenTransport, choose_transport
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.comm.transport_factory import TransportFactory, emulated_links
from moempi.comm.transports.emulated import Link
from moempi.config.job import Job
from moempi.engine.balance import Balance, make_balance
from moempi.engine.interleave import interleave
from moempi.engine.lane import Lane, LaneContext
from moempi.engine.lane_trace import LaneTrace, StepNumbers, make_trace_plan
from moempi.engine.micro_batches import MicroBatches
from moempi.engine.rank_layout import RankLayout
from moempi.engine.replay import Replay, ReplayPolicy
from moempi.errors import ConfigError
from moempi.layout.schedule import Point, step_points
from moempi.model.router_balance import MODEL_ROUTING, RoutingPolicy
from moempi.model.transformer import Transformer
from moempi.runtime.world import World


@dataclass(frozen=True, slots=True)
class Lanes:
    """The lanes of a rank, by index in `each`; a step of any of them has the same `points`.

    `transport` moves their rows; `balance` holds their routing policies, None if the job has none.
    """

    each: Sequence[Lane]
    points: Sequence[Point]
    transport: ChosenTransport
    balance: Balance | None
    pending: PendingTransfers
    overlap: bool
    world: World
    groups: RankGroups

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # such numbers end as logits, which are checked
    def run(self, lanes: Sequence[Lane] | None = None) -> float:
        """Interleave `lanes` (None: all) until they have no steps left, and return the seconds; collective, blocks."""
        lanes = self.each if lanes is None else lanes
        context = lanes[0].context
        micro_batches = MicroBatches(context.scheduler.num_micro_batches, num_lanes=len(lanes))
        begin = time.perf_counter()
        interleave(
            [lane.steps(micro_batches) for lane in lanes],
            self.points,
            pending=self.pending,
            overlap=self.overlap,
            on_queue=context.model.backend.on_queue,
            on_point=self._report,
        )
        if lanes[0].comm.link.is_first:
            micro_batches.drain(lanes[0].accept)
        for lane in lanes:
            lane.policy.flush()
            if lane.trace is not None:
                lane.trace.flush()
        return time.perf_counter() - begin

    def busy_s(self) -> float:
        """Seconds on a clock that stands still while this rank waits for others; safe from any thread."""
        return time.perf_counter() - sum(sum(lane.comm.transfers.waits.values()) for lane in self.each)

    def free(self) -> None:
        """Free the communicators and the shared memory of the lanes, which end with it; collective, blocks."""
        for lane in self.each:
            lane.comm.free()
        self.groups.free()

    def _report(self, lane: int, point: Point) -> None:
        where = f"layer {point.layer} {point.phase}" if point.layer >= 0 else point.phase
        self.world.alive(f"{where}, lane {lane}")


def make_lanes(
    job: Job,
    world: World,
    rank_layout: RankLayout,
    context: LaneContext,
    *,
    pending: PendingTransfers,
    first_step: int,
    replay: Replay | None = None,
) -> Lanes:
    """The lanes of this rank; collective, blocks. The recorded steps are numbered from `first_step`.

    Rows that have a route in `replay` are given it. An error in the links that the job emulates ends all ranks.
    """
    backend, groups = context.model.backend, RankGroups.make(rank_layout.ranks, rank_layout.grid)
    links, (has_peer_memory,) = world.collectively_least(
        lambda: (emulated_links(job.topology), [backend.peer_memory is not None]), num=1
    )
    transport = _choose_transport(job, world, rank_layout, groups, context.model, has_peer_memory=bool(has_peer_memory))
    transports = _transport_factory(job, rank_layout, context.model, name=transport.name, links=links)
    traces = _make_traces(job, rank_layout, context, first_step=first_step)
    levels = rank_layout.topology.levels(rank_layout.ranks.rank)
    comms = [
        make_lane_comm(
            groups,
            rank_layout.layout,
            rank_layout.topology,
            transports=transports,
            transfers=Transfers(backend, pending, levels=levels),
            lane=lane,
            options=LaneOptions(job.exchange.hops, None if trace is None else trace.add_route),
        )
        for lane, trace in enumerate(traces)
    ]
    for comm, trace in zip(comms, traces, strict=True):
        if trace is not None and job.trace.statistics:
            comm.observe_norms(trace.add_norms, trace.add_late_norms)
    balance = make_balance(job.balance, comms, context.model.architecture, rank_layout.stage.layers)
    policies = balance.policies if balance else _replay_policies(rank_layout, context, replay, num_lanes=len(comms))
    lanes = [
        Lane(index, context, comm, policy, trace)
        for index, (comm, policy, trace) in enumerate(zip(comms, policies, traces, strict=True))
    ]
    points = _points(rank_layout, context.model, comms[0])
    return Lanes(lanes, points, transport, balance, pending, job.run.overlap, world, groups)


def _choose_transport(
    job: Job, world: World, rank_layout: RankLayout, groups: RankGroups, model: Transformer, *, has_peer_memory: bool
) -> ChosenTransport:
    """The transport of this rank's stage; collective. All ranks have the same ConfigError, or none."""
    try:
        return choose_transport(
            job.exchange,
            groups,
            rank_layout.grid,
            model.backend,
            topology=rank_layout.topology,
            width=model.architecture.routed_width,
            has_peer_memory=has_peer_memory,
        )
    except ConfigError as error:
        world.raise_together(error)
        raise


def _transport_factory(
    job: Job, rank_layout: RankLayout, model: Transformer, *, name: str, links: Mapping[int, Link]
) -> TransportFactory:
    architecture, experts = model.architecture, model.architecture.experts
    shape = RowShape(
        architecture.width,
        top_k=experts.router.top_k,
        group_rows=job.run.batch_tokens,
        latent_width=experts.latent_width,
    )
    return TransportFactory(
        backend=model.backend,
        name=name,
        shape=shape,
        slot_rows=slot_rows(shape, rank_layout.grid, rank_layout.ranks.rank),
        verify=job.exchange.verify,
        num_lanes=job.lanes,
        links=links,
    )


def _make_traces(
    job: Job, rank_layout: RankLayout, context: LaneContext, *, first_step: int
) -> Sequence[LaneTrace | None]:
    """What each lane records."""
    plan = make_trace_plan(job.trace, context.model, rank_layout.stage.layers)
    if plan is None:
        return [None] * job.lanes
    return [
        LaneTrace(
            plan,
            context.recorder.append,
            context.model.backend,
            rank=rank_layout.ranks.rank,
            steps=StepNumbers(first_step, first_step + lane, job.lanes),
        )
        for lane in range(job.lanes)
    ]


def _replay_policies(
    rank_layout: RankLayout, context: LaneContext, replay: Replay | None, *, num_lanes: int
) -> Sequence[RoutingPolicy]:
    """The routing policy of each lane of a run without balancing."""
    all_layers = context.model.architecture.moe_layers
    layers = [layer for layer in all_layers if layer in rank_layout.stage.layers]
    if replay is None or not layers:
        return [MODEL_ROUTING] * num_lanes
    return [ReplayPolicy(replay, layers, all_layers.index(layers[0])) for _ in range(num_lanes)]


def _points(rank_layout: RankLayout, model: Transformer, comm: LaneComm) -> Sequence[Point]:
    """The points of a step of one lane."""
    architecture = model.architecture
    return step_points(
        rank_layout.stage.layers,
        architecture.moe_layers,
        tensor=comm.tensor.size,
        is_first=comm.link.is_first,
        head=comm.head.size if comm.link.is_last else 0,
        immediate=comm.immediate is not None,
        half_layers=architecture.half_layers,
    )
