"""The simulated schedule against interleaved lanes on a virtual clock, and against a host that goes tick by tick."""

import random

import pytest

from moempi.engine.interleave import interleave
from moempi.layout.schedule import LaneOrder, Point
from moempi.planning.simulate import (
    MEASURED_STEPS,
    WARM_UP_STEPS,
    Phase,
    Transmission,
    VirtualStage,
    equal_steps,
    overlapped_s,
    waiting_s,
)

STEPS = WARM_UP_STEPS + MEASURED_STEPS + 1


class VirtualTransfer:
    """A transfer on a virtual clock; all of them share a link."""

    def __init__(self, clock, transmissions):
        self.clock = clock
        self.at = clock.now
        self.left = list(transmissions)
        clock.moving.append(self)

    def Test(self):  # noqa: N802
        self.clock.advance()
        return not self.left and self.at <= self.clock.now


class VirtualClock:
    """The host's time, the transfers on their way, and the link; `wait_for_any` takes the place of the host's waits."""

    def __init__(self):
        self.now = self.link = 0.0
        self.moving = []

    def advance(self):
        """Move every transmission that starts by now."""
        while starting := [one for one in self.moving if one.left and one.at <= self.now]:
            self.move(min(starting, key=lambda one: (one.at, self.moving.index(one))))
        self.moving = [one for one in self.moving if one.left]

    def move(self, transfer):
        link_s, latency_s = transfer.left.pop(0)
        if link_s:
            transfer.at = self.link = max(transfer.at, self.link) + link_s
        transfer.at += latency_s
        if transfer.left:  # behind the others that start at the same time
            self.moving.remove(transfer)
            self.moving.append(transfer)

    def wait_for_any(self, transfers):
        while True:
            self.now = min(one.at for one in (*transfers.values(), *(one for one in self.moving if one.left)))
            for lane, transfer in transfers.items():
                if transfer.Test():
                    return lane


class VirtualWait:
    def __init__(self, point, transfer):
        self.point, self.transfer = point, transfer


def on_a_clock(phases, *, lanes):
    """Seconds for one step of each lane, from generators under `interleave`."""
    clock, begins = VirtualClock(), []

    def lane():
        for _ in range(STEPS):
            for phase in phases:
                clock.now += phase.compute_s
                clock.advance()
                transfer = VirtualTransfer(clock, phase.transmissions)
                clock.now += phase.beside_s
                if phase is phases[0]:
                    begins.append(clock.now)
                yield VirtualWait(phase.point, transfer)

    interleave([lane() for _ in range(lanes)], [phase.point for phase in phases], pending=clock)
    first, last = WARM_UP_STEPS * lanes, (WARM_UP_STEPS + MEASURED_STEPS) * lanes
    bounds = (sum(p.compute_s + p.beside_s for p in phases), sum(phase.link_s for phase in phases))
    return max((begins[last] - begins[first]) / MEASURED_STEPS, lanes * max(bounds))


def random_phases(dice):
    def seconds(share):
        return dice.choice([0.0, dice.random() * share])

    phases = [
        Phase(
            Point(0, str(number)),
            seconds(1),
            [Transmission(seconds(1), seconds(0.2)) for _ in range(dice.randrange(4))],
            beside_s=seconds(0.5),
        )
        for number in range(dice.randrange(1, 6))
    ]
    return phases if any(phase.compute_s for phase in phases) else random_phases(dice)


def test_simulated_times_equal_those_of_interleaved_lanes_on_a_clock():
    dice = random.Random(2)
    for _ in range(200):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
        assert overlapped_s(phases, lanes=lanes) == pytest.approx(on_a_clock(phases, lanes=lanes)), (phases, lanes)


@pytest.mark.parametrize("preempts", [False, True])
def test_a_step_takes_at_least_its_compute_and_link_time_and_at_most_their_sum(preempts):
    dice = random.Random(7)
    for _ in range(300):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
        if preempts:
            phases = [phase._replace(preemptible_s=dice.random() * phase.compute_s) for phase in phases]
        overlapped, waiting = overlapped_s(phases, lanes=lanes), waiting_s(phases, lanes=lanes)
        compute = lanes * sum(phase.compute_s + phase.beside_s for phase in phases)
        link = lanes * sum(phase.link_s for phase in phases)
        assert max(compute, link) <= overlapped * (1 + 1e-9)
        assert overlapped <= waiting * (1 + 1e-9)


@pytest.mark.parametrize(("compute", "link", "both"), [(1.0, 1.0, 2.0), (1.0, 0.5, 2.0), (0.5, 1.0, 2.0)])
def test_two_lanes_hide_the_shorter_of_compute_and_link_time(compute, link, both):
    phases = [Phase(Point(0, "dispatch"), compute, [Transmission(link)])]
    assert overlapped_s(phases, lanes=2) == pytest.approx(both)
    assert waiting_s(phases, lanes=2) == pytest.approx(2 * (compute + link))
    assert overlapped_s(phases, lanes=1) == pytest.approx(compute + link)


def test_a_chain_of_transmissions_needs_no_turn_of_its_lane():
    chain = [Transmission(0.2), Transmission(0.2), Transmission(0.2)]
    phases = [Phase(Point(0, "dispatch"), 1.0, chain)]
    assert overlapped_s(phases, lanes=2) == pytest.approx(2.0)


def test_a_lane_does_not_wait_for_what_it_sends_to_another_stage():
    phases = [Phase(Point(0, "dispatch"), 1.0, sent=Transmission(0.7, 5.0))]
    assert overlapped_s(phases, lanes=1) == pytest.approx(1.0)
    assert overlapped_s([Phase(Point(0, "dispatch"), 0.5, sent=Transmission(0.7))], lanes=1) == pytest.approx(0.7)


