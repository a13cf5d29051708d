"""Requests to end early."""

import os
import signal

import pytest

from moempi.runtime import stop
from moempi.runtime.stop import Stop


@pytest.fixture(autouse=True)
def _handler():
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_no_request():
    assert not Stop().requested
    assert not Stop(max_minutes=60).requested


def test_a_signal_is_a_request():
    stop_request = Stop(max_minutes=60)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop_request.requested
    assert stop_request.reason == "SIGUSR1"


def test_the_end_of_its_time_is_a_request(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    limited = Stop(max_minutes=2)
    now[0] += 119.9
    assert not limited.requested
    now[0] += 0.1
    assert limited.requested
    assert limited.reason == "--max-minutes 2"
