"""How many pages of key-value cache the requests can use, and how many fit into a rank's memory."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engine.jobs import make_job
from engine.requests import make_request
from engine.runs import SMALL, SPACES, STATEFUL
from moempi.commands.dry_run import dry_run
from moempi.config.architecture import DeltaRule
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.kv_budget import useful_pages
from moempi.errors import ConfigError
from moempi.layout.layout import make_layout
from moempi.layout.memory import Memory, affordable_pages, pages_for
from moempi.layout.row_buffers import GROWTH
from moempi.storage.initialize import initialize

GIB = 1 << 30


# Useful pages


def test_no_requests_use_no_pages():
    assert useful_pages({}, slots=4) == 0


@pytest.mark.parametrize(("length", "limit", "pages"), [(1, 1, 1), (PAGE_ROWS, 1, 1), (PAGE_ROWS, 2, 2), (60, 70, 3)])
def test_one_request_uses_the_pages_of_its_prompt_and_of_all_generated_tokens_but_the_last(length, limit, pages):
    assert pages_for(make_request([5] * length, limit).capacity) == pages


def test_the_longest_requests_may_be_in_the_slots_at_once():
    requests = Counter((1, 5, 2, 3))
    assert [useful_pages(requests, slots=slots) for slots in (0, 1, 2, 3, 4, 9)] == [0, 5, 8, 10, 11, 11]


@given(pages=st.lists(st.integers(1, 4), max_size=6), slots=st.integers(1, 6), data=st.data())
def test_no_choice_of_running_requests_uses_more(pages, slots, data):
    running = data.draw(st.permutations(pages))[:slots]
    assert sum(running) <= useful_pages(Counter(pages), slots=slots)


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


@pytest.mark.parametrize(("capture", "lowered"), [(False, "run.batch_tokens"), (True, "run.batch_tokens or run.lanes")])
def test_lanes_with_graphs_that_leave_no_memory_can_be_fewer(capture, lowered):
    memory = Memory(weights=0, page=1000, rows=GIB, groups=1)
    with pytest.raises(ConfigError, match=f", or lower {lowered}$"):
        affordable_pages(make_job(run={"capture": capture}).run, memory, available=GIB)


def test_one_page_is_enough():
    memory = Memory(weights=0, page=1000, rows=0, groups=1)
    assert affordable_pages(make_job(run={"kv_memory": "1KB"}).run, memory, available=0) == 1
    with pytest.raises(ConfigError):
        affordable_pages(make_job(run={"kv_memory": "999B"}).run, memory, available=0)


# States of sequences


@pytest.mark.parametrize(("available", "pages"), [(1625, 10), (1624, 9), (500, 1)])
def test_states_are_held_beside_weights_and_rows(available, pages):
    memory = Memory(weights=200, page=50, rows=75, groups=2, state=10, slots=10)
    assert affordable_pages(make_job().run, memory, available=available) == pages


def test_states_that_leave_no_memory_are_an_error_that_names_them():
    memory = Memory(weights=GIB, page=GIB, rows=0, groups=1, state=GIB // 4, slots=16)
    with pytest.raises(ConfigError) as error:
        affordable_pages(make_job().run, memory, available=6 * GIB)
    assert str(error.value) == (
        "no room for the cache: weights 1.00 GiB, rows 0 B, states of 16 sequences 4.00 GiB, a page 1.00 GiB, "
        "memory 6.00 GiB, run.kv_memory auto; use more ranks or stages, or lower run.batch_tokens or run.max_sequences"
    )


def test_a_stage_without_cached_layers_has_as_many_pages_as_any():
    memory = Memory(weights=0, page=0, rows=0, groups=1, state=10, slots=10)
    assert affordable_pages(make_job().run, memory, available=GIB) > 10**6
    with pytest.raises(ConfigError, match="states of 10 sequences 100 B"):
        affordable_pages(make_job().run, memory, available=99)


@pytest.mark.parametrize(
    ("stages", "tensor", "layers"), [(1, 1, [3]), (1, 2, [3]), (2, 1, [2, 1]), (4, 1, [1, 1, 0, 1])]
)
def test_the_memory_of_a_layout_counts_a_state_for_each_slot_and_pages_for_other_layers(stages, tensor, layers):
    job = make_job(
        parallel={"stages": stages, "tensor": tensor, "stage_layers": [4 // stages] * stages},
        run={"max_sequences": 6, "precision": "float32"},
    )
    layout = make_layout(job, STATEFUL, [0] * (2 * stages * tensor))
    values = STATEFUL.delta_rule.state_values // tensor
    assert [memory.state for memory in layout.memory] == [count * 4 * values for count in layers]
    assert {memory.slots for memory in layout.memory} == {6}
    page = PAGE_ROWS * STATEFUL.attention.cached_values // tensor * 4
    assert [memory.page for memory in layout.memory] == [(4 // stages - count) * page for count in layers]


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("nodes", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]])
def test_rows_of_a_transport_that_a_probe_chooses_are_those_of_the_larger(nodes, immediate):
    """Rows that are sent: 2 of each of K choices; received: 1.5. Messages: 4 buffers; shared: 2 slots, 2 buffers."""
    rows = {}
    for transport in ("auto", "shared", "pairwise", "alltoallv"):
        exchange = {"transport": transport, "immediate": immediate}
        layout = make_layout(make_job(exchange=exchange, parallel={"stages": 2}), SMALL, nodes)
        rows[transport] = [memory.rows for memory in layout.memory]
    assert rows["pairwise"] == rows["alltoallv"]
    assert rows["auto"] == list(map(max, rows["shared"], rows["pairwise"]))
    assert rows["auto"] != rows["pairwise"]


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 2)])
def test_the_memory_of_a_layout_counts_states_of_state_spaces_and_pages_of_attention_alone(tensor, stages):
    job = make_job(
        parallel={"stages": stages, "tensor": tensor, "stage_layers": [6 // stages] * stages},
        run={"max_sequences": 6, "precision": "float32"},
    )
    layout = make_layout(job, SPACES, [0] * (2 * stages * tensor))
    values = SPACES.state_space.state_values // tensor
    assert [memory.state for memory in layout.memory] == [count * 4 * values for count in ([2], [1, 1])[stages - 1]]
    page = PAGE_ROWS * SPACES.attention.cached_values // tensor * 4
    assert [memory.page for memory in layout.memory] == ([page], [page, 0])[stages - 1]


def test_a_tensor_group_divides_groups_of_state_spaces_or_is_refused():
    odd = structs.replace(SPACES, state_space=structs.replace(SPACES.state_space, num_groups=1))
    message = r"parallel.tensor = 2 does not divide the model's state_space.num_groups of 1"
    with pytest.raises(ConfigError, match=message):
        make_layout(make_job(parallel={"tensor": 2}), odd, [0, 0])


def test_a_tensor_group_divides_key_heads_or_is_refused():
    job = make_job(parallel={"tensor": 2})
    odd = structs.replace(
        STATEFUL, delta_rule=DeltaRule(num_key_heads=1, num_value_heads=4, key_dim=4, value_dim=6, taps=4)
    )
    with pytest.raises(
        ConfigError, match=r"parallel.tensor = 2 does not divide the model's delta_rule.num_key_heads of 1"
    ):
        make_layout(job, odd, [0, 0])


def test_a_tensor_group_has_at_most_as_many_ranks_as_the_vocabulary_tokens():
    job, nodes = make_job(parallel={"tensor": 2}), [0, 0]
    message = r"parallel.tensor = 2 is more ranks than there are tokens; use at most the model's vocab_size of 1$"
    with pytest.raises(ConfigError, match=message):
        make_layout(job, structs.replace(STATEFUL, vocab_size=1), nodes)
    assert make_layout(job, structs.replace(STATEFUL, vocab_size=2), nodes).memory


def test_a_stage_has_at_most_as_many_ranks_that_divide_a_head_as_the_vocabulary_tokens():
    job, nodes = make_job(parallel={"head": "stage", "stages": 2}), [0] * 6
    message = (
        r'parallel.head = "stage": the last stage has 3 ranks, the model\'s vocab_size is 2; use "tensor" or fewer'
    )
    with pytest.raises(ConfigError, match=message):
        make_layout(job, structs.replace(STATEFUL, vocab_size=2), nodes)
    assert make_layout(job, structs.replace(STATEFUL, vocab_size=3), nodes).memory


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_the_memory_of_the_last_stage_counts_its_part_of_the_head_and_the_rows_of_all_groups(tensor, tied):
    architecture, run = structs.replace(SMALL, tied_embeddings=tied), {"batch_tokens": 32, "max_sequences": 16}
    (first, last), (first_divided, last_divided) = (
        make_layout(make_job(run=run, parallel=parallel), architecture, [0] * 8).memory
        for parallel in ({"stages": 2, "tensor": tensor}, {"stages": 2, "tensor": tensor, "head": "stage"})
    )
    assert first_divided == first
    head_bytes = SMALL.vocab_size * SMALL.width * 2
    assert last.weights - last_divided.weights == head_bytes // tensor - head_bytes // 4
    logit_rows = 4 // tensor * 16 // 2  # of a lane; each of 2 lanes has one of 2 micro-batches
    buffers = 2 * 2 * GROWTH * logit_rows * (1 + 1 / 4 + 2 * (tensor > 1) / tensor) * SMALL.width * 2
    assert last_divided.rows - last.rows == pytest.approx(buffers, abs=2 * 32)


def test_the_dry_run_shows_the_state_of_a_sequence_and_what_does_not_fit(tmp_path):
    initialize(STATEFUL, tmp_path / "weights.h5", seed=1)
    run = {"max_sequences": 6, "precision": "float32"}
    table = dry_run(make_job(tmp_path, run=run), [0, 0])
    (row,) = table.stages
    state = 3 * 4 * STATEFUL.delta_rule.state_values
    assert row.memory["a sequence's state"] == state
    pages = 6 * pages_for(STATEFUL.max_positions) * PAGE_ROWS * STATEFUL.attention.cached_values * 4
    assert row.total == row.memory["weights"] + row.memory["rows"] + 6 * state + pages
    tight = make_job(tmp_path, run=run, topology={"rank_memory": f"{row.total - pages}B"})
    (refused,) = dry_run(tight, [0, 0]).refused
    assert "states of 6 sequences" in refused
