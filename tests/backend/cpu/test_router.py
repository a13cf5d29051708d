"""The router's rules against slow, obvious twins that handle one token at a time."""

import math

import numpy as np
import pytest

from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.router import choose
from moempi.config.architecture import Router

EXPERTS = 12


def logits(tokens=40, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, EXPERTS)).astype(np.float32) * 2


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def best(values, count):
    """Indices of the greatest values, lowest index first on a tie."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def twin(row, router, correction):
    """One token's experts and weights, by the definition."""
    row = [float(value) for value in row]
    scores = {
        "softmax": lambda: softmax(row),
        "sigmoid": lambda: [1 / (1 + math.exp(-value)) for value in row],
        "softmax_chosen": lambda: row,
    }[router.scoring]()
    ranked = [score + float(more) for score, more in zip(scores, correction, strict=True)]
    size = EXPERTS // router.num_groups
    groups = [ranked[start : start + size] for start in range(0, EXPERTS, size)]
    count = 2 if router.group_score == "top2" else 1
    kept = best([sum(sorted(group)[-count:]) for group in groups], router.kept_groups)
    allowed = [ranked[index] if index // size in kept else -math.inf for index in range(EXPERTS)]
    experts = best(allowed, router.top_k)
    weights = [scores[expert] for expert in experts]
    if router.scoring == "softmax_chosen":
        weights = softmax(weights)
    if router.renormalize:
        weights = [weight / max(sum(weights), router.least_sum) for weight in weights]
    return experts, [weight * router.scaling for weight in weights]


@pytest.mark.parametrize(
    "router",
    [
        Router(top_k=3),
        Router(top_k=3, renormalize=True),
        Router(top_k=4, scaling=16.0, num_groups=4, kept_groups=2),
        Router(top_k=4, scoring="sigmoid", correction=True, renormalize=True, scaling=2.5),
        Router(top_k=5, scoring="sigmoid", correction=True, num_groups=3, kept_groups=2, group_score="top2"),
        Router(top_k=3, correction=True, renormalize=True, least_sum=0.9),
        Router(top_k=3, scoring="softmax_chosen"),
    ],
    ids=["softmax", "renormalized", "groups_max", "sigmoid", "groups_top2", "least_sum", "softmax_chosen"],
)
def test_experts_and_weights_equal_the_twin(router):
    rows = logits()
    correction = np.random.default_rng(1).normal(size=EXPERTS).astype(np.float32) * router.correction
    experts, weights = choose(rows, router, correction if router.correction else None)
    assert experts.dtype == np.int32
    assert weights.dtype == np.float32
    for token, row in enumerate(rows):
        expected = twin(row, router, correction)
        assert experts[token].tolist() == expected[0]
        np.testing.assert_allclose(weights[token], expected[1], rtol=2e-6)


def test_the_correction_changes_the_chosen_experts_but_no_weight():
    router = Router(top_k=2, scoring="sigmoid", correction=True)
    correction = np.zeros(EXPERTS, np.float32)
    correction[7] = 10
    experts, weights = choose(logits(), router, correction)
    assert (experts[:, 0] == 7).all()
    np.testing.assert_allclose(weights[:, 0], 1 / (1 + np.exp(-logits()[:, 7])), rtol=2e-6)


@pytest.mark.parametrize("jitter", [0.01, 0.2, 0.9])
def test_sparsemixer_equals_its_definition(jitter):
    rows = logits(seed=3)
    experts, weights = choose(rows, Router(top_k=2, scoring="sparsemixer", jitter=jitter), None)
    for token, row in enumerate(rows.astype(float)):
        left = list(range(EXPERTS))
        for slot in range(2):
            chosen = max(left, key=lambda expert: row[expert])
            near = [e for e in left if not (row[chosen] - row[e]) / max(abs(row[e]), row[chosen]) > 2 * jitter]
            weight = math.exp(row[chosen]) / sum(math.exp(row[expert]) for expert in near)
            assert experts[token, slot] == chosen
            np.testing.assert_allclose(weights[token, slot], weight, rtol=2e-6)
            left.remove(chosen)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_chosen", "sparsemixer"])
def test_no_tokens_give_no_choices(scoring):
    router = Router(top_k=2, scoring=scoring, num_groups=2)
    experts, weights = choose(logits(tokens=0), router, None)
    assert experts.shape == weights.shape == (0, 2)


def test_logits_and_weights_have_the_precision_of_the_rule():
    backend = NumpyBackend(precision="bfloat16")
    x, matrix = np.ones((1, 3), np.float32), np.float32([[1, 0], [2**-9, 0], [0, 2**-12]])
    rounded, exact = Router(top_k=1), Router(top_k=1, float32_logits=True, float32_weights=True)
    bias = np.float32([0, 1])
    for router, logit in [(rounded, 1.0), (exact, 1 + 2**-9)]:
        logits = backend.logits(x, matrix, np.float32([0, -5]))
        experts, weights = backend.choose_experts(logits, router)
        assert experts.tolist() == [[0]]
        expected = 1 / (1 + math.exp(-5 + 2**-12 - logit))
        assert abs(weights[0, 0] - expected) < (1e-6 if router is exact else 2**-8)
    experts, _ = backend.choose_experts(backend.logits(x, matrix, bias), exact)
    assert experts.tolist() == [[0]]
    experts, _ = backend.choose_experts(backend.logits(x, matrix, bias), rounded)
    assert experts.tolist() == [[0]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_chosen"])
def test_the_selection_bias_changes_the_chosen_experts_but_no_weight(scoring):
    backend = NumpyBackend(precision="float32")
    router = Router(top_k=2, scoring=scoring, renormalize=True, scaling=1.5)
    rows = np.random.default_rng(3).standard_normal((9, 6)).astype(np.float32)
    selection_bias = np.float32([0, 0, 0, 0, 9, -9])
    experts, weights = backend.choose_experts(rows, router, selection_bias=selection_bias)
    assert (experts[:, 0] == 4).all()
    assert not (experts == 5).any()
    np.testing.assert_array_equal(weights, backend.weigh_experts(rows, experts, router))
    plain, own = backend.choose_experts(rows, router)
    np.testing.assert_array_equal(own, backend.weigh_experts(rows, plain, router))
    corrected = backend.choose_experts(rows, router, correction=selection_bias)
    for one, other in zip(corrected, (experts, weights), strict=True):
        np.testing.assert_array_equal(one, other)
