"""Fitting of cost models to measured times."""

import numpy as np

from moempi.arrays import Float64Array


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
