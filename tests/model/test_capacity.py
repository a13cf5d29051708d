"""Capacity: for any scores, no expert accepts more choices than its capacity, and every row gets top-k experts."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moempi.model.capacity import assign_within_quota, capacity, quotas

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def steps(draw):
    """Rows of each rank, top-k, number of experts, factor, and ranked experts from scores of any skew and with ties."""
    top_k, num_experts = draw(SIZES)
    rows = np.array(draw(st.lists(st.integers(0, 12), min_size=1, max_size=6)))
    factor = draw(st.sampled_from([1.0, 1.1, 1.25, 2.0, 30.0]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = random.integers(0, draw(st.sampled_from([1, 3, 1000])), (int(rows.sum()), num_experts))
    scores = scores + draw(st.sampled_from([0, 1, 1000])) * np.arange(num_experts)
    return rows, top_k, num_experts, factor, np.argsort(-scores, axis=1, kind="stable")


@settings(max_examples=400)
@given(steps())
def test_no_expert_exceeds_its_capacity_and_every_row_has_its_experts(step):
    rows, top_k, num_experts, factor, ranked = step
    firsts = np.cumsum(rows) - rows
    rules = {"top_k": top_k, "num_experts": num_experts, "factor": factor}
    all_quotas = [quotas(rows, rank, **rules) for rank in range(len(rows))]
    assert (np.sum(all_quotas, axis=0) <= ceil(Fraction(str(factor)) * int(rows.sum()) * top_k / num_experts)).all()
    load = np.zeros(num_experts, int)
    for rank, quota in enumerate(all_quotas):
        own = ranked[firsts[rank] : firsts[rank] + rows[rank]]
        chosen = assign_within_quota(own, quota, top_k)
        assert chosen.shape == (rows[rank], top_k)
        assert all(len(set(experts)) == top_k for experts in chosen.tolist())
        assert (np.bincount(chosen.reshape(-1), minlength=num_experts) <= quota).all()
        load += np.bincount(chosen.reshape(-1), minlength=num_experts)
    assert (load <= capacity(int(rows.sum()), **rules)).all()


def twin(ranked, quota, top_k):
    """Assign preference by preference, row by row; returns None if a row needs an expert of another row."""
    left, taken = quota.tolist(), [[] for _ in ranked]
    for preference in range(ranked.shape[1]):
        for row, expert in enumerate(ranked[:, preference].tolist()):
            if len(taken[row]) < top_k and left[expert]:
                left[expert] -= 1
                taken[row].append(expert)
    return taken if all(len(experts) == top_k for experts in taken) else None


@settings(max_examples=200)
@given(steps())
def test_rows_get_their_first_preferences_within_the_quota(step):
    rows, top_k, num_experts, factor, ranked = step
    quota = quotas(rows[:1], 0, top_k=top_k, num_experts=num_experts, factor=factor)
    own = ranked[: rows[0]]
    expected = twin(own, quota, top_k)
    if expected is not None:
        assert assign_within_quota(own, quota, top_k).tolist() == expected


def test_with_a_sufficient_quota_rows_get_the_router_s_choice():
    ranked = np.argsort(-np.random.default_rng(0).random((20, 8)), axis=1)
    assert (assign_within_quota(ranked, np.full(8, 20), 3) == ranked[:, :3]).all()


def test_a_row_without_enough_experts_gets_one_of_another_row():
    # Both rows prefer experts 0 and 1, with a quota of one each; expert 2 has two, but a row cannot take it twice.
    assert assign_within_quota(np.array([[0, 1, 2], [0, 1, 2]]), np.array([1, 1, 2]), 2).tolist() == [[0, 2], [1, 2]]
    with pytest.raises(ValueError, match="fewer places"):
        assign_within_quota(np.array([[0, 1]]), np.array([1, 0]), 2)
