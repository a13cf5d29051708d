"""Fits of costs to measured times."""

import numpy as np

from moempi.fitting import fit_costs


def test_exact_costs_are_recovered_and_no_cost_is_negative():
    random = np.random.default_rng(1)
    counts, sizes = random.integers(0, 5, (30, 5)), random.integers(0, 1 << 20, (30, 5))
    amounts = np.concatenate([counts, sizes], axis=1).astype(float)
    costs = np.array([0.0, 1e-6, 2e-6, 3e-6, 5e-6, 1e-10, 2e-10, 3e-10, 5e-10, 1e-9])
    np.testing.assert_allclose(fit_costs(amounts, amounts @ costs), costs, rtol=1e-6, atol=1e-12)
    assert (fit_costs(amounts, amounts @ costs * random.uniform(0.5, 1.5, 30)) >= 0).all()


def test_a_kind_with_a_negative_fit_costs_zero():
    amounts = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    costs = fit_costs(amounts, np.array([1.0, 2.5, 4.0]))
    assert costs[1] == 0
    assert costs[0] > 1
