"""Finding what things cost from how long mixtures of them took."""

import numpy as np

from moempi.arrays import Float64Array


def fit_costs(amounts: Float64Array, seconds: Float64Array) -> Float64Array:
    """The cost of each of C kinds, none below 0, by the least squares of relative errors.

    `amounts` (N, C) of each kind took `seconds` (N,). A kind that would cost less than nothing costs nothing.
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
