"""Forecasts of the mission's jobs: what fits, what a step computes, what limits a stage, share of the ideal."""

from itertools import pairwise
from pathlib import Path

import pytest
from msgspec import structs

from moempi.commands.plan import forecast_job
from moempi.config.job import read_job_file
from moempi.config.machine_file import read_machine
from moempi.errors import ConfigError
from moempi.layout.topology import virtual
from moempi.planning.step_cost import StepLoad
from moempi.planning.workload import decode, mixed, prefill
from planning.missions import PIPELINE

JOBS = Path(__file__).resolve().parent.parent.parent / "jobs"
MACHINE = read_machine(JOBS / "machines/mission-h100.toml")
MISSION = virtual(3904, 8)
FLOPS, MEMORY = 240e12, 1440e9


def forecasts(job, *overrides, context=2048, prompt=4096, machine=MACHINE, ranks=MISSION):
    """The forecasts of a job of the mission, by workload."""
    job = read_job_file(JOBS / job, overrides=overrides)
    return {one.workload.name: one for one in forecast_job(job, machine, ranks, context=context, prompt=prompt)}


def test_scoring_on_64_ranks_computes_the_logits_of_every_row_and_hides_all_travel():
    found = forecasts("mission-score.toml", ranks=virtual(64, 8))["score"]
    rows = 4096
    attention = 61 * (8 * 7168 * 128**2 + 4 * 128**2 * 2048) / 8
    dense, experts = 3 * 6 * 7168 * 18432 / 8, 58 * (8 * 6 * 7168 * 2048 + 2 * 7168 * 64) / 8
    head = 2 * 7168 * 129280 / 8
    assert found.stages[0].compute_s == pytest.approx(rows * (attention + dense + experts + head) / FLOPS, rel=1e-3)
    assert 61 * found.tokens_per_s(overlap=True) >= 8.4e6
    assert found.ideal_s / found.micro_batch_s(overlap=True) >= 0.99
    prompts = forecasts("mission-score.toml", "task=generate", ranks=virtual(64, 8))["prefill"]
    saved_s = found.stages[0].compute_s - prompts.stages[0].compute_s
    read_s = 2 * 7168 * 129280 / 8 / MEMORY  # for the last row of each prompt
    assert saved_s == pytest.approx(rows * head / FLOPS - read_s, rel=0.01)


@pytest.mark.parametrize(("tensor", "rounds"), [(1, 4), (8, 4)])
def test_the_head_is_read_again_for_all_rows_that_are_scored_at_a_time(tensor, rounds):
    rows = {1: 256, 8: 8 * 32}[tensor] * rounds  # 32 rows of a rank have 4 million logits
    overrides = (f"parallel.tensor={tensor}", f"run.batch_tokens={rows}")
    slow = structs.replace(MACHINE, memory_gb_s=1.0, memory_gb=1e6)
    scored, prompts = (
        forecasts("mission-score.toml", *overrides, *more, machine=slow, prompt=rows, ranks=virtual(64, 8))
        for more in (["topology.rank_memory=1000GB"], ["topology.rank_memory=1000GB", "task=generate"])
    )
    read_s = 2 * 7168 * 129280 / tensor / 1e9
    found_s = scored["score"].stages[0].compute_s - prompts["prefill"].stages[0].compute_s
    assert found_s == pytest.approx((rounds - 1) * read_s, rel=1e-3)


def test_prompts_reach_what_the_arithmetic_of_the_machine_allows():
    found = forecasts("mission-score.toml", *PIPELINE)["prefill"]
    rows = 4096
    attention = 8 * 7168 * 128**2 + 4 * 128**2 * 2048
    dense, experts = 6 * 7168 * 18432, 8 * 6 * 7168 * 2048 + 2 * 7168 * 64
    seconds = [rows * (attention + kind) / FLOPS for kind in (dense, experts)]
    assert found.stages[1].compute_s == pytest.approx(seconds[0])
    assert found.stages[30].compute_s == pytest.approx(seconds[1])
    assert found.micro_batch_s(overlap=True) == pytest.approx(seconds[0], rel=1e-3)  # dense layers are the slowest
    assert found.tokens_per_s(overlap=True) >= 8.0e6
    assert found.ideal_s / found.micro_batch_s(overlap=True) >= 0.95
    assert {stage.limit for stage in found.stages} == {"arithmetic"}


def test_decoding_in_the_mission_reaches_nine_tenths_of_its_ideal_and_480_000_tokens_per_second():
    found = forecasts("mission.toml")["decode"]
    sequences = 3372 / 84
    read = sequences * 2048 * 2 * 128**2 * 2 / 8 + (4 * 7168 * 128**2 / 8 + 3 * 7168 * 2048 + 7168 * 64) * 2
    assert found.stages[30].memory_s == pytest.approx(read / MEMORY, rel=1e-3)
    assert found.stages[30].compute_s == pytest.approx(read / MEMORY, rel=1e-3)
    assert found.tokens_per_s(overlap=True) >= 480_000
    assert found.ideal_s / found.micro_batch_s(overlap=True) >= 0.9
    assert found.sequences == 8 * 3372
    assert found.seconds(overlap=True) == pytest.approx(found.sequences / found.tokens_per_s(overlap=True))


