"""Continuous batching: every row once, slots and pages never overdrawn."""

import random

import numpy as np
import pytest

from moempi.config.job import Sampling
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.request import Request
from moempi.engine.scheduler import Scheduler
from moempi.layout.memory import pages_for
from moempi.storage.prompts import Prompt


def sequence(index, length, limit):
    prompt = Prompt(index, f"q{index}", None, np.arange(length, dtype=np.int32), None, Sampling())
    return Request(prompt, np.arange(1000 * index, 1000 * index + length, dtype=np.int32), limit)


def run(requests, *, lanes, slots, batch_tokens, pages):
    """Take steps until all is done; each step is (lane, [(request, tokens)]); generation is a counter."""
    scheduler = Scheduler(
        requests, micro_batches=lanes, slots=range(3, 3 + slots), batch_tokens=batch_tokens, pages=pages
    )
    sequences, steps, held = scheduler.sequences, [], {}
    while any(scheduler.unfinished(lane) for lane in range(lanes)):
        for lane in range(lanes):
            work = scheduler.next_work(lane)
            for slot in scheduler.take_freed().tolist():
                held.pop(slot)
            items = [sequences.request(number) for number in work.numbers.tolist()]
            assert work.starts.tolist() == [item.computed for item in items]
            rows = np.split(sequences.tokens(work), np.cumsum(work.lengths)[:-1]) if items else []
            steps.append((lane, [(item, tokens.tolist()) for item, tokens in zip(items, rows, strict=True)]))
            assert [item.slot for item in items] == sorted(item.slot for item in items)
            sequences.advance(work)
            for number, item in zip(work.numbers.tolist(), items, strict=True):
                assert held.setdefault(item.slot, item) is item
                if not sequences.waiting(work.numbers[work.numbers == number])[0]:
                    item.tokens.append(-len(item.tokens) - 1)
                    sequences.last_tokens[number], sequences.known[number] = item.tokens[-1], len(item.all_tokens)
                    sequences.finished[number] = len(item.tokens) >= item.limit
            assert sum(len(tokens) for _, tokens in steps[-1][1]) <= batch_tokens
            assert sum(pages_for(item.capacity) for item in held.values()) <= pages
            assert len(held) <= slots
            scheduler.retire(lane)
        assert len(steps) < 10_000
    return steps


def test_every_token_is_computed_once_and_in_order():
    dice = random.Random(7)
    for _ in range(30):
        lengths = [dice.choice([1, 2, 30, 200]) for _ in range(dice.randrange(12))]
        sequences = [sequence(i, length, dice.choice([1, 2, 9])) for i, length in enumerate(lengths)]
        lanes, slots = dice.randrange(1, 4), dice.randrange(3, 7)
        steps = run(sequences, lanes=lanes, slots=slots, batch_tokens=dice.choice([1, 8, 64]), pages=5)
        for item in sequences:
            fed = [token for _, work in steps for other, tokens in work if other is item for token in tokens]
            assert fed == item.prompt_tokens.tolist() + [-n for n in range(1, item.limit)]
            assert len({lane for lane, work in steps if any(other is item for other, _ in work)}) == 1


def test_a_slot_is_refilled_at_once():
    steps = run([sequence(i, 1, 2) for i in range(4)], lanes=1, slots=2, batch_tokens=8, pages=9)
    assert [len(work) for _, work in steps] == [2, 2, 2, 2]


def test_long_prompts_leave_rows_to_those_that_generate():
    short, long = sequence(0, 1, 5), sequence(1, 3 * PAGE_ROWS, 1)
    steps = run([short, long], lanes=1, slots=2, batch_tokens=PAGE_ROWS, pages=9)
    assert [[len(tokens) for _, tokens in work] for _, work in steps[:3]] == [[1, 63]] * 3


def test_lanes_share_few_requests_evenly():
    steps = run([sequence(i, 2, 3) for i in range(6)], lanes=3, slots=16, batch_tokens=64, pages=16)
    assert [len(work) for _, work in steps[:3]] == [2, 2, 2]


@pytest.mark.parametrize(("slots", "pages"), [(6, 99), (99, 6)])
def test_lanes_share_few_slots_or_pages_evenly(slots, pages):
    steps = run([sequence(i, 2, 3) for i in range(24)], lanes=3, slots=slots, batch_tokens=64, pages=pages)
    assert [len(work) for _, work in steps] == [2] * len(steps)


def test_requests_are_taken_from_their_source_when_they_are_needed():
    requests, taken = [sequence(number, 3, 0) for number in range(40)], []

    def source(some):
        for request in some:
            taken.append(request)
            yield request

    scheduler = Scheduler([], micro_batches=1, slots=range(4), batch_tokens=64, pages=9)
    scheduler.submit(source(requests[:30]), count=30)
    scheduler.submit(source(requests[30:]), count=10)
    assert (scheduler.num_queued, scheduler.num_unfinished, len(taken)) == (40, 40, 0)
    assert scheduler.first(2) == requests[:2] == taken
    finished = []
    while scheduler.num_unfinished:
        work = scheduler.next_work(0)
        assert len(taken) <= len(finished) + 4
        scheduler.sequences.advance(work)
        scheduler.sequences.finished[work.numbers] = True
        finished += scheduler.retire(0)
    assert finished == requests
    scheduler.submit(source(requests), count=40)
    assert scheduler.first(50) == requests
    assert scheduler.num_queued == 40


def test_a_queue_that_could_not_fill_all_slots_is_short_if_more_requests_are_expected():
    requests = [sequence(number, 3, 0) for number in range(12)]
    scheduler = Scheduler(requests[:6], micro_batches=1, slots=range(4), batch_tokens=64, pages=99)
    assert not scheduler.is_short
    scheduler.expects_more = True
    assert not scheduler.is_short
    running = scheduler.next_work(0).numbers.tolist()
    assert (len(running), scheduler.num_queued, scheduler.is_short) == (4, 2, True)
    scheduler.submit(requests[6:], count=6)
    assert not scheduler.is_short
    assert scheduler.next_work(0).numbers.tolist() == running
