"""Whom a rank watches: a few others, and whichever ranks of a host die, a survivor sees it."""

from itertools import combinations

import pytest

from moempi.runtime.watchdog import NUM_WATCHED, watched


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_survivor_watches_a_dead_rank_whichever_die(size):
    ranks = [3 * rank + 1 for rank in range(size)]
    assert all(len(watched(rank, ranks)) == min(NUM_WATCHED, size - 1) for rank in ranks)
    for count in range(1, size):
        for dead in combinations(ranks, count):
            assert any(not {*dead}.isdisjoint(watched(rank, ranks)) for rank in {*ranks} - {*dead})


def test_the_next_ranks_are_watched_and_after_the_last_the_first():
    assert watched(4, [0, 2, 4, 6, 8]) == [6, 8]
    assert watched(8, [0, 2, 6]) == [0, 2]
    assert watched(6, [0, 2, 8]) == [8, 0]
