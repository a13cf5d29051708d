"""Which hosts count as slow, and when they are named."""

import logging
from types import SimpleNamespace

import pytest

from moempi.runtime import slow_hosts as module
from moempi.runtime.slow_hosts import INTERVAL_S, INTERVALS, LOADS_PER_S, Load, LoadReport, SlowHosts, slow_hosts

HOSTS = ("n1", "n1", "n2", "n2", "n3", "n3")


def loads(*shares, groups=(0,) * 6):
    return {rank: Load(group, share) for rank, (group, share) in enumerate(zip(groups, shares, strict=True))}


def test_a_host_that_computes_while_others_wait_is_slow():
    assert slow_hosts(loads(0.2, 0.3, 0.9, 0.95, 0.25, 0.2), HOSTS).keys() == {"n2"}


def test_hosts_that_all_compute_are_not_slow():
    assert slow_hosts(loads(0.8, 0.9, 0.9, 0.95, 0.7, 0.9), HOSTS) == {}


def test_hosts_that_mostly_wait_are_not_slow():
    """For requests, or for the network."""
    assert slow_hosts(loads(0.1, 0.1, 0.4, 0.4, 0.1, 0.1), HOSTS) == {}


def test_hosts_of_other_groups_take_other_steps():
    groups = (0, 0, 1, 1, 1, 1)
    assert slow_hosts(loads(0.9, 0.9, 0.3, 0.3, 0.3, 0.3, groups=groups), HOSTS) == {}
    assert slow_hosts(loads(0.2, 0.2, 0.9, 0.9, 0.3, 0.3, groups=groups), HOSTS).keys() == {"n2"}


def test_a_host_is_named_once_after_several_intervals_in_a_row(caplog):
    caplog.set_level(logging.WARNING)
    slow, even = loads(0.2, 0.2, 0.9, 0.9, 0.2, 0.2), loads(*[0.5] * 6)
    hosts = SlowHosts(HOSTS)
    for interval in [slow] * (INTERVALS - 1) + [even] + [slow] * (INTERVALS - 1):
        hosts.add(interval)
    assert hosts.found == ()
    hosts.add({rank: load for rank, load in slow.items() if rank < 3})
    assert hosts.found == ()
    hosts.add({rank: load for rank, load in slow.items() if rank >= 3})
    hosts.add(slow)
    assert hosts.found == ("n2",)
    assert [record.getMessage() for record in caplog.records] == [
        "n2 is slow: its ranks compute 4.5 times as long as others'"
    ]


@pytest.mark.parametrize(("size", "interval_s"), [(8, INTERVAL_S), (3904, 3904 / LOADS_PER_S)])
def test_rank_0_receives_no_more_loads_in_a_second_from_more_ranks(monkeypatch, size, interval_s):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    report = LoadReport(lambda: clock.now / 4, 0, size=size)
    clock.now = interval_s - 0.5
    assert report.due() is None
    clock.now = interval_s
    assert report.due() == Load(0, 0.25)
    assert report.due() is None
