"""Fitting of cost models to measured times."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moempi.arrays import Float64Array

EXACT = 1e-12
"""A mean square of relative errors that is as good as none."""


def fit_costs(amounts: Float64Array, seconds: Float64Array) -> Float64Array:
    """Non-negative costs c (C,) that minimize the sum over n of ((amounts @ c)[n] / seconds[n] - 1)^2.

    Measurement n took seconds[n] (N,) for amounts[n] (N, C). Kinds with a negative least-squares cost get 0 and are
    removed before the next fit.
    """
    costs = np.zeros(amounts.shape[1])
    used = list(range(amounts.shape[1]))
    while used:
        found, *_ = np.linalg.lstsq(amounts[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if (found >= 0).all():
            costs[used] = found
            break
        used = [column for column, cost in zip(used, found, strict=True) if cost > 0]
    return costs


class Growth(NamedTuple):
    """A cost of n ranks: `fixed`, plus `share` of what a rank has at n ranks, plus `grown` times one of LAWS of n."""

    law: str
    fixed: float
    share: float
    grown: float

    def at(self, ranks: float, held: float) -> float:
        """The cost at this number of ranks, of which each has `held`."""
        return self.fixed + self.share * held + self.grown * float(LAWS[self.law](np.float64(ranks)))


LAWS: Mapping[str, Callable[[Any], Any]] = {
    "const": lambda n: 0.0 * n,
    "log": np.log2,
    "linear": lambda n: 1.0 * n,
    "square": np.square,
}
"""What a cost may grow with, by the name of the law."""


def fit_growth(ranks: Sequence[int], held: Sequence[float], costs: Sequence[float]) -> Growth:
    """The law that the positive `costs` (N,) of numbers of `ranks` (N,) follow best, and its numbers, none negative.

    held[n] is what a rank has at ranks[n], such as layers. Relative errors are least squares. The law is the one with
    the least information criterion of Akaike, corrected for few measurements (Hurvich and Tsai 1989): each further
    number must be worth it.
    """
    measured, sizes = np.array(costs, np.float64), np.array(ranks, np.float64)
    found: dict[float, Growth] = {}
    for law, grows in LAWS.items():
        columns = np.stack([np.ones(len(sizes)), np.array(held, np.float64), grows(sizes)], axis=1)
        fitted = fit_costs(columns, measured)
        mean_square = float(np.square(columns @ fitted / measured - 1).mean())
        criterion = len(sizes) * np.log(mean_square + EXACT) + _price(int(np.count_nonzero(fitted)), len(sizes))
        found.setdefault(criterion, Growth(law, *fitted.tolist()))
    return found[min(found)]


def _price(numbers: int, measurements: int) -> float:
    """The term of the corrected criterion for the fitted numbers and the mean square of the errors."""
    left = measurements - numbers - 2
    return 2 * (numbers + 1) * (measurements / left if left > 0 else np.inf)
