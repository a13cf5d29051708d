"""A pipeline of stages in virtual time: from its filling to the last token, step by step. Pure.

Step n is a step of lane n modulo the number of lanes, on every stage. All ranks of a stage take equal times.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from math import inf

import numpy as np

from moempi.arrays import Float64Array
from moempi.planning.simulate import Phase, VirtualStage

Scale = Callable[[int, int, Phase], float]
"""scale(stage, step, phase) multiplies the computing of a phase: uneven routing, a slow rank."""


def step_ends_s(
    stages: Sequence[Sequence[Phase]], *, lanes: int, in_flight: int, num_steps: int, scale: Scale | None = None
) -> Float64Array:
    """When the first stage has the tokens of each step (num_steps,), after a begin at 0 s with an empty pipeline.

    `stages` are the phases of a step on each. Step n begins when the tokens of step n - in_flight are there. A pipeline
    of one stage starts each lane's next step when the one before has ended.
    """
    return _Pipeline(stages, lanes, in_flight, num_steps, scale).run()


class _Pipeline:
    def __init__(
        self, stages: Sequence[Sequence[Phase]], lanes: int, in_flight: int, num_steps: int, scale: Scale | None
    ) -> None:
        self._stages = [VirtualStage(phases, lanes=lanes, fed=len(stages) > 1) for phases in stages]
        self._lanes = lanes
        self._in_flight = in_flight
        self._scale = scale
        self._begun = np.full((len(stages), lanes), -1)  # rounds of each lane, of `lanes` steps
        self._fed: list[dict[int, float]] = [{} for _ in stages]
        self._fed[0] |= dict.fromkeys(range(in_flight), 0.0)
        self._ends = np.full(num_steps, inf)

    def run(self) -> Float64Array:
        """Resume the stage whose next lane is the earliest, until all steps have ended."""
        queue = [(0.0, index) for index in range(len(self._stages))]
        heapify(queue)
        left = len(self._ends)
        while left:
            at_s, index = heappop(queue)
            if at_s != self._stages[index].next_s():
                continue  # it has been fed since
            ended = self._resume(index)
            changed = {index}
            if ended is not None:
                step, arrival_s = ended
                changed.add(self._deliver(index, step, arrival_s))
                left -= index == len(self._stages) - 1 and step < len(self._ends)
            for other in changed:
                if (next_s := self._stages[other].next_s()) < inf:
                    heappush(queue, (next_s, other))
        return self._ends

    def _resume(self, index: int) -> tuple[int, float] | None:
        """Resume a lane of a stage; the step that it has ended, if any, and when the next stage has its rows."""
        lane, begins, sent_s = self._stages[index].resume(self._scale_of(index))
        if not begins:
            return None
        self._begun[index, lane] += 1
        step = int(self._begun[index, lane]) * self._lanes + lane
        if len(self._stages) > 1:
            self._stages[index].feed(lane, self._fed[index].pop(step, inf))
        return (step - self._lanes, sent_s) if step >= self._lanes else None

    def _deliver(self, index: int, step: int, arrival_s: float) -> int:
        """Give the next stage the rows of a step, the first stage the tokens; the stage."""
        following = (index + 1) % len(self._stages)
        if following == 0:
            if step < len(self._ends):
                self._ends[step] = arrival_s
            step += self._in_flight
        lane = step % self._lanes
        if self._begun[following, lane] * self._lanes + lane == step and len(self._stages) > 1:
            self._stages[following].feed(lane, arrival_s)
        else:
            self._fed[following][step] = arrival_s
        return following

    def _scale_of(self, index: int) -> Callable[[int, Phase], float] | None:
        scale = self._scale
        if scale is None:
            return None
        return lambda lane, phase: scale(index, int(self._begun[index, lane]) * self._lanes + lane, phase)
