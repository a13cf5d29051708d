"""A pipeline of stages in virtual time: from its filling to the last token, step by step. Pure.

Step n is a step of lane n modulo the number of lanes, on every stage.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from math import inf

import numpy as np

from moempi.arrays import Float64Array
from moempi.planning.simulate import PhasesOf, Resumed, VirtualStage

Observer = Callable[[int, int, Resumed], None]
"""observer(stage, step, resumed) is called whenever a resumed lane has computed."""


def step_ends_s(
    stages: Sequence[PhasesOf],
    *,
    lanes: int,
    in_flight: int,
    num_steps: int,
    drains: bool = False,
    observer: Observer | None = None,
) -> Float64Array:
    """When the first stage has the tokens of each step (num_steps,), after a begin at 0 s with an empty pipeline.

    `stages` give the phases of each step. Step n begins when the tokens of step n - in_flight are there; other steps
    follow the last unless the pipeline `drains`. A pipeline of one stage starts each lane's next step when the one
    before has ended.
    """
    return _Pipeline(stages, lanes, in_flight, np.full(num_steps, inf), drains, observer).run()


class _Pipeline:
    def __init__(
        self,
        stages: Sequence[PhasesOf],
        lanes: int,
        in_flight: int,
        ends: Float64Array,
        drains: bool,
        observer: Observer | None,
    ) -> None:
        self._stages = [VirtualStage(phases_of, lanes=lanes, fed=len(stages) > 1) for phases_of in stages]
        self._lanes = lanes
        self._in_flight = in_flight
        self._observer = observer
        self._fed: list[dict[int, float]] = [{} for _ in stages]
        self._last = len(ends) - 1 if drains else inf
        self._fed[0] |= {step: 0.0 for step in range(in_flight) if step <= self._last}
        self._ends = ends

    def run(self) -> Float64Array:
        """Let the stage go on that does so the earliest, until all steps have ended."""
        queue = [(0.0, index) for index in range(len(self._stages))]
        heapify(queue)
        left = len(self._ends)
        while left:
            at_s, index = heappop(queue)
            if at_s != self._stages[index].next_s():
                continue  # it has been fed since
            ended = self._advance(index)
            changed = {index}
            if ended is not None:
                step, arrival_s = ended
                changed.add(self._deliver(index, step, arrival_s))
                left -= index == len(self._stages) - 1 and step < len(self._ends)
            for other in changed:
                if (next_s := self._stages[other].next_s()) < inf:
                    heappush(queue, (next_s, other))
        return self._ends

    def _advance(self, index: int) -> tuple[int, float] | None:
        """Let a stage go on; the step that a lane has ended, if any, and when the next stage has its rows."""
        stage = self._stages[index]
        resumed = stage.advance()
        if resumed is None:
            return None
        step = stage.step(resumed.lane)
        if self._observer:
            self._observer(index, step, resumed)
        if not resumed.begins:
            return None
        if len(self._stages) > 1:
            stage.feed(resumed.lane, self._fed[index].pop(step, inf))
        return (step - self._lanes, resumed.sent_s) if step >= self._lanes else None

    def _deliver(self, index: int, step: int, arrival_s: float) -> int:
        """Give the next stage the rows of a step, the first stage the tokens; the stage."""
        following = (index + 1) % len(self._stages)
        if following == 0:
            if step < len(self._ends):
                self._ends[step] = arrival_s
            step += self._in_flight
            if step > self._last:
                return following
        lane = step % self._lanes
        if self._stages[following].step(lane) == step and len(self._stages) > 1:
            self._stages[following].feed(lane, arrival_s)
        else:
            self._fed[following][step] = arrival_s
        return following
