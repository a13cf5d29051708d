"""Which rank a hang report names."""

from moempi.runtime.hang import Position, explain, is_hang


def position(passed, *, group=0, since_s=9.0, where="layer 3 dispatch, lane 0"):
    return Position(group, passed, where, "attention.py:12", since_s)


def test_a_rank_that_does_not_reply_is_a_hang_at_once():
    positions = {0: position(7, since_s=3.0), 2: position(7, since_s=0.0)}
    assert is_hang(positions, 3, timeout_s=2.0)
    assert explain(positions, 3) == "rank 1 does not answer, rank 0 waits at layer 3 dispatch, lane 0"


def test_many_silent_ranks_are_counted():
    assert explain({5: position(1)}, 9).startswith("ranks 0, 1, 2, 3 and 4 more do not answer, rank 5 waits")


def test_one_rank_that_makes_progress_is_no_hang():
    positions = {0: position(7, since_s=3.0), 1: position(7, since_s=1.0)}
    assert not is_hang(positions, 2, timeout_s=2.0)
    assert is_hang(positions, 2, timeout_s=0.5)


def test_start_and_end_may_take_longer_than_a_step():
    positions = {0: position(7, group=None), 1: position(7, group=None)}
    assert not is_hang(positions, 2, timeout_s=2.0)
    assert is_hang(positions, 2, timeout_s=0.5)


def test_the_late_rank_is_the_last_of_its_group():
    positions = {0: position(7), 1: position(5, where="layer 2 counts, lane 1"), 2: position(3, group=1)}
    assert explain(positions, 3) == (
        "rank 1 is late, at layer 2 counts, lane 1 (in attention.py:12), rank 0 waits at layer 3 dispatch, lane 0"
    )


def test_nobody_is_late():
    assert explain({0: position(7), 1: position(7)}, 2) == "all ranks wait, rank 0 at layer 3 dispatch, lane 0"
