"""A lane: one micro-batch after another, each a step that all ranks of a stage take together."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from moempi.backend.protocol import Array, Picked
from moempi.comm.batch import NONE, Batch
from moempi.comm.lane_comm import Network
from moempi.engine.recorder import Ledger
from moempi.engine.routing_trace import RoutingTrace
from moempi.engine.scheduler import Scheduler, Work
from moempi.engine.tasks import Task
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import AGREE, ROWS, SENT, TOKENS, Point
from moempi.model.router_balance import ROUTER_ALONE, Gating
from moempi.model.transformer import Transformer
from moempi.runtime.stop import Stop


@dataclass(frozen=True, slots=True)
class Lane:
    """What the steps of one lane need; its network is its own, the rest all lanes of the rank share."""

    index: int
    model: Transformer
    network: Network
    scheduler: Scheduler
    task: Task
    ledger: Ledger
    stop: Stop
    gating: Gating = ROUTER_ALONE
    trace: RoutingTrace | None = None

    def serve(self) -> Generator[Point, None, None]:
        """Take steps until no rank has work for this lane, or one was asked to stop; collective over all ranks."""
        return self._lead() if self.network.link.is_first else self._follow()

    def _lead(self) -> Generator[Point, None, None]:
        """The first stage: decide each step, take its answers. A rank without work takes every step with no rows."""
        tensor = self.network.tensor
        while True:
            unfinished = self.scheduler.unfinished(self.index)
            surplus = self.network.traffic.surplus_rows
            asked = self.stop.asked or self.network.link.asked_to_stop()
            sums = self.network.exchange.agree((unfinished, asked, surplus, *self.ledger.counts))
            yield AGREE
            unfinished, asked_to_stop, surplus, *counts = sums.finish().tolist()
            if surplus:
                raise RuntimeError(f"the ranks expect {-surplus} rows more than are sent to them")
            self.ledger.show(*counts)
            if not unfinished or asked_to_stop:
                self.network.link.stop()
                return
            work = self.scheduler.next_work(self.index)
            batch = self._batch(work)
            split = RowSplit((batch.num_rows,), tensor.size)
            rows = self.model.embed(batch.tokens[split.indices[tensor.part]])
            self._record(batch, split)
            self.gating.begin_step(split.counts[tensor.part])
            x = yield from self.model.forward(batch, split, rows, self.network, self.gating)
            self.gating.end_step()
            self.task.accept(work, (yield from self._conclude(batch, split, x)))
            self.ledger.end_step(self.scheduler.retire(self.index))

    def _follow(self) -> Generator[Point, None, None]:
        """A later stage: take each step as the stage before hands it on."""
        link = self.network.link
        arrival = link.expect()
        while True:
            if self.stop.asked:
                link.ask_to_stop()
            yield ROWS
            batch, split, rows = link.receive(arrival)
            if batch.stop:
                link.stop()
                return
            arrival = link.expect()
            self._record(batch, split)
            self.gating.begin_step(split.counts[self.network.tensor.part])
            x = yield from self.model.forward(batch, split, rows, self.network, self.gating)
            self.gating.end_step()
            yield from self._conclude(batch, split, x)
            self.ledger.end_step(())
            yield SENT

    def _conclude(self, batch: Batch, split: RowSplit, x: Array | None) -> Generator[Point, None, Picked]:
        """Hand on the rows, unless they have gone, or answer for them; the first stage returns with the answers."""
        link = self.network.link
        if x is not None and link.is_last:
            picked = self._pick(batch, split, x)
            if not link.is_first:
                link.answer(batch, picked)
            return picked
        if x is not None:
            link.send(batch, (yield from self.network.tensor.gather(x, split, layer=-1)))
        if not link.is_first:
            return NOTHING_PICKED
        yield TOKENS
        return link.answers()

    def _record(self, batch: Batch, split: RowSplit) -> None:
        if self.trace is not None:
            self.trace.begin_step(batch, split.indices[self.network.tensor.part])

    def _pick(self, batch: Batch, split: RowSplit, x: Array) -> Picked:
        """Answer for the wanted rows; each rank of a tensor group for those among its part."""
        tensor = self.network.tensor
        wanted = [np.flatnonzero(np.isin(batch.wanted, part)) for part in split.indices]
        places = wanted[tensor.part]
        rows = self.model.backend.take_rows(x, np.searchsorted(split.indices[tensor.part], batch.wanted[places]))
        asked = [batch.asked[place] for place in places.tolist()]
        picked = self.task.pick(self.model, tensor, rows, asked, counts=list(map(len, wanted)))
        return tensor.assemble(picked, places)

    def _batch(self, work: Sequence[Work]) -> Batch:
        wanted, asked = self.task.wants(work)
        return Batch(
            tokens=np.array([token for sequence, rows in work for token in sequence.next_tokens(rows)], np.int64),
            requests=np.array([sequence.prompt.index for sequence, _ in work], np.int64),
            slots=np.array([sequence.slot for sequence, _ in work], np.int64),
            starts=np.array([sequence.computed for sequence, _ in work], np.int64),
            lengths=np.array([rows for _, rows in work], np.int64),
            capacities=np.array([sequence.capacity for sequence, _ in work], np.int64),
            wanted=np.array(wanted, np.int64),
            freed=np.array(self.scheduler.take_freed(), np.int64),
            asked=asked,
        )


NOTHING_PICKED = Picked(NONE, np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
