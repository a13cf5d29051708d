"""The sequences of a group in arrays, beside requests that take their tokens one at a time."""

import sys

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from engine.requests import EOS, abacus_tokenizer, make_request, make_sampled
from engine.runs import Run, requests_of
from moempi.backend.values import SAMPLING_REQUEST, SampledTokens, sampling_request
from moempi.engine.scheduler import Scheduler
from moempi.engine.sequences import BLOCK_TOKENS, OutputBlocks
from moempi.engine.tasks import Generate
from moempi.layout.schedule import AGREE
from mpirun import ROOT

TOP = 2
VOCABULARY = 40
RULES = [
    {},
    {"top_logprobs": 2},
    {"ignore_eos": True, "top_logprobs": 1},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 4},
    {"stop": ("5", "12")},
    {"stop_token_ids": (7, 8), "ignore_eos": True},
    {"min_tokens": 9, "stop": ("3",), "stop_token_ids": (9,), "temperature": 1.0},
    {"repetition_penalty": 1.3, "ignore_eos": True},
    {"frequency_penalty": 0.5, "logit_bias": {4: 1.5}},
]


def make_requests(dice):
    """Two requests of each rule, whose limits are around a block's end."""
    lengths, limits = dice.integers(1, 9, 2 * len(RULES)), dice.integers(1, 3 * BLOCK_TOKENS, 2 * len(RULES))
    return [
        make_request([3] * length, limit, index=index, name=f"q{index}", **RULES[index % len(RULES)])
        for index, (length, limit) in enumerate(zip(lengths.tolist(), limits.tolist(), strict=True))
    ]


def sampled_of(dice, count):
    """Tokens that end a text once in 40, each with its two likeliest; some log-probabilities are no numbers."""
    tokens = dice.integers(EOS, VOCABULARY, count)
    logprobs = np.where(dice.random(count) < 0.01, np.nan, -dice.random(count)).astype(np.float32)
    top_tokens = dice.integers(0, VOCABULARY, (count, TOP), np.int32)
    return SampledTokens(tokens, logprobs, top_tokens, dice.random((count, TOP), np.float32))


def slow_request(twin, end_tokens):
    """How the twin's next token is sampled."""
    position = len(twin.all_tokens)
    adjustment = twin.logit_adjustment(end_tokens)
    return sampling_request(
        twin.sampling,
        uniform=twin.uniform(position) if twin.sampling.temperature else 0.0,
        adjustment=adjustment if adjustment.changes_logits else None,
    )


def assert_same_request(request, expected):
    assert request.tolist()[:5] == expected[:5]
    adjustment, twin = request["adjustment"], expected[5]
    assert (adjustment is None) == (twin is None)
    if twin is not None:
        for name in ("seen", "generated", "banned"):
            np.testing.assert_array_equal(getattr(adjustment, name), getattr(twin, name))


def record_of(request):
    record = request.to_record(task="generate")
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in msgspec.structs.asdict(record).items()
        if not name.endswith("_s")
    }


@pytest.mark.parametrize("seed", range(6))
def test_requests_end_as_if_each_took_its_tokens_one_at_a_time(seed):
    dice, tokenizer = np.random.default_rng(seed), abacus_tokenizer()
    requests, twins = make_requests(np.random.default_rng(seed)), make_requests(np.random.default_rng(seed))
    task = Generate(tokenizer, top=TOP)
    scheduler = Scheduler(requests, micro_batches=2, slots=range(10, 17), batch_tokens=12, pages=99)
    sequences, steps = scheduler.sequences, 0
    while scheduler.num_unfinished:
        work = scheduler.next_work(steps % 2)
        rows, logit_requests = task.logit_requests(sequences, work)
        sampled = sampled_of(dice, len(rows))
        owners = [twins[sequences.request(number).prompt.index] for number in work.numbers[work.ends].tolist()]
        for row, twin in enumerate(owners):
            assert_same_request(logit_requests[row], slow_request(twin, tokenizer.eos_tokens))
            one, top = sampled.take(slice(row, row + 1)), twin.sampling.top_logprobs
            one = replace(one, top_tokens=one.top_tokens[:, :top], top_logprobs=one.top_logprobs[:, :top])
            twin.accept(one, tokenizer)
        for number, start, length in zip(*(values.tolist() for values in work[:3]), strict=True):
            twins[sequences.request(number).prompt.index].computed = start + length
        task.accept(sequences, work, sampled)
        for request in scheduler.retire(steps % 2):
            assert record_of(request) == record_of(twins[request.prompt.index])
            assert (request.first_token_at is None) == (not request.tokens)
        steps += 1
    assert {request.finish for request in requests} == {"stop", "length", "error"}
    assert list(map(record_of, requests)) == list(map(record_of, twins))


