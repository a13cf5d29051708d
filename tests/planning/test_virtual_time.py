"""Runs in virtual time against a slow simulation of every rank, against the forecast, and against their arithmetic."""

import random
import tracemalloc
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs

from moempi.commands.plan import forecasts_of, planned_job
from moempi.config.job import read_job_file
from moempi.config.machine_file import read_machine
from moempi.errors import ConfigError
from moempi.layout.placement import Placement, linear
from moempi.layout.schedule import ROWS, TOKENS, LaneOrder, Point
from moempi.layout.topology import virtual
from moempi.planning.pipeline import step_ends_s
from moempi.planning.routing import DrawnRouting, RecordedRouting, inclusion_shares, routed_rows
from moempi.planning.simulate import Phase, Transmission
from moempi.planning.virtual_time import Conditions, run_in_virtual_time
from planning.missions import PIPELINE

JOBS = Path(__file__).resolve().parent.parent.parent / "jobs"
MACHINE = read_machine(JOBS / "machines/mission-h100.toml")


class SlowStage:
    """Every rank of a stage by itself: lists of times instead of arrays, and a search for the next event."""

    def __init__(self, phases_of, *, lanes, ranks):
        self.phases_of, self.lanes, self.ranks = phases_of, lanes, ranks
        self.order = LaneOrder(lanes, [phase.point for phase in phases_of(0)])
        self.hosts, self.links = [0.0] * ranks, [0.0] * ranks
        self.at, self.steps = [-1] * lanes, [lane - lanes for lane in range(lanes)]
        self.arrivals, self.moving, self.fed, self.giving_way = [0.0] * lanes, [], {}, []

    def send(self, starts, transmission):
        """When the last rank's part arrives everywhere."""
        arrivals = []
        for rank in range(self.ranks):
            link_s, latency_s = (self.of_rank(one, rank) for one in transmission)
            begin = starts[rank] if link_s == 0 else max(starts[rank], self.links[rank])
            if link_s:
                self.links[rank] = begin + link_s
            arrivals.append(begin + link_s + latency_s)
        return max(arrivals)

    def of_rank(self, seconds, rank):
        return np.broadcast_to(seconds, self.ranks)[rank]

    def move(self, until):
        """Send all that starts up to a time, and before a lane that may be resumed has its rows."""
        while self.moving and max(self.moving[0][0]) <= until:
            starts, lane, left = self.moving.pop(0)
            if not left:
                self.arrivals[lane] = max(starts)
            else:
                self.moving.append(([self.send(starts, left[0])] * self.ranks, lane, left[1:]))
                self.moving.sort(key=lambda one: max(one[0]))

    def end_s(self):
        """When all ranks will have computed what gives way of the first phase, if no lane is resumed before."""
        if not self.giving_way:
            return inf
        first = self.giving_way[0]
        return max(
            self.hosts[rank] + first.left[rank] if first.ended[rank] == inf else first.ended[rank]
            for rank in range(self.ranks)
        )

    def resume_s(self):
        candidates, end_s = self.order.candidates(), self.end_s()
        while self.moving and max(self.moving[0][0]) < min([end_s, *(self.arrivals[lane] for lane in candidates)]):
            self.move(max(self.moving[0][0]))
        return max(*self.hosts, min(self.arrivals[lane] for lane in candidates))

    def next_s(self):
        return min(self.resume_s(), self.end_s())

    def give_way(self, until):
        """Compute what gives way up to a time, each phase with its rest."""
        for rank in range(self.ranks):
            for one in self.giving_way:
                if one.ended[rank] < inf:
                    continue
                if self.hosts[rank] + one.left[rank] > until:
                    one.left[rank] -= max(until - self.hosts[rank], 0.0)
                    self.hosts[rank] = max(until, self.hosts[rank])
                    break
                self.hosts[rank] += one.left[rank]
                self.compute_rest(one, rank)

    def compute_rest(self, one, rank):
        compute_s, preemptible_s = (
            self.of_rank(seconds, rank) for seconds in (one.phase.compute_s, one.phase.preemptible_s)
        )
        one.ended[rank] = self.hosts[rank] + compute_s - preemptible_s
        self.hosts[rank] = one.ended[rank] + self.of_rank(one.phase.beside_s, rank)

    def advance(self):
        """Resume a lane, or end what gives way; if a lane begins a step, the one before and when what it sent arrives.

        None while there is none.
        """
        if self.end_s() <= self.resume_s():
            self.give_way(self.end_s())
            return self.wait(self.giving_way.pop(0))
        now = self.resume_s()
        self.move(now)
        lane = next(one for one in self.order.candidates() if self.arrivals[one] <= now)
        self.order.resume(lane)
        self.at[lane] = (self.at[lane] + 1) % len(self.phases_of(0))
        phase = self.phases_of(max(self.steps[lane], 0))[self.at[lane]]
        self.order.wait(lane, phase.point)
        if self.at[lane] == 0 and self.steps[lane] < 0:
            phase = Phase(phase.point, 0.0)
        self.give_way(self.arrivals[lane])
        self.hosts = [max(host, self.arrivals[lane]) for host in self.hosts]
        self.arrivals[lane] = inf
        left = [self.of_rank(phase.preemptible_s, rank) for rank in range(self.ranks)]
        one = SimpleNamespace(lane=lane, phase=phase, left=left, ended=[inf] * self.ranks)
        if max(left) > 0:
            self.giving_way.append(one)
            return None
        for rank in range(self.ranks):
            self.compute_rest(one, rank)
        return self.wait(one)

    def wait(self, one):
        """A lane has computed a phase."""
        lane, starts, phase = one.lane, one.ended, one.phase
        step, begins = self.steps[lane], self.at[lane] == 0
        if begins:
            self.steps[lane] += self.lanes
            self.arrivals[lane] = self.fed.pop(self.steps[lane], inf)
        else:
            self.moving.append((starts, lane, list(phase.transmissions)))
            self.moving.sort(key=lambda one: max(one[0]))
        sent_s = max(starts)
        if phase.sent:
            self.move(max(starts))
            sent_s = self.send(starts, phase.sent)
        return (step, sent_s) if begins and step >= 0 else None

    def feed(self, step, at_s):
        lane = step % self.lanes
        if self.steps[lane] == step and self.at[lane] == 0:
            self.arrivals[lane] = at_s
        else:
            self.fed[step] = at_s


