"""The lanes of a rank: each has a network of its own, and they take their steps in turn."""

import time
from collections.abc import Sequence
from dataclasses import replace

from moempi.comm.lane_comm import LaneComm, choose_transport, emulated_links, make_lane_comm
from moempi.config.job import Job
from moempi.engine.balance import make_balance
from moempi.engine.interleave import interleave
from moempi.engine.lane import Lane
from moempi.engine.rank_layout import RankLayout
from moempi.engine.recorder import Recorder
from moempi.engine.routing_trace import RoutingTrace
from moempi.engine.scheduler import Scheduler
from moempi.engine.tasks import Task
from moempi.layout.schedule import Point, step_points
from moempi.model.router_balance import MODEL_ROUTING
from moempi.model.transformer import Transformer
from moempi.runtime.stop import Stop
from moempi.runtime.world import World


class Lanes:
    """The lanes `each` of a rank, the `transport` that their rows go by, and what balances their gating, if anything.

    Making them is collective. The steps whose routing is recorded count from `first_step`.
    """

    def __init__(
        self,
        job: Job,
        world: World,
        rank_layout: RankLayout,
        model: Transformer,
        *,
        scheduler: Scheduler,
        task: Task,
        recorder: Recorder,
        stop: Stop,
        first_step: int,
    ) -> None:
        self._job = job
        self._world = world
        self._rank_layout = rank_layout
        self._model = model
        self.transport = choose_transport(
            job.exchange.transport,
            rank_layout.ranks,
            rank_layout.grid,
            model.backend,
            topology=rank_layout.topology,
            width=self._width,
        )
        networks = self._make_comms()
        self.balance = make_balance(job.balance, networks, model.architecture, rank_layout.stage.layers)
        gatings = self.balance.policies if self.balance else [MODEL_ROUTING] * len(networks)
        self.each = [
            Lane(index, model, network, scheduler, task, recorder, stop, gating)
            for index, (network, gating) in enumerate(zip(networks, gatings, strict=True))
        ]
        if job.trace.routing:
            self.each = [self._traced(lane, recorder, first_step) for lane in self.each]

    def take_steps(self, lanes: Sequence[Lane] | None = None) -> float:
        """Interleave `lanes`, or all, to their end; the seconds that it took. Collective, blocks.

        Long verbs of the backend keep all lanes' rows moving. Lanes of a pipeline go in pairs: see `schedule`.
        """
        lanes = self.each if lanes is None else lanes
        self._model.backend.progress = lambda: _keep_moving(lanes)
        link = lanes[0].comm.link
        begin = time.perf_counter()
        interleave(
            [lane.steps() for lane in lanes],
            self._points(lanes[0].comm),
            side_by_side=len(lanes) if link.is_first and link.is_last else 2,
            on_resume=self._model.backend.use_queue,
            on_point=self._reached,
        )
        for lane in lanes:
            lane.policy.flush()
        return time.perf_counter() - begin

    @property
    def _width(self) -> int:
        return self._model.architecture.width

    def _make_comms(self) -> list[LaneComm]:
        job, seat, architecture = self._job, self._rank_layout, self._model.architecture
        links = self._world.collectively(lambda: emulated_links(job.topology))
        return [
            make_lane_comm(
                seat.ranks,
                seat.grid,
                seat.placements,
                self._model.backend,
                topology=seat.topology,
                transport=self.transport.name,
                hops=job.exchange.hops,
                verify=job.exchange.verify,
                width=self._width,
                top_k=architecture.experts.router.top_k,
                group_rows=job.run.batch_tokens,
                overlap=job.run.overlap,
                immediate_stages=seat.immediate_stages,
                lanes=job.lanes,
                links=links,
            )
            for _ in range(job.lanes)
        ]

    def _traced(self, lane: Lane, recorder: Recorder, first_step: int) -> Lane:
        """The lane once more, with what records its routing."""
        trace = RoutingTrace(
            recorder.append,
            self._model.backend,
            layers=[layer for layer in self._model.architecture.moe_layers if layer in self._rank_layout.stage.layers],
            rank=self._rank_layout.ranks.rank,
            since=first_step,
            first_step=first_step + lane.index,
            stride=self._job.lanes,
        )
        lane.comm.exchange.listen = trace.add_route
        return replace(lane, trace=trace)

    def _points(self, comm: LaneComm) -> Sequence[Point]:
        """Where a step of a lane yields."""
        return step_points(
            self._rank_layout.stage.layers,
            self._model.architecture.moe_layers,
            tensor=comm.tensor.size,
            is_first=comm.link.is_first,
            is_last=comm.link.is_last,
            hops=self._job.exchange.hops,
            immediate=comm.immediate is not None,
        )

    def _reached(self, lane: int, point: Point) -> None:
        place = f"layer {point.layer} {point.phase}" if point.layer >= 0 else point.phase
        self._world.alive(f"{place}, lane {lane}")


def _keep_moving(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.comm.transfers.progress()
