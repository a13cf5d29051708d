"""A lane: it takes one step after another, each with a micro-batch that all ranks of a stage compute together."""

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

NOTHING_SAMPLED = SampledTokens(NONE, np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))


@dataclass(frozen=True, slots=True)
class LaneContext:
    """The objects that all lanes of a rank share."""

    model: Transformer
    scheduler: Scheduler
    task: Task
    recorder: Recorder
    stop: Stop


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of a rank, with communicators of its own."""

    index: int
    context: LaneContext
    comm: LaneComm
    policy: RoutingPolicy = MODEL_ROUTING
    trace: RoutingTrace | None = None

    def steps(self) -> Generator[Point, None, None]:
        """Take steps until no rank has work for this lane or a rank is requested to stop; collective over all ranks.

        Yields each point of a step, where this lane waits for other ranks.
        """
        return self._first_stage_steps() if self.comm.link.is_first else self._later_stage_steps()

    def _first_stage_steps(self) -> Generator[Point, None, None]:
        while (yield from self._agree_to_continue()):
            yield from self._first_stage_step()
        self.comm.link.stop()

    def _first_stage_step(self) -> Generator[Point, None, None]:
        """Schedule a step and accept its sampled tokens. A rank without work takes every step with no rows."""
        work = self.context.scheduler.next_work(self.index)
        batch = self._batch(work)
        split = RowSplit((batch.num_rows,), self.comm.tensor.size)
        rows = self.context.model.embed(batch.tokens[split.indices[self.comm.tensor.part]])
        self.context.task.accept(work, (yield from self._compute(batch, split, rows)))
        self.context.recorder.end_step(self.context.scheduler.retire(self.index))

    def _later_stage_steps(self) -> Generator[Point, None, None]:
        """Take each step with the batch and rows that the stage before sends."""
        link = self.comm.link
        receives = link.post_receives()
        while True:
            if self.context.stop.requested:
                link.request_stop()
            yield ROWS
            batch, split, rows = link.receive(receives)
            if batch.stop:
                link.stop()
                return
            receives = link.post_receives()
            yield from self._compute(batch, split, rows)
            self.context.recorder.end_step(())
            yield SENT

    def _agree_to_continue(self) -> Generator[Point, None, bool]:
        """Whether the ranks of the first stage take another step; collective over them.

        Raises RuntimeError if the ranks planned to receive another number of rows than was sent.
        """
        link, recorder = self.comm.link, self.context.recorder
        unfinished = self.context.scheduler.unfinished(self.index)
        stop = self.context.stop.requested or link.stop_requested()
        amounts = (unfinished, stop, self.comm.transfers.count_mismatch, *recorder.counts)
        sums = self.comm.stage.iallreduce_sum(amounts)
        yield AGREE
        unfinished, num_stops, count_mismatch, *counts = sums.finish().tolist()
        if count_mismatch:
            raise RuntimeError(f"the ranks expect {-count_mismatch} rows more than are sent to them")
        recorder.on_progress(*counts)
        return bool(unfinished) and not num_stops

    def _compute(self, batch: Batch, split: RowSplit, rows: Array) -> Generator[Point, None, SampledTokens]:
        """Compute the stage's layers and send the result on; on the first stage, return the sampled tokens."""
        part = self.comm.tensor.part
        if self.trace is not None:
            self.trace.begin_step(batch, split.indices[part])
        self.policy.begin_step(split.counts[part])
        last_combine = self.comm.last_combine(batch, split)
        x = yield from self.context.model.forward(batch, split, rows, self.comm, self.policy, last_combine)
        self.policy.end_step()
        return (yield from self._send(batch, split, x))

    def _send(self, batch: Batch, split: RowSplit, x: Array) -> Generator[Point, None, SampledTokens]:
        """Send the rows to the next stage or, on the last, the sampled tokens to the first."""
        link = self.comm.link
        if link.is_last:
            sampled = self._sample(batch, split, x)
            if not link.is_first:
                link.send_sampled(batch, sampled)
            return sampled
        if self.comm.immediate is None:  # otherwise the last layer has sent them
            link.send(batch, (yield from self.comm.tensor.all_gather(x, split, layer=-1)))
        if not link.is_first:
            return NOTHING_SAMPLED
        yield TOKENS
        return link.receive_sampled()

    def _sample(self, batch: Batch, split: RowSplit, x: Array) -> SampledTokens:
        """Sample a token for each logit row of the batch; each rank of a tensor group samples for its part."""
        tensor, model = self.comm.tensor, self.context.model
        if model.head is None:
            raise RuntimeError("the last stage has no head")
        rows_of_part = [np.flatnonzero(np.isin(batch.logit_rows, part)) for part in split.indices]
        own = rows_of_part[tensor.part]
        rows = model.backend.take_rows(x, np.searchsorted(split.indices[tensor.part], batch.logit_rows[own]))
        requests = [batch.logit_requests[row] for row in own.tolist()]
        counts = list(map(len, rows_of_part))
        sampled = self.context.task.sample(model.head, tensor, rows, requests, counts=counts)
        return tensor.merge_sampled(sampled, own)

    def _batch(self, work: Sequence[Work]) -> Batch:
        logit_rows, logit_requests = self.context.task.logit_requests(work)
        return Batch(
            tokens=np.array([token for request, rows in work for token in request.next_tokens(rows)], np.int64),
            requests=np.array([request.prompt.index for request, _ in work], np.int64),
            slots=np.array([request.slot for request, _ in work], np.int64),
            starts=np.array([request.computed for request, _ in work], np.int64),
            lengths=np.array([rows for _, rows in work], np.int64),
            capacities=np.array([request.capacity for request, _ in work], np.int64),
            logit_rows=np.array(logit_rows, np.int64),
            freed=np.array(self.context.scheduler.take_freed(), np.int64),
            logit_requests=logit_requests,
        )
