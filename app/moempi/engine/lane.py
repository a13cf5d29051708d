"""A lane: one micro-batch after another, each a step that all ranks of a stage take together."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from moempi.backend.protocol import Array, SampledTokens
from moempi.comm.batch import NONE, Batch
from moempi.comm.lane_comm import LaneComm
from moempi.engine.recorder import Recorder
from moempi.engine.routing_trace import RoutingTrace
from moempi.engine.scheduler import Scheduler, Work
from moempi.engine.tasks import Task
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import AGREE, ROWS, SENT, TOKENS, Point
from moempi.model.router_balance import MODEL_ROUTING, RoutingPolicy
from moempi.model.transformer import Transformer
from moempi.runtime.stop import Stop


@dataclass(frozen=True, slots=True)
class Lane:
    """What the steps of one lane need; its network is its own, the rest all lanes of the rank share."""

    index: int
    model: Transformer
    comm: LaneComm
    scheduler: Scheduler
    task: Task
    recorder: Recorder
    stop: Stop
    policy: RoutingPolicy = MODEL_ROUTING
    trace: RoutingTrace | None = None

    def steps(self) -> Generator[Point, None, None]:
        """Take steps until no rank has work for this lane, or one was asked to stop; collective over all ranks."""
        return self._first_stage_steps() if self.comm.link.is_first else self._later_stage_steps()

    def _first_stage_steps(self) -> Generator[Point, None, None]:
        """The first stage: decide each step, take its answers. A rank without work takes every step with no rows."""
        tensor = self.comm.tensor
        while True:
            unfinished = self.scheduler.unfinished(self.index)
            surplus = self.comm.transfers.count_mismatch
            asked = self.stop.requested or self.comm.link.stop_requested()
            sums = self.comm.exchange.agree((unfinished, asked, surplus, *self.recorder.counts))
            yield AGREE
            unfinished, asked_to_stop, surplus, *counts = sums.finish().tolist()
            if surplus:
                raise RuntimeError(f"the ranks expect {-surplus} rows more than are sent to them")
            self.recorder.on_progress(*counts)
            if not unfinished or asked_to_stop:
                self.comm.link.stop()
                return
            work = self.scheduler.next_work(self.index)
            batch = self._batch(work)
            split = RowSplit((batch.num_rows,), tensor.size)
            rows = self.model.embed(batch.tokens[split.indices[tensor.part]])
            self._record(batch, split)
            self.policy.begin_step(split.counts[tensor.part])
            x = yield from self.model.forward(batch, split, rows, self.comm, self.policy)
            self.policy.end_step()
            self.task.accept(work, (yield from self._end_step(batch, split, x)))
            self.recorder.end_step(self.scheduler.retire(self.index))

    def _later_stage_steps(self) -> Generator[Point, None, None]:
        """A later stage: take each step as the stage before hands it on."""
        link = self.comm.link
        arrival = link.post_receives()
        while True:
            if self.stop.requested:
                link.request_stop()
            yield ROWS
            batch, split, rows = link.receive(arrival)
            if batch.stop:
                link.stop()
                return
            arrival = link.post_receives()
            self._record(batch, split)
            self.policy.begin_step(split.counts[self.comm.tensor.part])
            x = yield from self.model.forward(batch, split, rows, self.comm, self.policy)
            self.policy.end_step()
            yield from self._end_step(batch, split, x)
            self.recorder.end_step(())
            yield SENT

    def _end_step(self, batch: Batch, split: RowSplit, x: Array | None) -> Generator[Point, None, SampledTokens]:
        """Hand on the rows, unless they have gone, or answer for them; the first stage returns with the answers."""
        link = self.comm.link
        if x is not None and link.is_last:
            picked = self._sample(batch, split, x)
            if not link.is_first:
                link.send_sampled(batch, picked)
            return picked
        if x is not None:
            link.send(batch, (yield from self.comm.tensor.all_gather(x, split, layer=-1)))
        if not link.is_first:
            return NOTHING_SAMPLED
        yield TOKENS
        return link.receive_sampled()

    def _record(self, batch: Batch, split: RowSplit) -> None:
        if self.trace is not None:
            self.trace.begin_step(batch, split.indices[self.comm.tensor.part])

    def _sample(self, batch: Batch, split: RowSplit, x: Array) -> SampledTokens:
        """Answer for the wanted rows; each rank of a tensor group for those among its part."""
        tensor = self.comm.tensor
        wanted = [np.flatnonzero(np.isin(batch.logit_rows, part)) for part in split.indices]
        places = wanted[tensor.part]
        rows = self.model.backend.take_rows(x, np.searchsorted(split.indices[tensor.part], batch.logit_rows[places]))
        asked = [batch.logit_requests[place] for place in places.tolist()]
        picked = self.task.sample(self.model, tensor, rows, asked, counts=list(map(len, wanted)))
        return tensor.merge_sampled(picked, places)

    def _batch(self, work: Sequence[Work]) -> Batch:
        wanted, asked = self.task.logit_requests(work)
        return Batch(
            tokens=np.array([token for sequence, rows in work for token in sequence.next_tokens(rows)], np.int64),
            requests=np.array([sequence.prompt.index for sequence, _ in work], np.int64),
            slots=np.array([sequence.slot for sequence, _ in work], np.int64),
            starts=np.array([sequence.computed for sequence, _ in work], np.int64),
            lengths=np.array([rows for _, rows in work], np.int64),
            capacities=np.array([sequence.capacity for sequence, _ in work], np.int64),
            logit_rows=np.array(wanted, np.int64),
            freed=np.array(self.scheduler.take_freed(), np.int64),
            logit_requests=asked,
        )


NOTHING_SAMPLED = SampledTokens(NONE, np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