def test_caches_that_exceed_the_memory_are_refused_with_bytes_and_what_fits():
    with pytest.raises(ConfigError, match=r"32,768 sequences of 2,048 tokens .* need 5\d\d\.\d\d GiB .* 3,\d\d\d fit"):
        forecasts("mission.toml", "run.max_sequences=32768")
    fitting = forecasts("mission.toml", "run.max_sequences=3373")["decode"]
    assert fitting.sequences == 8 * 3373
    with pytest.raises(ConfigError, match=r"3,373 fit"):
        forecasts("mission.toml", "run.max_sequences=3374")
    for in_flight in (76, 85, 105):  # the slots of a micro-batch are no whole number
        odd = forecasts("mission.toml", "run.max_sequences=3373", f"run.micro_batches={in_flight}")["decode"]
        assert odd.sequences == 8 * 3373
    with pytest.raises(ConfigError, match=r"3,372 sequences of 4,096 tokens"):
        forecasts("mission.toml", context=4096)


def test_a_stated_cache_beside_weights_and_rows_must_fit_too():
    with pytest.raises(ConfigError, match=r"which has 59\.60 GiB"):
        forecasts("mission.toml", "run.kv_memory=64GB", "run.max_sequences=3800")


def test_the_memory_of_the_machine_counts_if_the_job_states_none():
    with pytest.raises(ConfigError, match=r"which has 59\.60 GiB"):
        forecasts("mission.toml", "topology.rank_memory=auto", "run.max_sequences=32768")


def test_prefill_has_the_batches_that_the_slots_allow():
    few = forecasts("mission-score.toml", *PIPELINE, "run.batch_tokens=8192", "run.lanes=1")["prefill"]
    assert few.tokens == 64 * 4096  # one slot of a micro-batch has one text of 4,096 tokens
    assert few.sequences == 64 * 130
    short = forecasts(
        "mission-score.toml", *PIPELINE, "run.batch_tokens=8192", "run.lanes=1", "run.max_sequences=260", prompt=2048
    )["prefill"]
    assert short.tokens == 64 * 2 * 2048
    enough = forecasts("mission-score.toml", *PIPELINE, "run.max_sequences=1040", prompt=512, context=512)["prefill"]
    assert (enough.tokens, enough.sequences) == (64 * 4096, 64 * 1040)


def test_a_step_of_a_workload():
    assert prefill(1000).load(4, 2000) == StepLoad(2000, 2.0, 500)
    assert prefill(1000).load(1, 2000) == StepLoad(1000, 1.0, 500)
    assert decode(2048).load(40, 256) == StepLoad(40, 40, 2048, cached=2048)
    assert decode(2048).load(40, 16).rows == 16
    load = mixed(1000, 500).load(40, 1000)
    assert load.rows == pytest.approx(120)  # a generated token costs two prompt tokens on the average
    assert load.sequences == pytest.approx(40 + 80 / 1000)
    assert load.context == pytest.approx((40 * 1250 + 80 * 500) / 120)
    assert load.cached == 1250


def test_a_stage_is_limited_by_the_largest_of_its_parts():
    decoding = forecasts("mission.toml", "run.micro_batches=122", "run.lanes=4")["decode"]
    assert decoding.stages[30].limit == "memory"
    queued = structs.replace(MACHINE, preempts_attention=False)
    assert forecasts("mission.toml", machine=queued)["decode"].stages[60].limit == "latency"
    slow_links = tuple(structs.replace(level, bandwidth_gb_s=15.0) for level in MACHINE.levels)
    slow_host = structs.replace(MACHINE, turn_us=1e6)
    for machine, limit in ((structs.replace(MACHINE, levels=slow_links), "link"), (slow_host, "host")):
        assert forecasts("mission-score.toml", *PIPELINE, machine=machine)["prefill"].stages[30].limit == limit


@pytest.mark.parametrize("micro_batches", [70, 80])
def test_more_lanes_lose_nothing_where_attention_gives_way(micro_batches):
    """Behind the attention of others, micro-batches in front wait for those behind them, and move in bunches."""

    def speeds(machine):
        return [
            forecasts("mission.toml", f"run.lanes={lanes}", f"run.micro_batches={micro_batches}", machine=machine)[
                "decode"
            ].tokens_per_s(overlap=True)
            for lanes in (2, 3, 4)
        ]

    preempted, queued = speeds(MACHINE), speeds(structs.replace(MACHINE, preempts_attention=False))
    for fewer, more in pairwise(preempted):
        assert more >= 0.98 * fewer
    assert min(preempted) > 1.05 * max(queued)
    assert queued[1] < 0.9 * queued[0]


def test_a_first_token_needs_the_steps_of_its_prompt():
    short, long = (forecasts("mission.toml", prompt=prompt)["prefill"] for prompt in (2048, 8192))
    assert short.first_token_s == pytest.approx(short.seconds(overlap=True))
    assert long.first_token_s == pytest.approx(4 * long.seconds(overlap=True))


@pytest.mark.parametrize("path", sorted((JOBS / "machines").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_machines_have_nearer_links_that_are_no_slower(path):
    machine = read_machine(path)
    for near, far in pairwise(machine.levels):
        assert near.latency_us <= far.latency_us
        assert near.bandwidth_gb_s >= far.bandwidth_gb_s
    assert machine.memory_gb > 0
