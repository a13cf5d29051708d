"""A lane: one micro-batch after another, each a step that all ranks take together."""

from collections.abc import Generator
from dataclasses import dataclass

from moempi.engine.ledger import Ledger
from moempi.engine.scheduler import Scheduler
from moempi.engine.tasks import Task
from moempi.model.transformer import Transformer
from moempi.parallel.exchange import Exchange
from moempi.parallel.schedule import STEP_END, Point


@dataclass(frozen=True, slots=True)
class Lane:
    """What the steps of one lane need; its exchange is its own, the rest all lanes of the rank share."""

    index: int
    model: Transformer
    exchange: Exchange
    scheduler: Scheduler
    task: Task
    ledger: Ledger

    def serve(self) -> Generator[Point, None, None]:
        """Take steps until no rank has work for this lane; collective over the lane's ranks.

        A rank without work takes every step with no rows.
        """
        while True:
            sums = self.exchange.agree((self.scheduler.unfinished(self.index), *self.ledger.counts))
            batch, work = self.scheduler.next_batch(self.index)
            rows = yield from self.model.forward(batch, self.exchange)
            self.task.accept(rows, work)
            self.ledger.end_step(self.scheduler.retire(self.index))
            yield STEP_END
            unfinished, *counts = sums.finish().tolist()
            self.ledger.show(*counts)
            if not unfinished:
                return