def test_computing_beside_a_transfer_hides_it_in_one_lane():
    phases = [Phase(Point(0, "dispatch"), 0.5, [Transmission(0.6)], beside_s=0.5)]
    assert overlapped_s(phases, lanes=1) == pytest.approx(1.1)


class TickingHost:
    """A host that looks at every tick what there is to compute, and a link; all seconds are whole ticks."""

    def __init__(self, phases, *, lanes):
        self.phases, self.order = phases, LaneOrder(lanes, [phase.point for phase in phases])
        self.now = self.busy_until = self.link = 0
        self.at, self.arrived = [-1] * lanes, dict.fromkeys(range(lanes), True)
        self.moving, self.giving_way, self.computed = [], [], []

    def move(self):
        while due := [one for one in self.moving if one[0] <= self.now]:
            transfer = min(due, key=lambda one: one[0])
            self.moving.remove(transfer)
            at, lane, left = transfer
            if left:
                link, latency = left[0]
                if link:
                    at = self.link = max(at, self.link) + link
                self.moving.append((at + latency, lane, left[1:]))
            else:
                self.arrived[lane] = True

    def compute_rest(self, lane, phase):
        ended = self.now + phase.compute_s - phase.preemptible_s
        self.busy_until = ended + phase.beside_s
        self.moving.append((ended, lane, list(phase.transmissions)))
        self.computed.append((lane, ended + phase.beside_s))

    def begin(self):
        """Begin what does not give way; whether there is anything."""
        if self.giving_way and self.giving_way[0][2] == 0:
            self.compute_rest(*self.giving_way.pop(0)[:2])
            return True
        for lane in self.order.candidates():
            if self.arrived[lane]:
                self.order.resume(lane)
                self.at[lane] = (self.at[lane] + 1) % len(self.phases)
                phase, self.arrived[lane] = self.phases[self.at[lane]], False
                self.order.wait(lane, phase.point)
                if phase.preemptible_s:
                    self.giving_way.append([lane, phase, phase.preemptible_s])
                else:
                    self.compute_rest(lane, phase)
                return True
        return False

    def tick(self):
        self.move()
        while self.busy_until <= self.now and self.begin():
            self.move()
        if self.busy_until <= self.now and self.giving_way:
            self.giving_way[0][2] -= 1
        self.now += 1


def test_what_is_preemptible_is_computed_while_no_lane_has_anything_else():
    dice = random.Random(3)
    for _ in range(60):
        phases, lanes = ticking_phases(dice), dice.randrange(1, 5)
        host, stage, computed = TickingHost(phases, lanes=lanes), VirtualStage(equal_steps(phases), lanes=lanes), []
        while len(host.computed) < 60:
            host.tick()
        while len(computed) < 60:
            resumed = stage.advance()
            if resumed is not None:
                assert sum(end - begin for begin, end in resumed.spans) == phase_s(phases, stage, resumed)
                computed.append((resumed.lane, resumed.end_s))
        assert computed == host.computed[:60], (phases, lanes)


def ticking_phases(dice):
    """Phases of up to a thousand ticks, so that few end at the same tick."""
    phases = []
    for number in range(dice.randrange(1, 5)):
        compute_s = dice.randrange(1, 1000)
        preemptible_s = dice.choice([0, compute_s, dice.randrange(compute_s)])
        moved = [Transmission(dice.randrange(1, 500), dice.randrange(100)) for _ in range(dice.randrange(3))]
        beside_s = dice.choice([0, dice.randrange(300)])
        phases.append(Phase(Point(0, str(number)), compute_s, moved, beside_s, preemptible_s=preemptible_s))
    return phases


def phase_s(phases, stage, resumed):
    phase = phases[stage._at[resumed.lane]]
    return phase.compute_s + phase.beside_s


def test_a_short_phase_is_computed_before_the_rest_of_a_long_one_and_delays_it():
    """The attention of lane 1 takes 10 from 11 on, interrupted from 13 to 16 by the experts of lane 0; 1 is routing."""
    phases = [
        Phase(Point(0, "dispatch"), 11.0, [Transmission(2.0)], preemptible_s=10.0),
        Phase(Point(0, "combine"), 3.0, [Transmission(1.0)]),
    ]
    stage, found = VirtualStage(equal_steps(phases), lanes=2), []
    while len(found) < 4:
        resumed = stage.advance()
        if resumed is not None:
            found.append((resumed.lane, resumed.spans))
    assert found == [
        (0, [(0.0, 11.0)]),
        (0, [(13.0, 16.0)]),
        (1, [(11.0, 13.0), (16.0, 25.0)]),
        (1, [(27.0, 30.0)]),
    ]


def test_more_lanes_take_no_longer_where_attention_gives_way():
    """A decode step whose attention is ten times as long as any other phase."""

    def phases(preemptible_s):
        travel = [Transmission(0.03, 0.05)]
        return [
            Phase(Point(0, "gather"), 0.0, travel),
            Phase(Point(0, "scatter"), 0.56, travel, preemptible_s=preemptible_s),
            Phase(Point(0, "dispatch"), 0.06, travel),
            Phase(Point(0, "combine"), 0.06, travel),
        ]

    times = {lanes: overlapped_s(phases(0.5), lanes=lanes) / lanes for lanes in (1, 2, 3, 4)}
    assert times[2] <= times[1]
    assert max(times[3], times[4]) <= 1.001 * times[2]
    assert times[4] == pytest.approx(0.68, rel=0.01)
    assert all(times[lanes] <= overlapped_s(phases(0.0), lanes=lanes) / lanes * 1.001 for lanes in times)
