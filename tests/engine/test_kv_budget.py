"""How many pages of key-value cache the requests can use, and how many fit into a rank's memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.jobs import make_job
from engine.requests import make_request
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.kv_budget import useful_pages
from moempi.errors import ConfigError
from moempi.layout.memory import Memory, affordable_pages

GIB = 1 << 30


def requests_of(*pages):
    """Requests that fill these numbers of pages to the last position."""
    return [make_request([5] * (count * PAGE_ROWS), 1) for count in pages]


# Useful pages


def test_no_requests_use_no_pages():
    assert useful_pages([], slots=4) == 0


@pytest.mark.parametrize(("length", "limit", "pages"), [(1, 1, 1), (PAGE_ROWS, 1, 1), (PAGE_ROWS, 2, 2), (60, 70, 3)])
def test_one_request_uses_the_pages_of_its_prompt_and_of_all_generated_tokens_but_the_last(length, limit, pages):
    assert useful_pages([make_request([5] * length, limit)], slots=4) == pages


def test_the_longest_requests_may_be_in_the_slots_at_once():
    requests = requests_of(1, 5, 2, 3)
    assert [useful_pages(requests, slots=slots) for slots in (0, 1, 2, 3, 4, 9)] == [0, 5, 8, 10, 11, 11]


def test_a_finished_request_uses_no_pages():
    requests = requests_of(7, 2)
    requests[0].fail("too long")
    assert useful_pages(requests, slots=4) == 2


@settings(deadline=None)
@given(pages=st.lists(st.integers(1, 4), max_size=6), slots=st.integers(1, 6), data=st.data())
def test_no_choice_of_running_requests_uses_more(pages, slots, data):
    running = data.draw(st.permutations(pages))[:slots]
    assert sum(running) <= useful_pages(requests_of(*pages), slots=slots)


# Affordable pages


@pytest.mark.parametrize(("available", "pages"), [(1625, 10), (1624, 9), (500, 1)])
def test_auto_gives_the_cache_four_fifths_of_the_memory_beside_weights_and_rows(available, pages):
    memory = Memory(weights=300, page=50, rows=75, groups=2)
    assert affordable_pages(make_job().run, memory, available=available) == pages


@pytest.mark.parametrize(("groups", "pages"), [(1, 10), (2, 5), (3, 3), (10, 1)])
def test_a_stated_size_is_divided_among_the_groups_whatever_is_available(groups, pages):
    memory = Memory(weights=10**9, page=100, rows=10**9, groups=groups)
    assert affordable_pages(make_job(run={"kv_memory": "1KB"}).run, memory, available=0) == pages


@pytest.mark.parametrize(
    ("kv_memory", "available"),
    [("auto", 3 * GIB + 4 * GIB), ("auto", GIB), ("4.99GiB", 100 * GIB)],
)
def test_memory_for_less_than_a_page_is_an_error_that_names_the_numbers(kv_memory, available):
    memory = Memory(weights=2 * GIB, page=5 * GIB // 2, rows=GIB // 2, groups=2)
    with pytest.raises(ConfigError) as error:
        affordable_pages(make_job(run={"kv_memory": kv_memory}).run, memory, available=available)
    assert str(error.value) == (
        f"no room for the cache: weights 2.00 GiB, rows 512.00 MiB, a page 5.00 GiB, "
        f"memory {available / GIB:.2f} GiB, run.kv_memory {kv_memory}; "
        "use more ranks or stages, or lower run.batch_tokens"
    )


def test_one_page_is_enough():
    memory = Memory(weights=0, page=1000, rows=0, groups=1)
    assert affordable_pages(make_job(run={"kv_memory": "1KB"}).run, memory, available=0) == 1
    with pytest.raises(ConfigError):
        affordable_pages(make_job(run={"kv_memory": "999B"}).run, memory, available=0)
