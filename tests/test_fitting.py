"""Fits of costs to measured times."""

import numpy as np
import pytest

from moempi.fitting import LAWS, Growth, fit_costs, fit_growth


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


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_what_a_cost_grows_with_is_found_through_noise_of_a_twentieth(law, share):
    ranks = [4, 8, 16, 32, 64, 128, 256]
    layers = [64 / (size // 4) for size in ranks]
    grown = {"const": 0.0, "log": 2.0, "linear": 0.2, "square": 0.002}[law]
    exact = Growth(law, 5.0, share, grown)
    noise = 1 + 0.05 * np.array([1, -1, 0.5, -0.5, 1, -1, 0.5])
    costs = [exact.at(size, held) for size, held in zip(ranks, layers, strict=True)]
    found = fit_growth(ranks, layers, costs)
    assert (found.law, found.at(3904, 1.0)) == (law, pytest.approx(exact.at(3904, 1.0), rel=1e-3))
    noisy = fit_growth(ranks, layers, costs * noise)
    assert noisy.law == law
    assert noisy.at(3904, 1.0) == pytest.approx(exact.at(3904, 1.0), rel=0.3)
