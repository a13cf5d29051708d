"""Charts as SVG text: points and lines, stacked bars, timelines. Colours are CSS classes of `html_page`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from math import ceil, floor, log10

from moempi.printing import printable, shortened

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 40, 48
PLOT_HEIGHT = 260
BAR_HEIGHT, BAR_GAP = 18, 8
LETTER = 7.2
"""Width of a letter of 13 px, on the average."""
MAX_LABEL_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) of one name; `labels` are texts beside them, and a line connects them if `is_line`."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    is_line: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis with the text of its unit, which begins at `begin`, or is logarithmic for positive values."""

    label: str
    begin: float = 0.0
    is_log: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a chart: its label, and adjacent parts (begin, end, kind), whose kinds are indices into the legend."""

    label: str
    parts: Sequence[tuple[float, float, int]]


def text_of(text: str) -> str:
    """A text from outside as text of HTML and SVG: printable, of limited length, and escaped."""
    return escape(printable(shortened(text, 400)))


def xy_chart(series: Sequence[Series], x: Axis, y: Axis, *, title: str) -> str:
    """Points of several series over common axes."""
    points = [point for one in series for point in one.points]
    across = _Scale(x, [point[0] for point in points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [point[1] for point in points], TOP + PLOT_HEIGHT, TOP)
    parts = [_legend([one.name for one in series]), *_grid(across, up)]
    for index, one in reversed([*enumerate(series)]):  # the first is drawn over the others
        places = [(across.place(a), up.place(b)) for a, b in one.points]
        if one.is_line and len(places) > 1:
            parts.append(
                f'<polyline class="line s{index}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
            )
        parts += [f'<circle class="f{index}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in places]
        parts += [_text(a, b - 9, label, "middle") for (a, b), label in zip(places, one.labels, strict=False)]
    return _svg(parts, TOP + PLOT_HEIGHT + BOTTOM, title)


def bar_chart(bars: Sequence[Bar], kinds: Sequence[str], x: Axis, *, title: str) -> str:
    """A row of adjacent parts for each bar, up to the greatest end, on a linear axis."""
    ends = [part[1] for bar in bars for part in bar.parts]
    left = 24 + LETTER * max(len(_label(bar.label)) for bar in bars)
    bottom = TOP + len(bars) * (BAR_HEIGHT + BAR_GAP)
    across = _Scale(x, ends, left, WIDTH - RIGHT, is_tight=True)
    parts = [_legend(kinds)]
    for at in across.ticks():
        place = across.place(at)
        parts += [
            f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>',
            _text(place, bottom + 18, number(at), "middle"),
        ]
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 38, x.label, "middle"))
    for index, bar in enumerate(bars):
        at = TOP + index * (BAR_HEIGHT + BAR_GAP) + BAR_GAP / 2
        parts.append(_text(left - 8, at + BAR_HEIGHT - 5, _label(bar.label), "end"))
        for begin, end, kind in bar.parts:
            first, last = across.place(begin), across.place(end)
            parts.append(
                f'<rect class="f{kind}" x="{first:.2f}" y="{at:.1f}" width="{max(last - first, 0):.2f}" '
                f'height="{BAR_HEIGHT}"/>'
            )
    return _svg(parts, bottom + BOTTOM, title)


def stacked(label: str, shares: Iterable[float]) -> Bar:
    """A bar of parts of these lengths, the kinds in their order."""
    bounds = [0.0, *accumulate(shares)]
    return Bar(label, [(begin, end, kind) for kind, (begin, end) in enumerate(pairwise(bounds))])


def number(value: float) -> str:
    """A number of an axis: three digits, and k, M or G for thousands, millions and more."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


class _Scale:
    """The place of a value on an axis between two places."""

    def __init__(
        self, axis: Axis, values: Sequence[float], first: float, last: float, *, is_tight: bool = False
    ) -> None:
        self.axis = axis
        least, most = (min(values), max(values)) if values else (axis.begin, axis.begin)
        self._is_log = axis.is_log and least > 0
        if self._is_log:
            self._low, self._high = least / 1.3, most * 1.3
        else:
            span = (most - axis.begin) * (1.0 if is_tight else 1.1) if most > axis.begin else 1.0
            self._low, self._high = axis.begin, axis.begin + span
        self._first, self._last = first, last

    def place(self, value: float) -> float:
        if self._is_log:
            share = log10(value / self._low) / log10(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return self._first + share * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Round values on the axis, at most a dozen."""
        if self._is_log:
            decades = range(floor(log10(self._low)), ceil(log10(self._high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
        else:
            rough = (self._high - self._low) / 6
            unit = 10.0 ** floor(log10(rough))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
            found = [step * index for index in range(floor(self._low / step), ceil(self._high / step) + 1)]
        return [at for at in found if self._low <= at <= self._high * (1 + 1e-9)]


def _grid(across: _Scale, up: _Scale) -> list[str]:
    """Lines, numbers and units of both axes."""
    bottom, right, parts = TOP + PLOT_HEIGHT, WIDTH - RIGHT, []
    for at in across.ticks():
        place = across.place(at)
        parts += [
            f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>',
            _text(place, bottom + 18, number(at), "middle"),
        ]
    for at in up.ticks():
        place = up.place(at)
        parts += [
            f'<path class="grid" d="M{LEFT} {place:.1f}H{right}"/>',
            _text(LEFT - 8, place + 4, number(at), "end"),
        ]
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(_text((LEFT + right) / 2, bottom + 38, across.axis.label, "middle"))
    turned = f'transform="rotate(-90 20 {middle})"'
    parts.append(_text(20, middle, up.axis.label, "middle", turned))
    return parts


def _legend(names: Sequence[str]) -> str:
    parts, at = [], float(LEFT)
    for index, name in enumerate(names):
        label = _label(name)
        parts.append(f'<rect class="f{index}" x="{at:.1f}" y="10" width="12" height="12"/>{_text(at + 18, 21, label)}')
        at += 36 + LETTER * len(label)
    return "".join(parts)


def _label(text: str) -> str:
    return shortened(printable(text), MAX_LABEL_LENGTH)


def _text(x: float, y: float, text: str, anchor: str = "start", attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {attributes}>{text_of(text)}</text>'


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{text_of(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
