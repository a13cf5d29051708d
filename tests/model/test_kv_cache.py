"""The pages of the slots, beside a list of free pages."""

import numpy as np
import pytest

from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.values import Segment, Segments
from moempi.comm.batch import NONE, Batch
from moempi.config.architecture import AttentionShape
from moempi.config.tensors import PAGE_ROWS
from moempi.layout.memory import pages_for
from moempi.model.kv_cache import KVCache

PAGES, SLOTS = 40, range(5, 13)
SHAPE = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=2)


def take_slowly(free, count):
    """The first adjacent pages, else the lowest ones; they are no longer free."""
    runs = (free[first : first + count] for first in range(len(free) - count + 1))
    taken = next((run for run in runs if run[-1] - run[0] == count - 1), free[:count])
    free[:] = sorted(set(free) - set(taken))
    return taken


@pytest.mark.parametrize("seed", range(5))
def test_slots_hold_the_first_adjacent_pages_from_their_first_step_until_they_are_freed(seed):
    dice, free, held, capacities, starts = np.random.default_rng(seed), list(range(PAGES)), {}, {}, {}
    cache = KVCache(NumpyBackend(precision="float32"), SHAPE, layers=2, pages=PAGES)
    for _ in range(40):
        freed = [slot for slot in held if dice.random() < 0.3]
        for slot in freed:
            free = sorted([*free, *held.pop(slot)])
        slots = sorted(dice.choice(SLOTS, dice.integers(0, len(SLOTS)), replace=False).tolist())
        for slot in slots:
            if slot not in held:
                capacities[slot], starts[slot] = int(dice.integers(1, 5 * PAGE_ROWS)), 0
                held[slot] = take_slowly(free, pages_for(capacities[slot]))
            else:
                starts[slot] += 1
        numbers = (np.array([values[slot] for slot in slots], np.int64) for values in (starts, capacities))
        segments = cache.segments(batch_of(slots, *numbers, freed=freed))
        assert len(segments) == len(slots)
        for row, (segment, slot) in enumerate(zip(segments, slots, strict=True)):
            assert (segment.row, segment.length, segment.start) == (row, 1, starts[slot])
            assert segment.pages.tolist() == held[slot]
            for layer in cache.layers:
                rows = layer.keys.reshape(PAGES, -1)[segment.pages]
                assert (rows == (0 if segment.start == 0 else slot)).all()
                layer.keys.reshape(PAGES, -1)[segment.pages] = slot


def batch_of(slots, starts, capacities, *, freed):
    slots, lengths = np.array(slots, np.int64), np.ones(len(slots), np.int64)
    return Batch(
        tokens=NONE,
        requests=slots,
        slots=slots,
        starts=starts,
        lengths=lengths,
        capacities=capacities,
        logit_rows=NONE,
        freed=np.array(freed, np.int64),
        prompts=capacities,
    )


def test_segments_in_arrays_are_the_same_segments():
    listed = [
        Segment(0, 1, 70, np.array([4, 9])),
        Segment(1, 66, 10, np.array([3, 5])),
        Segment(67, 3, 0, np.array([7])),
    ]
    segments = Segments.of(listed)
    assert Segments.of(segments) is segments
    for one, other in zip(segments, listed, strict=True):
        assert one[:3] == other[:3]
        assert one.pages.tolist() == other.pages.tolist()
    assert [segment.row for segment in segments[1:]] == [1, 67]
    assert (segments.pages.tolist(), segments.first_pages.tolist()) == ([4, 9, 3, 5, 7], [0, 2, 4])
    assert len(Segments.of([])) == 0
