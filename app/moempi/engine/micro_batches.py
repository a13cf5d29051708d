"""The micro-batches of a data parallel group, which pass through the lanes of the first stage in rotation."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from moempi.backend.values import SampledTokens
from moempi.comm.stage_link import StageLink
from moempi.comm.transfers import Transfer
from moempi.engine.sequences import NO_WORK, Work


@dataclass(slots=True)
class MicroBatch:
    """The requests that the scheduler assigns to micro-batch `index`; it has at most one step in flight.

    `has_work` is whether any group had requests for it when its last step began, `work` is that step. In a
    pipeline, `link` brings the tokens that the last stage samples for the step, and `sampled` is their transfer.
    """

    index: int
    has_work: bool = True
    work: Work = NO_WORK
    link: StageLink | None = None
    sampled: Transfer[SampledTokens] | None = None

    def start_receive(self) -> None:
        """Start to receive the tokens of the step in flight, if there is one; does not block."""
        if self.link is not None:
            self.sampled, self.link = self.link.start_receive_sampled(), None


class MicroBatches:
    """The micro-batches that no lane computes, in the order of their steps, which is the order in which they go on.

    With `one_per_lane`, each lane always takes the same one, and ends with it.
    """

    def __init__(self, number: int, *, num_lanes: int) -> None:
        self.one_per_lane = number == num_lanes
        self._waiting = deque(map(MicroBatch, range(number)))
        self._ended: list[MicroBatch] = []

    def take(self) -> MicroBatch | None:
        """The next micro-batch that has work, or None if all others are with other lanes or ended.

        Starts to receive the tokens of its step in flight; does not block.
        """
        while self._waiting:
            micro_batch = self._waiting.popleft()
            micro_batch.start_receive()
            if micro_batch.has_work:
                return micro_batch
            self._ended.append(micro_batch)
        return None

    def put(self, micro_batch: MicroBatch) -> None:
        """Return a micro-batch whose step has been computed or sent."""
        self._waiting.append(micro_batch)

    def drain(self, accept: Callable[[MicroBatch, SampledTokens], None]) -> None:
        """Block until the tokens of all steps in flight are received, and `accept` them."""
        for micro_batch in (*self._ended, *self._waiting):
            micro_batch.start_receive()
            if micro_batch.sampled is not None:
                accept(micro_batch, micro_batch.sampled.finish())