def slow_ends(stages, *, lanes, in_flight, num_steps, ranks):
    stages = [SlowStage(phases_of, lanes=lanes, ranks=ranks) for phases_of in stages]
    for step in range(min(in_flight, num_steps)):
        stages[0].feed(step, 0.0)
    ends = [inf] * num_steps
    while max(ends) == inf:
        index = min(range(len(stages)), key=lambda one: stages[one].next_s())
        ended = stages[index].advance()
        if ended and index < len(stages) - 1:
            stages[index + 1].feed(*ended)
        elif ended:
            ends[ended[0]] = ended[1]
            if ended[0] + in_flight < num_steps:
                stages[0].feed(ended[0] + in_flight, ended[1])
    return ends


def random_stage(dice, ranks, *, first, preempts=False):
    """Phases with numbers of their own for each step and rank."""
    points = [TOKENS if first else ROWS, *(Point(0, str(number)) for number in range(dice.randrange(1, 4)))]
    chains = [dice.randrange(3) for _ in points]
    keys = [dice.randrange(2**31) for _ in points]

    def phases_of(step):
        phases = []
        for point, chain, key in zip(points, chains, keys, strict=True):
            random = np.random.default_rng((key, step))
            numbers = lambda: random.random(ranks) * random.integers(0, 2)  # noqa: B023, E731
            moved = [Transmission(numbers(), numbers() * 0.1) for _ in range(chain if point.layer == 0 else 0)]
            sent = Transmission(numbers(), random.random()) if point.layer < 0 else None
            compute_s = numbers()
            preemptible_s = compute_s * random.choice([0.0, 1.0, random.random(ranks)[0]]) * preempts
            phases.append(Phase(point, compute_s, moved, numbers() * 0.3, sent, preemptible_s))
        return phases

    return phases_of


@pytest.mark.parametrize("preempts", [False, True])
def test_times_are_those_of_a_simulation_of_every_rank(preempts):
    dice = random.Random(5)
    for _ in range(60):
        ranks, lanes, number = dice.randrange(1, 4), dice.randrange(1, 4), dice.randrange(2, 5)
        stages = [random_stage(dice, ranks, first=index == 0, preempts=preempts) for index in range(number)]
        given = {"lanes": lanes, "in_flight": dice.randrange(lanes, lanes * number + 3), "num_steps": 12}
        np.testing.assert_allclose(
            step_ends_s(stages, **given, drains=True), slow_ends(stages, **given, ranks=ranks), rtol=1e-12
        )


