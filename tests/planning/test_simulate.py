"""The simulated schedule against interleaved lanes on a virtual clock."""

import random

import pytest

from moempi.engine.interleave import interleave
from moempi.layout.schedule import Point
from moempi.planning.simulate import MEASURED_STEPS, WARM_UP_STEPS, Phase, Transmission, overlapped_s, waiting_s

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


def test_a_step_takes_at_least_its_compute_and_link_time_and_at_most_their_sum():
    dice = random.Random(7)
    for _ in range(300):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
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
