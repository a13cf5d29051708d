"""Requests to end early."""

import os
import signal

import pytest

from moempi.runtime import stop
from moempi.runtime.stop import REQUESTS, Stop


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in REQUESTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_no_request():
    assert not Stop().requested
    assert not Stop(max_minutes=60).requested


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_is_a_request(number, capfd):
    stop_request = Stop(max_minutes=60)
    stop_request.catch_signals()
    os.kill(os.getpid(), number)
    assert stop_request.requested
    assert stop_request.reason == REQUESTS[number]
    assert capfd.readouterr().err == "moempi: stopping at the next step; the same command continues\n"


def test_the_second_interrupt_ends_and_other_requests_may_repeat(capfd):
    stop_request = Stop()
    stop_request.catch_signals()
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop_request.reason == "SIGUSR1"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("\n") == 1


def test_after_the_steps_a_request_says_that_results_are_written(capfd):
    stop_request = Stop()
    stop_request.end_of_steps()
    assert stop_request.accept(signal.SIGINT)
    assert not stop_request.accept(signal.SIGINT)
    assert not stop_request.accept(signal.SIGTERM)
    assert capfd.readouterr().err == "moempi: writing the results\n"


def test_only_rank_0_says_so(capfd, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    assert Stop().accept(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_the_end_of_its_time_is_a_request(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    limited = Stop(max_minutes=2)
    now[0] += 119.9
    assert not limited.requested
    now[0] += 0.1
    assert limited.requested
    assert limited.reason == "--max-minutes 2"