def mission(job="mission-score.toml", *overrides, context=2048, prompt=4096):
    """A job of the mission on 3,904 ranks, and its forecasts by workload."""
    overrides = (*PIPELINE, *overrides) if job == "mission-score.toml" else overrides
    planned = planned_job(read_job_file(JOBS / job, overrides=overrides), MACHINE, virtual(3904, 8))
    return planned, {one.workload.name: one for one in forecasts_of(planned, context=context, prompt=prompt)}


@pytest.mark.parametrize(("job", "workload"), [("mission-score.toml", "prefill"), ("mission.toml", "decode")])
def test_a_full_pipeline_of_one_lane_is_as_fast_as_its_forecast(job, workload):
    planned, found = mission(job, "run.lanes=1", "run.micro_batches=122")
    run = run_in_virtual_time(planned, found[workload], Conditions(), num_steps=400)
    assert run.full_tokens_per_s == pytest.approx(found[workload].tokens_per_s(overlap=True), rel=0.01)
    alone_s = sum(stage.path_s for stage in found[workload].stages)
    assert alone_s <= run.fill_s <= 1.06 * alone_s  # and the links to the next stages
    slowest_s = found[workload].micro_batch_s(overlap=True)
    assert run.ends_s[-1] == pytest.approx(run.fill_s + 399 * slowest_s, rel=0.02)


def test_a_slow_rank_slows_all_if_arithmetic_limits_it_and_a_slow_link_if_it_carries_less_than_it_hides():
    planned, found = mission()
    prefill = found["prefill"]
    slowest_s, stage_s = prefill.micro_batch_s(overlap=True), prefill.stages[31].compute_s
    run = run_in_virtual_time(planned, prefill, Conditions(slow_ranks={2000: 2.0}), num_steps=300)
    assert run.full_tokens_per_s == pytest.approx(prefill.tokens / (2 * stage_s), rel=0.02)
    link_s = prefill.stages[31].link_s
    fits, exceeds = 0.9 * slowest_s / link_s, 3 * slowest_s / link_s
    run = run_in_virtual_time(planned, prefill, Conditions(slow_links={2000: fits}), num_steps=300)
    assert run.full_tokens_per_s == pytest.approx(prefill.tokens_per_s(overlap=True), rel=0.1)
    run = run_in_virtual_time(planned, prefill, Conditions(slow_links={2000: exceeds}), num_steps=300)
    assert run.full_tokens_per_s == pytest.approx(prefill.tokens / (exceeds * link_s), rel=0.1)


@pytest.mark.parametrize("rank", [3904, 10**6])
def test_a_rank_that_the_job_lacks_cannot_be_slow(rank):
    planned, found = mission()
    for conditions in (Conditions(slow_ranks={rank: 2.0}), Conditions(slow_links={rank: 2.0})):
        with pytest.raises(ConfigError, match=f"rank {rank} cannot be slow: the job has 3,904 ranks"):
            run_in_virtual_time(planned, found["prefill"], conditions, num_steps=1)


class EvenRouting:
    """Every expert is chosen equally often."""

    def counts(self, layer, steps, tokens):
        return np.full((len(steps), 64), tokens * 8 / 64)


@pytest.mark.parametrize("overrides", [["exchange.hops=2"], ["exchange.hops=1"], ["exchange.immediate=true"]])
def test_even_counts_of_experts_take_the_time_of_even_routing(overrides):
    hops = [] if "exchange.hops=2" in overrides else ["exchange.hops=1"]
    planned, found = mission("mission-score.toml", *hops, *overrides)
    conditions = (Conditions(), Conditions(EvenRouting()))
    even, counted = (run_in_virtual_time(planned, found["prefill"], one, num_steps=130) for one in conditions)
    np.testing.assert_allclose(counted.ends_s, even.ends_s, rtol=1e-9)


def test_the_busiest_rank_of_a_layer_takes_its_rows_longer():
    """One expert has twice its rows, in the step's arithmetic alone: no link, and one lane."""
    planned, _ = mission("mission-score.toml", "run.lanes=1")
    free = tuple(structs.replace(level, latency_us=0.0, bandwidth_gb_s=1e9) for level in MACHINE.levels)
    fast = replace(planned, machine=structs.replace(MACHINE, levels=free))
    prefill = forecasts_of(fast, context=2048, prompt=4096)[0]

    class Busy(EvenRouting):
        def counts(self, layer, steps, tokens):
            counts = super().counts(layer, steps, tokens)
            counts[:, layer] *= 2
            return counts

    run = run_in_virtual_time(fast, prefill, Conditions(Busy()), num_steps=250)
    expert_s = 2 * prefill.tokens * 8 / 64 * 3 * 7168 * 2048 / 240e12
    step_s = prefill.stages[60].compute_s + expert_s  # the output head makes it the slowest
    assert run.full_tokens_per_s == pytest.approx(prefill.tokens / step_s, rel=0.005)


