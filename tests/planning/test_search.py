"""The search for a layout against trying everything, on small machines; and what it finds for the mission."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from operator import le
from pathlib import Path

import pytest
from msgspec import structs

from moempi.commands.plan import forecast_job
from moempi.config.architecture import read_architecture_file
from moempi.config.job import read_job_file
from moempi.config.machine_file import read_machine
from moempi.errors import ConfigError
from moempi.layout.layout import make_layout
from moempi.layout.topology import virtual
from moempi.planning.candidates import (
    SearchRequest,
    Shape,
    all_shapes,
    apportioned,
    candidates,
    conventional_shapes,
    least_memory,
)
from moempi.planning.forecast import forecast, forecast_step
from moempi.planning.search import FRONT_STEP, Search, first_token_s, next_token_s
from moempi.planning.workload import decode, mixed, prefill, score

JOBS = Path(__file__).resolve().parent.parent.parent / "jobs"
MACHINE = read_machine(JOBS / "machines/mission-h100.toml")
EP64 = read_architecture_file(JOBS / "arch/ep64.toml")
SMALL = structs.replace(EP64, num_layers=3, experts=structs.replace(EP64.experts, num=16))
LINKS = tuple(structs.replace(level, latency_us=40.0, bandwidth_gb_s=0.1) for level in MACHINE.levels)
SLOW = structs.replace(MACHINE, tflops=0.05, memory_gb_s=1.0, memory_gb=0.012, levels=LINKS)
WORKLOADS = [decode(64), prefill(128), mixed(128, 32)]


def request(workload, *, ranks=4, on_node=2, **machine):
    """A search for the small model on slow ranks with little memory; `machine` changes them."""
    job = read_job_file(JOBS / "mission.toml", overrides=["topology.rank_memory=auto", "parallel.experts_per_rank=0"])
    job = structs.replace(job, run=structs.replace(job.run, batch_tokens=16))
    return SearchRequest(job, SMALL, structs.replace(SLOW, **machine), virtual(ranks, on_node), workload)


def search_of(searched, **options):
    return Search(candidates(searched, all_shapes(searched)), searched.workload, **options)


def mission_search(shapes, workload, job="mission.toml"):
    """A search for the mission among these shapes."""
    architecture = read_architecture_file(JOBS / "arch/mission.toml")
    searched = SearchRequest(read_job_file(JOBS / job), architecture, MACHINE, virtual(3904, 8), workload)
    return Search(candidates(searched, shapes), workload)


@cache
def tried(workload):
    """Speed, seconds to the next token and to the first of every candidate, each laid out and forecast as a job."""
    return tuple(_forecasts(request(workload)))


def _forecasts(searched):
    for layout in candidates(searched, all_shapes(searched)):
        for index in range(len(layout.steps.slots)):
            job, of = layout.job(index), layout.planned
            planned = replace(of, job=job, layout=make_layout(job, of.architecture, of.topology.nodes, on_gpu=True))
            found = forecast(planned, searched.workload)
            yield layout.replicas * found.tokens_per_s(overlap=True), found.seconds(overlap=True), found.first_token_s


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.name)
def test_the_fastest_of_all_candidates_is_found_and_few_are_simulated(workload):
    searched = request(workload)
    search = search_of(searched, gain=0.0)
    fastest = search.fastest({}, exact=True)
    assert fastest.tokens_per_s == pytest.approx(max(speed for speed, _, _ in tried(workload)), rel=1e-9)
    assert 1 < search.num_simulated < search.num_candidates / 5


def test_a_search_that_is_stopped_gives_what_it_has_found():
    searched = request(decode(64))
    least = search_of(searched, stops=lambda: True)
    found = least.fastest({}, exact=True)
    assert least.num_simulated <= 2
    assert 0 < found.tokens_per_s <= search_of(searched).fastest({}).tokens_per_s


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.name)
def test_no_candidate_is_faster_than_its_bound(workload):
    for layout in candidates(searched := request(workload), all_shapes(searched)):
        for index in range(0, len(layout.steps.slots), 7):
            found = forecast_step(layout.planned, workload, layout.step(index))
            assert found.least_s == pytest.approx(layout.forecast.least_s[index])
            assert found.least_s <= found.micro_batch_s(overlap=True) * (1 + 1e-9)


def test_every_division_of_the_ranks_is_a_candidate():
    """Replicas, stages and tensor groups, with one hop and two: everything that a loop over all numbers can lay out."""
    searched = request(decode(64), ranks=8, on_node=4, memory_gb=1.0)
    layouts = [(one.shape, one.planned.job) for one in candidates(searched, all_shapes(searched))]
    found = {
        (*shape, job.exchange.hops)
        for shape, job in layouts
        if not (job.parallel.stage_layers or job.parallel.stage_ranks)
    }
    expected = set()
    for replicas, stages, tensor, hops in product(range(1, 9), range(1, 4), range(1, 9), (1, 2)):
        topology = virtual(8 // replicas, 4)
        parallel = structs.replace(searched.job.parallel, stages=stages, tensor=tensor)
        try:
            grid = make_layout(structs.replace(searched.job, parallel=parallel), SMALL, topology.nodes).grid
        except ConfigError:
            continue
        spans = any(topology.nodes[stage.ranks[0]] != topology.nodes[stage.ranks[-1]] for stage in grid.stages)
        if 8 % replicas == 0 and (hops == 1 or spans):
            expected.add((replicas, stages, tensor, hops))
    assert found == expected


def test_the_fastest_layout_of_each_shape_is_tried_with_a_head_that_its_last_stage_divides():
    searched = request(decode(64), ranks=8, on_node=4, memory_gb=1.0)
    found = {}
    for one in candidates(searched, all_shapes(searched)):
        grid, parallel = one.planned.layout.grid, one.planned.job.parallel
        if not (parallel.stage_layers or parallel.stage_ranks):
            found.setdefault(one.shape, []).append((parallel.head, grid.num_groups(len(grid.stages) - 1)))
    for tried_heads in found.values():
        heads, groups = zip(*tried_heads, strict=True)
        assert heads.count("stage") == (groups[0] > 1)
    assert {head for tried_heads in found.values() for head, _ in tried_heads} == {"tensor", "stage"}


def test_limits_are_kept_and_the_front_falls():
    workload = mixed(128, 32)
    search, everything = search_of(request(workload)), tried(workload)
    front = list(search.front({}))
    assert len(front) > 2
    for before, after in pairwise(front):
        assert after.latency_s <= (1 - FRONT_STEP) * before.latency_s
        assert after.tokens_per_s < before.tokens_per_s
    for share in (0.4, 0.6):
        limits = {next_token_s: share * front[0].latency_s, first_token_s: share * front[0].forecast.first_token_s}
        found = search.fastest(limits)
        possible = [speed for speed, *seconds in everything if all(map(le, seconds, limits.values()))]
        assert all(map(le, (found.latency_s, found.forecast.first_token_s), limits.values()))
        assert max(possible) * 0.9 <= found.tokens_per_s <= max(possible) * (1 + 1e-9)
    _, soonest = search.soonest(next_token_s)
    assert soonest <= min(seconds for _, seconds, _ in everything) * 1.01
    assert search.fastest({next_token_s: soonest * 0.9}) is None


def test_the_runner_up_has_another_shape():
    search = search_of(request(decode(64)))
    best = search.fastest({}, exact=True)
    runner_up = search.fastest({}, without=best.shape)
    assert runner_up.shape != best.shape
    assert runner_up.tokens_per_s <= best.tokens_per_s * 1.005


def test_nothing_fits_into_little_memory_and_something_into_what_is_said_to_be_needed():
    searched = request(decode(64), memory_gb=0.0005)
    assert search_of(searched).fastest({}) is None
    needed = least_memory(searched, all_shapes(searched))
    enough = request(decode(64), memory_gb=needed * 1.001e-9)
    assert search_of(enough).fastest({}) is not None
    little = request(decode(64), memory_gb=needed * 0.98e-9)
    assert search_of(little).fastest({}) is None


def test_apportioned_numbers_even_out_the_weights():
    assert apportioned(8, [1.0, 1.0, 2.0]) == [2, 2, 4]
    assert apportioned(5, [1.0, 1.0, 1.0, 1.1]) == [1, 1, 1, 2]
    assert apportioned(3, [9.0, 1.0, 1.0]) == [1, 1, 1]


def test_dear_stages_get_more_ranks_or_fewer_layers():
    layouts = list(
        candidates(searched := request(prefill(128), ranks=8, on_node=4, memory_gb=1.0), all_shapes(searched))
    )
    parallels = [layout.planned.job.parallel for layout in layouts]
    assert any(len(set(parallel.stage_ranks)) > 1 for parallel in parallels)
    assert any(parallel.stage_layers for parallel in parallels)


def test_conventional_layouts_are_what_their_names_say():
    searched = request(decode(64), ranks=64, on_node=8)
    shapes = conventional_shapes(searched)
    assert set(shapes) == {"TP8 x PP", "EP in a node", "EP16, no stages"}
    assert Shape(8, 1, 8) in shapes["TP8 x PP"]
    assert Shape(4, 2, 1) in shapes["EP in a node"]
    assert shapes["EP16, no stages"] == [Shape(4, 1, 1), Shape(4, 1, 2), Shape(4, 1, 4), Shape(4, 1, 8)]


def test_the_missions_layouts_are_reached():
    search = mission_search([Shape(1, 61, 8)], decode(2048))
    shipped = read_job_file(JOBS / "mission.toml")
    (_, of_shipped) = forecast_job(shipped, MACHINE, virtual(3904, 8), context=2048, prompt=4096)
    assert search.fastest({}, exact=True).tokens_per_s >= 0.99 * of_shipped.tokens_per_s(overlap=True)
    assert search.num_simulated < 100 < search.num_candidates / 10
    scoring = mission_search([Shape(61, 1, 8)], score(4096), "mission-score.toml").fastest({}, exact=True)
    assert scoring.tokens_per_s >= 8.4e6
