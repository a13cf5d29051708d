"""Which rank a hang report names."""

from collections import Counter

from moempi.runtime.hang import Position, above, explain, seconds_to_hang


def position(passed, *, group=0, since_s=9.0, where="layer 3 dispatch, lane 0"):
    return Position(group, passed, where, "attention.py:12", since_s)


def test_a_rank_that_does_not_reply_is_a_hang_at_once():
    positions = {0: position(7, since_s=3.0), 2: position(7, since_s=0.0)}
    assert seconds_to_hang(positions, 3, timeout_s=2.0) <= 0
    assert explain(positions, ["n1"] * 3) == "rank 1 does not answer, rank 0 waits at layer 3 dispatch, lane 0"


def test_many_silent_ranks_are_counted():
    expected = "ranks 0, 1, 2, 3 and 4 more do not answer, rank 5 waits"
    assert explain({5: position(1)}, ["n1"] * 9).startswith(expected)


def test_the_hosts_of_silent_and_late_ranks_are_named_where_there_are_several():
    hosts = ["n1", "n1", "n2", "n2", "n3"]
    silent = explain({0: position(7), 1: position(7), 4: position(7)}, hosts)
    assert silent.startswith("ranks 2, 3 on n2 do not answer, rank 0 waits at")
    late = explain({rank: position(5 if rank == 4 else 7) for rank in range(5)}, hosts)
    assert late.startswith("rank 4 on n3 is late")


def test_one_rank_that_makes_progress_is_no_hang():
    positions = {0: position(7, since_s=3.0), 1: position(7, since_s=1.0)}
    assert seconds_to_hang(positions, 2, timeout_s=2.0) == 1.0  # until the last point of rank 1 is 2 s ago
    assert seconds_to_hang(positions, 2, timeout_s=0.5) <= 0


def test_start_and_end_may_take_longer_than_a_step():
    positions = {0: position(7, group=None), 1: position(7, group=None)}
    assert seconds_to_hang(positions, 2, timeout_s=2.0) == 11.0
    assert seconds_to_hang(positions, 2, timeout_s=0.5) <= 0


def test_the_late_rank_is_the_last_of_its_group():
    positions = {0: position(7), 1: position(5, where="layer 2 counts, lane 1"), 2: position(3, group=1)}
    assert explain(positions, ["n1"] * 3) == (
        "rank 1 is late, at layer 2 counts, lane 1 (in attention.py:12), rank 0 waits at layer 3 dispatch, lane 0"
    )


def test_nobody_is_late():
    assert explain({0: position(7), 1: position(7)}, ["n1"] * 2) == "all ranks wait, rank 0 at layer 3 dispatch, lane 0"


def test_every_rank_is_below_rank_0_and_directly_above_two_ranks_at_most():
    chains = {rank: above(rank) for rank in range(3904)}
    assert all(chain[-1] == 0 and len(chain) <= 11 for rank, chain in chains.items() if rank)
    asked = Counter(chain[0] for rank, chain in chains.items() if rank)
    assert max(asked.values()) == 2
