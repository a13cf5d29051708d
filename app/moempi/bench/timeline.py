"""When the lanes of a rank computed, and when their rows were on a link, by `time.perf_counter`."""

from collections.abc import Sequence
from time import perf_counter


class Timeline:
    """The intervals in which each lane computed, and in which its rows were on the link."""

    def __init__(self, num_lanes: int) -> None:
        self._num_lanes = num_lanes
        self.clear()

    def clear(self) -> None:
        """Remove all intervals; the timeline begins now."""
        self._begin = perf_counter()
        self._computing: list[list[tuple[float, float]]] = [[] for _ in range(self._num_lanes)]
        self._travelling: list[list[tuple[float, float]]] = [[] for _ in range(self._num_lanes)]

    def add_computing(self, lane: int, begin: float, end: float) -> None:
        """Add an interval in which a lane computed."""
        self._computing[lane].append((begin, end))

    def add_transfer(self, lane: int, start: float, arrival: float) -> None:
        """Add an interval in which rows of a lane were on the link."""
        self._travelling[lane].append((start, arrival))

    def lines(self, *, width: int) -> list[str]:
        """Two lines per lane, with a bar of `width` characters for compute and one for the link."""
        spans = [*self._computing, *self._travelling]
        end = max(last for lane in spans for _, last in lane)
        scale = width / (end - self._begin)

        def line(lane: Sequence[tuple[float, float]], symbol: str) -> str:
            marks = [" "] * width
            for first, last in lane:
                for column in range(round((first - self._begin) * scale), round((last - self._begin) * scale)):
                    marks[min(column, width - 1)] = symbol
            return "".join(marks)

        return [
            f"lane {lane} {what} {line(intervals[lane], mark)}"
            for lane in range(self._num_lanes)
            for what, intervals, mark in (("computes ", self._computing, "█"), ("on a link", self._travelling, "─"))
        ]

    def hidden(self) -> float:
        """The share of the time with rows on the link in which a lane computed; 0 without such time."""
        travelling, computing = (
            _joined([span for lane in lanes for span in lane]) for lanes in (self._travelling, self._computing)
        )
        both = sum(
            max(0.0, min(last, end) - max(first, begin)) for first, last in travelling for begin, end in computing
        )
        total = sum(last - first for first, last in travelling)
        return both / total if total else 0.0


def _joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals as disjoint intervals, ascending."""
    joined: list[tuple[float, float]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return joined