def test_the_time_of_the_first_token_is_kept():
    request, task = make_request([3], 9), Generate(abacus_tokenizer(), top=0)
    scheduler = Scheduler([request], micro_batches=1, slots=range(1), batch_tokens=9, pages=9)
    times = []
    for _ in range(2):
        task.accept(scheduler.sequences, scheduler.next_work(0), make_sampled([5]))
        times.append(request.first_token_at)
    assert times[0] is not None
    assert times[0] == times[1]


def test_a_block_gives_its_tokens_once_and_in_order():
    blocks = OutputBlocks(3, top=1)
    for token in range(BLOCK_TOKENS):
        full = blocks.append(np.array([0, 2]), make_sampled([token, 100 + token], top=1))
        assert full.tolist() == [token == BLOCK_TOKENS - 1] * 2
    taken = blocks.take(2, top=1)
    assert taken.tokens.tolist() == taken.top_tokens[:, 0].tolist() == list(range(100, 100 + BLOCK_TOKENS))
    assert blocks.take(0, top=0).tokens.tolist() == list(range(BLOCK_TOKENS))
    assert [len(blocks.take(number, top=0).tokens) for number in range(3)] == [0, 0, 0]


def test_entries_of_sampling_requests_are_joined_and_pickled_with_their_adjustments():
    entries = np.array(
        [sampling_request(make_request([3], 9, temperature=0.5).sampling, uniform=0.25)], SAMPLING_REQUEST
    )
    joined = np.concatenate([entries, entries[:0], entries])
    assert (joined.dtype, len(joined), joined["uniform"].tolist()) == (SAMPLING_REQUEST, 2, [0.25, 0.25])


HOST = ("engine", "model", "comm/batch.py", "backend/sampling.py")


def calls_of_ten_steps(folder, count):
    """Calls of functions, in Python or C, that the host makes in ten decode steps of `count` greedy sequences."""
    folder.mkdir()
    run = Run(folder, requests_of(*[4] * count, limit=BLOCK_TOKENS), run={"micro_batches": 1, "max_sequences": 8})
    files = tuple(str(ROOT / "app/moempi" / name) for name in HOST)
    steps, calls = run.points(), 0

    def on_call(frame, event, _):
        nonlocal calls
        calls += event in ("call", "c_call") and frame.f_code.co_filename.startswith(files)

    advance(steps, 3)
    sys.setprofile(on_call)
    try:
        advance(steps, 10)
    finally:
        sys.setprofile(None)
    list(steps)
    assert all(request.finish == "length" for request in run.requests)
    return calls


def advance(steps, count):
    """Take steps; each begins at AGREE."""
    for _ in range(count):
        next(point for point in steps if point == AGREE)


def test_the_host_calls_no_function_for_a_sequence_of_a_step(tmp_path):
    few, many = (calls_of_ten_steps(tmp_path / str(count), count) for count in (2, 8))
    assert 0 < many == few


def test_blocks_get_room_for_more_likeliest_tokens_and_keep_their_tokens():
    blocks = OutputBlocks(2, top=0)
    blocks.append(np.array([0, 1]), make_sampled([5, 6]))
    blocks.widen(2)
    blocks.widen(1)
    blocks.append(np.array([1]), make_sampled([7], top=2))
    first, second = blocks.take(0, top=0), blocks.take(1, top=2)
    assert (first.tokens.tolist(), first.top_tokens.shape) == ([5], (1, 0))
    assert (second.tokens.tolist(), second.top_tokens[1].tolist()) == (
        [6, 7],
        make_sampled([7], top=2).top_tokens[0].tolist(),
    )
