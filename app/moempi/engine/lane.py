"""A lane: it takes one step after another, each with a micro-batch that all ranks of a stage compute together."""

from dataclasses import dataclass

import numpy as np

from moempi.backend.values import Array, SampledTokens
from moempi.comm.batch import Batch
from moempi.comm.lane_comm import LaneComm
from moempi.comm.transfers import Wait, Waits, nothing
from moempi.engine.lane_trace import LaneTrace
from moempi.engine.micro_batches import MicroBatch, MicroBatches
from moempi.engine.recorder import Recorder
from moempi.engine.scheduler import Scheduler
from moempi.engine.sequences import NO_WORK, Work
from moempi.engine.tasks import Tables, Task
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import AGREE, GATHER_OUTPUT, HEAD_COUNTS, ROWS, SAMPLED, TOKENS
from moempi.model.router_balance import MODEL_ROUTING, RoutingPolicy
from moempi.model.transformer import Transformer
from moempi.observe.progress import Counts
from moempi.runtime.stop import Stop


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
    """One lane of a rank, with communicators of its own; on all stages it takes the same steps."""

    index: int
    context: LaneContext
    comm: LaneComm
    policy: RoutingPolicy = MODEL_ROUTING
    trace: LaneTrace | None = None

    def steps(self, micro_batches: MicroBatches) -> Waits[None]:
        """Take steps until no rank has work for this lane, one is requested to stop, or the queue of one runs short.

        Collective over all ranks. A step of the first stage is of the next of its `micro_batches`, which all its lanes
        share. Yields at each point of a step, where this lane waits for other ranks.
        """
        return self._first_stage_steps(micro_batches) if self.comm.link.is_first else self._later_stage_steps()

    def accept(self, micro_batch: MicroBatch, sampled: SampledTokens) -> None:
        """Advance the requests of a step by their sampled tokens, and record those that are finished."""
        self.context.task.accept(self.context.scheduler.sequences, micro_batch.work, sampled)
        self.context.recorder.end_step(self.context.scheduler.retire(micro_batch.index), micro_batch.work)
        micro_batch.sampled, micro_batch.work = None, NO_WORK

    def _first_stage_steps(self, micro_batches: MicroBatches) -> Waits[None]:
        while (micro_batch := micro_batches.take()) is not None:
            if not (yield from self._first_stage_step(micro_batch, alone=micro_batches.one_per_lane)):
                break
            micro_batches.put(micro_batch)
        self.comm.link.stop()

    def _first_stage_step(self, micro_batch: MicroBatch, *, alone: bool) -> Waits[bool]:
        """Accept the tokens of the micro-batch's step before, then schedule and compute the next one.

        A rank without work takes every step with no rows. False if the ranks take no other step.
        """
        link = self.comm.link
        if not link.is_last:
            receiving = micro_batch.sampled or self.comm.transfers.start(nothing())
            sampled = yield from receiving.received(TOKENS)
            if sampled is not None:
                self.accept(micro_batch, sampled)
        micro_batch.work = self.context.scheduler.next_work(micro_batch.index)
        if not (yield from self._agree_to_continue(micro_batch, alone=alone)):
            return False
        batch = self._batch(micro_batch.work)
        split = RowSplit((batch.num_rows,), self.comm.tensor.size)
        tokens = batch.tokens[split.indices[self.comm.tensor.part]]
        rows = yield from self._compute(batch, split, self.context.model.embed(tokens))
        if link.is_last:
            self.accept(micro_batch, (yield from self._sample(batch, split, rows)))
        else:
            yield from self._send(batch, split, rows)
            micro_batch.link = link
        return True

    def _later_stage_steps(self) -> Waits[None]:
        """Take each step with the batch and rows that the stage before sends."""
        link = self.comm.link
        receiving = link.start_receive()
        while True:
            if self.context.stop.requested:
                link.request_stop()
            batch, split, rows = yield from receiving.received(ROWS)
            if batch.stop:
                link.stop()
                return
            receiving = link.start_receive()
            rows = yield from self._compute(batch, split, rows)
            if link.is_last:
                link.send_sampled(batch, (yield from self._sample(batch, split, rows)))
            else:
                yield from self._send(batch, split, rows)
            self.context.recorder.end_step(())

    def _agree_to_continue(self, micro_batch: MicroBatch, *, alone: bool) -> Waits[bool]:
        """Whether the ranks of the first stage take another step; collective over them.

        They do if any micro-batch has work, or, if this lane has this one `alone`, if this one has; but not if the
        queue of a group runs short. Raises RuntimeError if the ranks planned to receive another number of rows than was
        sent.
        """
        link, recorder, scheduler = self.comm.link, self.context.recorder, self.context.scheduler
        unfinished = scheduler.unfinished(micro_batch.index)
        pause = self.context.stop.requested or link.stop_requested() or scheduler.is_short
        counts = recorder.counts(running=scheduler.num_running)
        amounts = (unfinished, scheduler.num_unfinished, pause, self.comm.transfers.count_mismatch, *counts)
        sums = yield from self.comm.stage.iallreduce_sum(amounts).received(AGREE)
        unfinished, all_unfinished, num_pauses, count_mismatch, *all_counts = sums.tolist()
        if count_mismatch:
            raise RuntimeError(f"the ranks expect {-count_mismatch} rows more than are sent to them")
        recorder.on_progress(Counts(*all_counts))
        micro_batch.has_work = bool(unfinished)
        return bool(unfinished if alone else all_unfinished) and not num_pauses

    def _compute(self, batch: Batch, split: RowSplit, rows: Array) -> Waits[Array]:
        """Compute the stage's layers; this rank's rows."""
        model, trace, own = self.context.model, self.trace, split.indices[self.comm.tensor.part]
        requests, positions = batch.requests.repeat(batch.lengths)[own], batch.positions[own]
        if trace is not None:
            trace.begin_step(batch, own, requests, positions)
        self.policy.begin_step(requests, positions)
        last_combine = self.comm.last_combine(batch, split)
        hooks = {"on_hidden": trace.add_hidden} if trace is not None and trace.records_hidden else {}
        forward = model.forward(batch, split, rows, self.comm, self.policy, last_combine, **hooks)
        del rows  # of which the memory is free behind the first layer
        x = yield from forward
        if trace is not None:
            trace.end_step()
        self.policy.end_step()
        return x

    def _send(self, batch: Batch, split: RowSplit, x: Array) -> Waits[None]:
        """Send the rows to the next stage, unless the last layer has sent them."""
        if self.comm.immediate is None:
            self.comm.link.send(batch, (yield from self.comm.tensor.all_gather(x, split, GATHER_OUTPUT)))

    def _sample(self, batch: Batch, split: RowSplit, x: Array) -> Waits[SampledTokens]:
        """Sample a token for each logit row of the batch; each rank of a tensor group samples for its part."""
        tensor, group, model = self.comm.tensor, self.comm.head, self.context.model
        if model.head is None:
            raise RuntimeError("the last stage has no head")
        rows_of_part = split.divide(batch.logit_rows)
        own = rows_of_part[tensor.part]
        rows = model.backend.take_rows(x, np.searchsorted(split.indices[tensor.part], batch.logit_rows[own]))
        requests = batch.logit_requests[own]
        counts = yield from group.all_gather_counts(list(map(len, rows_of_part)), HEAD_COUNTS)

        def record(rows: slice, tables: Tables) -> None:
            if tables:
                numbers = batch.logit_rows[own][rows]
                of_rows = np.repeat(batch.requests, batch.lengths)[numbers]
                self.context.recorder.record_rows(of_rows, batch.positions[numbers] + 1, tables)

        task = self.context.task
        sampled = yield from task.sample(model.head, group, rows, requests, counts=counts, record=record)
        if group.size > tensor.size == 1:
            yield Wait(SAMPLED, self.comm.transfers.finished)
        return (yield from tensor.merge_sampled(sampled, rows_of_part, SAMPLED))

    def _batch(self, work: Work) -> Batch:
        scheduler = self.context.scheduler
        sequences = scheduler.sequences
        logit_rows, logit_requests = self.context.task.logit_requests(sequences, work)
        return Batch(
            tokens=sequences.tokens(work),
            requests=sequences.prompts[work.numbers],
            slots=sequences.slots[work.numbers],
            starts=work.starts,
            lengths=work.lengths,
            capacities=sequences.capacities[work.numbers],
            logit_rows=logit_rows,
            freed=scheduler.take_freed(),
            prompts=sequences.prompt_tokens[work.numbers],
            logit_requests=logit_requests,
        )