def drawn(preferences, top_k, tokens, seed=0):
    """The experts of each token, one by one without replacement: the smallest exponential times (T, K)."""
    times = np.random.default_rng(seed).exponential(size=(tokens, len(preferences))) / preferences
    return np.argsort(times, axis=1)[:, :top_k]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_shares_of_experts_are_those_of_drawn_tokens(exponent):
    preferences = np.arange(1.0, 65) ** -exponent
    counts = np.bincount(drawn(preferences, 8, 40_000).reshape(-1), minlength=64)
    shares = inclusion_shares(preferences, 8)
    assert shares.sum() == pytest.approx(8)
    np.testing.assert_allclose(shares, counts / 40_000, atol=0.02)
    assert inclusion_shares(preferences, 64) == pytest.approx(1.0)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_the_busiest_expert_of_a_step_is_as_busy_as_with_drawn_tokens(exponent):
    tokens, preferences = 432, np.arange(1.0, 65) ** -exponent
    busiest = [np.bincount(drawn(preferences, 8, tokens, seed).reshape(-1)).max() for seed in range(300)]
    counts = DrawnRouting(64, 8, exponent=exponent).counts(5, range(300), tokens)
    assert np.mean(counts.max(axis=1)) == pytest.approx(np.mean(busiest), rel=0.03)
    assert counts.sum(axis=1).mean() == pytest.approx(8 * tokens, rel=0.01)


def test_a_step_is_drawn_the_same_whichever_steps_are_drawn_with_it():
    routing = DrawnRouting(16, 2, exponent=1.0)
    np.testing.assert_array_equal(routing.counts(3, range(10), 50)[4:7], routing.counts(3, range(4, 7), 50))
    assert (routing.counts(3, range(5), 50) != routing.counts(4, range(5), 50)).any()


def test_recorded_tokens_follow_each_other_and_are_repeated():
    experts = drawn(np.ones(6), 2, 10)
    routing = RecordedRouting(lambda layer: experts, 6)
    windows = [np.bincount(experts[first : first + 3].reshape(-1), minlength=6) for first in (0, 3, 6)]
    np.testing.assert_array_equal(routing.counts(0, range(5), 3), [*windows, *windows[:2]])
    whole = np.bincount(experts.reshape(-1), minlength=6)
    np.testing.assert_allclose(routing.counts(0, range(2), 25), [2.5 * whole] * 2)


def test_recorded_tokens_are_kept_in_two_bytes_a_choice_whatever_their_steps_are():
    """Counts of all steps of one token would be 256 numbers for its 8 choices."""
    layers = [np.random.default_rng(layer).integers(0, 256, (20_000, 8)) for layer in range(4)]
    routing = RecordedRouting(layers.__getitem__, 256)
    tracemalloc.start()
    for layer, tokens in product(range(4), (1, 2, 3, 500)):
        counts = routing.counts(layer, range(10, 20), tokens)
        first = 10 * tokens
        np.testing.assert_array_equal(
            counts[0], np.bincount(layers[layer][first : first + tokens].reshape(-1), minlength=256)
        )
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * 20_000 * 8 * 2 + 500_000


def test_rows_of_ranks_are_those_of_their_experts_and_reach_those_of_their_node():
    experts, tokens, topology = drawn(np.arange(1.0, 17) ** -1.0, 4, 5000), 5000, virtual(8, 2)
    placement = linear(16, 8)
    counts = np.bincount(experts.reshape(-1), minlength=16)[None]
    found = routed_rows(counts.astype(float), tokens, placement, topology)
    for rank, hosted in enumerate(placement.hosted):
        assert found.rows[0, rank] == np.isin(experts, hosted).sum()
        assert found.experts[0, rank] == len(hosted)
        on_node = range(4 * (rank // 2), 4 * (rank // 2) + 4)
        even = np.isin(drawn(np.ones(16), 4, tokens), on_node).any(axis=1).sum()
        assert found.node_tokens[0, rank] == pytest.approx(np.isin(experts, on_node).any(axis=1).sum() / even, rel=0.08)


def test_replicas_share_the_rows_of_their_expert():
    placement = Placement(((0, 1), (1, 2), (1,)))
    found = routed_rows(np.array([[10.0, 30.0, 0.0]]), 40, placement, virtual(3, 1))
    assert found.rows.tolist() == [[20.0, 10.0, 10.0]]
    assert found.experts.tolist() == [[2.0, 1.0, 1.0]]
