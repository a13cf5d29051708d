"""Transfers advance by themselves: the order of their steps, where they run, and what the host's waits count as."""

import gc
import os
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

from moempi.comm import transfers as module
from moempi.comm.transfers import WAITS, Condition, PendingTransfers, Transfers, after_verbs, complete


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


class FakeRequest:
    """A request that is complete when the test says so, or at the test number `tests_left`, after `seconds`."""

    def __init__(self, *, clock=None, seconds=0.0, tests_left=None):
        self.done = False
        self.tests = 0
        self._clock = clock
        self._seconds = seconds
        self._tests_left = 2 if seconds else tests_left

    def Test(self):  # noqa: N802
        self.tests += 1
        assert self.tests < 1000, "polled for ever"
        if not self.done and self._tests_left is not None and self.tests >= self._tests_left:
            self.done = True
            if self._clock is not None:
                self._clock.now += self._seconds
        return self.done


class FakeEvent:
    def __init__(self):
        self.done = False

    def is_done(self):
        return self.done

    def synchronize(self):
        raise AssertionError("the host blocks for an event although requests may be waiting for its progress")


class FakeBackend:
    """Queues, and events if verbs return before they are done (`late`)."""

    def __init__(self, *, late=False):
        self.queue = 0
        self.events = []
        self._late = late

    @contextmanager
    def on_queue(self, number):
        before, self.queue = self.queue, number
        try:
            yield
        finally:
            self.queue = before

    def record_event(self):
        if not self._late:
            return None
        self.events.append((self.queue, FakeEvent()))
        return self.events[-1][1]


def make_transfers(backend=None):
    pending = PendingTransfers()
    return Transfers(backend or FakeBackend(), pending), pending


def chain(requests, log, value=None):
    """Steps that wait for one request after another, and log which requests are complete."""
    for number, request in enumerate(requests):
        yield request
        log.append(number)
    return value


# Steps


def test_progress_runs_each_step_once_its_request_is_complete():
    transfers, pending = make_transfers()
    requests, log = [FakeRequest() for _ in range(4)], []
    transfer = transfers.start(chain(requests, log), waiting="idle")
    pending.progress()
    assert log == []
    requests[1].done = True  # a later request does not pass an earlier one
    pending.progress()
    assert (log, requests[1].tests) == ([], 0)
    requests[0].done = True
    pending.progress()
    assert log == [0, 1]  # as far as it goes
    requests[2].done = True
    pending.progress()
    assert (log, transfer.finished) == ([0, 1, 2], False)
    requests[3].done = True
    pending.progress()
    assert (log, transfer.finished) == ([0, 1, 2, 3], True)


def test_every_lane_s_transfers_advance_whichever_lane_calls_progress():
    pending = PendingTransfers()
    lanes = [Transfers(FakeBackend(), pending) for _ in range(2)]
    requests, logs = [FakeRequest(), FakeRequest()], ([], [])
    for lane, request, log in zip(lanes, requests, logs, strict=True):
        lane.start(chain([request], log), waiting="exchange")
    requests[0].done = requests[1].done = True
    pending.progress()
    assert logs == ([0], [0])


def test_steps_without_a_request_are_finished_at_the_start():
    transfers, _ = make_transfers()
    transfer = transfers.start(chain([], [], "value"), waiting="idle")
    assert transfer.finished
    assert transfer.finish() == "value"


def test_a_finished_transfer_is_forgotten():
    transfers, pending = make_transfers()
    request = FakeRequest()
    request.done = True
    transfer = transfers.start(chain([request], []), waiting="idle")
    pending.progress()
    alive = weakref.ref(transfer)
    del transfer
    pending.progress()
    gc.collect()
    assert alive() is None


def test_a_step_that_calls_progress_advances_the_other_transfers_and_not_itself():
    transfers, pending = make_transfers()
    own, next_own, other = FakeRequest(), FakeRequest(), FakeRequest()
    log = []

    def steps():
        yield own
        log.append("begin")
        next_own.done = other.done = True
        pending.progress()  # as a verb between its pieces does
        log.append("end")
        yield next_own

    transfer = transfers.start(steps(), waiting="exchange")
    transfers.start(chain([other], log), waiting="exchange")
    own.done = True
    pending.progress()
    assert log == ["begin", 0, "end"]
    assert transfer.finished


def test_a_transfer_waits_for_another_one():
    transfers, pending = make_transfers()
    request, second, log = FakeRequest(), FakeRequest(tests_left=3), []
    inner = transfers.start(chain([request], log, "plan"), waiting="idle")

    def steps():
        yield inner
        log.append(inner.finish())
        yield second
        return "rows"

    outer = transfers.start(steps(), waiting="exchange")
    pending.progress()
    assert log == []
    request.done = True
    pending.progress()
    assert log == [0, "plan"]
    assert not outer.finished
    assert outer.finish() == "rows"
    assert second.tests == 3


@pytest.mark.parametrize("first_waits", [False, True])
def test_a_request_that_another_transfer_must_finish_first_is_waited_for(first_waits):
    transfers, _ = make_transfers()
    request, log = FakeRequest(tests_left=4), []
    inner = transfers.start(chain([request], log, "plan"), waiting="idle")
    outer = transfers.start(complete(inner, "rows"), waiting="exchange")
    transfers_in_order = (outer, inner) if first_waits else (inner, outer)
    assert {transfer.finish() for transfer in transfers_in_order} == {"plan", "rows"}
    assert log == [0]


# Errors


def failing(requests):
    yield from requests
    raise OSError("the link is gone")


def test_an_error_of_a_step_reaches_the_start_finish_or_progress_that_runs_the_step():
    transfers, pending = make_transfers()
    with pytest.raises(OSError, match="the link is gone"):
        transfers.start(failing([]), waiting="exchange")
    transfer = transfers.start(failing([FakeRequest(tests_left=3)]), waiting="exchange")
    with pytest.raises(OSError, match="the link is gone"):
        transfer.finish()
    request = FakeRequest()
    transfers.start(failing([request]), waiting="exchange")
    request.done = True
    with pytest.raises(OSError, match="the link is gone"):
        pending.progress()


def test_an_error_met_by_progress_is_raised_again_by_finish():
    transfers, pending = make_transfers()
    request = FakeRequest()
    transfer = transfers.start(failing([request]), waiting="exchange")
    request.done = True
    with pytest.raises(OSError, match="the link is gone"):
        pending.progress()
    with pytest.raises(OSError, match="the link is gone"):
        transfer.finish()


def test_the_queue_is_the_caller_s_again_after_an_error():
    backend = FakeBackend()
    transfers, pending = make_transfers(backend)
    request = FakeRequest()
    with backend.on_queue(2):
        transfers.start(failing([request]), waiting="exchange")
    request.done = True
    with pytest.raises(OSError, match="the link is gone"):
        pending.progress()
    assert backend.queue == 0


# Waits


@pytest.mark.parametrize("waiting", WAITS)
def test_finish_returns_the_steps_value_and_counts_the_wait_by_its_cause(clock, waiting):
    transfers, _ = make_transfers()
    requests = [FakeRequest(clock=clock, seconds=2.0), FakeRequest(clock=clock, seconds=0.5)]
    transfer = transfers.start(chain(requests, [], "rows"), waiting=waiting)
    clock.now += 7.0  # computing
    assert transfer.finish() == "rows"
    assert transfers.waits == {**dict.fromkeys(WAITS, 0.0), waiting: 2.5}


def test_a_finished_transfer_holds_no_rows_and_is_no_longer_pending():
    transfers, pending = make_transfers()
    rows, request = np.zeros(3), FakeRequest()
    alive = weakref.ref(rows)
    transfer = transfers.start(chain([request], [], rows), waiting="exchange")
    del rows
    request.done = True
    pending.progress()
    assert alive() is not None
    assert len(transfer.finish()) == 3
    assert alive() is None
    pending.remove = lambda _: pytest.fail("it is pending")
    pending.progress()
    assert transfer.Test()


def test_no_wait_is_counted_for_a_transfer_that_arrived_meanwhile(clock):
    transfers, _ = make_transfers()
    request = FakeRequest(clock=clock, seconds=2.0)
    transfer = transfers.start(chain([request], []), waiting="exchange")
    request.done = True
    transfer.finish()
    assert (request.tests, sum(transfers.waits.values())) == (1, 0.0)


def test_waits_of_lanes_are_counted_apart(clock):
    pending = PendingTransfers()
    lanes = [Transfers(FakeBackend(), pending) for _ in range(2)]
    lanes[1].start(chain([FakeRequest(clock=clock, seconds=3.0)], []), waiting="pipeline").finish()
    assert [lane.waits["pipeline"] for lane in lanes] == [0.0, 3.0]


@pytest.mark.parametrize("late", [False, True])
def test_other_transfers_advance_while_the_host_waits(clock, late):
    transfers, _ = make_transfers(FakeBackend(late=late))
    other, log = FakeRequest(tests_left=2), []
    transfers.start(chain([other], log), waiting="exchange")
    request = FakeRequest(clock=clock, seconds=3.0)
    transfer = transfers.start(chain([FakeRequest(tests_left=4), request], [], "rows"), waiting="idle")
    assert transfer.finish() == "rows"
    assert log == [0]
    assert transfers.waits == {"idle": 3.0, "exchange": 0.0, "pipeline": 0.0}


def test_a_wait_for_any_returns_the_first_that_is_finished_and_counts_for_it(clock):
    pending = PendingTransfers()
    lanes = [Transfers(FakeBackend(), pending) for _ in range(2)]
    slow = lanes[0].start(chain([FakeRequest(tests_left=500)], []), waiting="exchange")
    fast = lanes[1].start(chain([FakeRequest(clock=clock, seconds=2.0)], []), waiting="pipeline")
    assert pending.wait_for_any({4: slow, 7: fast}) == 7
    assert [sum(lane.waits.values()) for lane in lanes] == [0.0, 2.0]
    assert not slow.finished


def test_a_wait_counts_by_the_cause_that_it_began_with(clock):
    transfers, _ = make_transfers()
    counts = transfers.start(chain([FakeRequest(clock=clock, seconds=2.0)], [], "counts"), waiting="idle")
    rows = FakeRequest(clock=clock, seconds=1.0)
    assert transfers.start(chain([counts, rows], [])).waiting == "idle"
    transfer = transfers.start(chain([rows], []))
    assert transfer.waiting == "exchange"


@pytest.mark.parametrize(
    ("waiting", "late", "naps"), [("exchange", False, False), ("pipeline", False, True), ("pipeline", True, True)]
)
def test_on_a_core_of_its_own_the_process_sleeps_only_while_it_waits_for_another_stage(
    monkeypatch, waiting, late, naps
):
    slept = []
    monkeypatch.setattr(module, "num_preemptions", lambda: 0)
    monkeypatch.setattr(module, "sleep", slept.append)
    monkeypatch.setattr(module, "SPIN_S", -1.0)
    transfers, _ = make_transfers(FakeBackend(late=late))
    transfers.start(chain([FakeRequest(tests_left=9)], []), waiting=waiting).finish()
    assert bool(slept) == naps
    assert all(seconds <= (module.EVENT_NAP_S if late else module.NAP_S) for seconds in slept)


def test_processes_that_wait_on_one_core_sleep(monkeypatch):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with subprocess.Popen([sys.executable, "-c", "import os\nwhile True: os.sched_yield()"]) as other:
            transfers, _ = make_transfers()
            end, used = time.monotonic() + 1.0, time.thread_time()
            transfers.start(chain([Condition(lambda: time.monotonic() > end)], []), waiting="exchange").finish()
            used = time.thread_time() - used
            other.kill()
    finally:
        os.sched_setaffinity(0, cores)
    assert used < 0.05


def test_a_lane_yields_its_point_and_then_has_the_value():
    transfers, _ = make_transfers()
    lane = transfers.start(chain([FakeRequest(tests_left=2)], [], "rows")).received("point")
    wait = next(lane)
    assert wait.point == "point"
    assert not wait.transfer.finished
    with pytest.raises(StopIteration) as end:
        next(lane)
    assert end.value.value == "rows"


# Events and queues


def test_a_request_after_verbs_starts_when_their_event_has_occurred():
    backend = FakeBackend(late=True)
    transfers, pending = make_transfers(backend)
    backend.events.clear()
    request, started = FakeRequest(), []

    def start():
        started.append(True)
        return request

    transfer = transfers.start(after_verbs(backend, start), waiting="exchange")
    assert len(backend.events) == 1
    pending.progress()
    assert started == []
    backend.events[0][1].done = True
    pending.progress()
    assert (started, transfer.finished) == ([True], False)
    request.done = True
    pending.progress()
    assert transfer.finish() is request
    assert started == [True]


def test_a_request_after_verbs_that_are_complete_starts_at_once():
    transfers, _ = make_transfers()
    request = FakeRequest(tests_left=2)
    transfer = transfers.start(after_verbs(FakeBackend(), lambda: request), waiting="exchange")
    assert not transfer.finished
    assert transfer.finish() is request


def test_steps_run_on_the_queue_of_their_start_and_leave_the_queue_as_it_was():
    backend, queues = FakeBackend(), []
    transfers, pending = make_transfers(backend)

    def steps(requests):
        queues.append(backend.queue)
        for request in requests:
            yield request
            queues.append(backend.queue)

    requests = [FakeRequest(), FakeRequest(tests_left=3)]
    with backend.on_queue(3):
        transfer = transfers.start(steps(requests), waiting="exchange")
    assert backend.queue == 0
    requests[0].done = True
    with backend.on_queue(1):
        pending.progress()
        assert backend.queue == 1
    transfer.finish()
    assert (queues, backend.queue) == ([3, 3, 3], 0)


# Buffers, counters


def test_buffers_live_until_their_request_is_complete_and_no_longer():
    transfers, pending = make_transfers()
    request, buffer = FakeRequest(), np.zeros(8)
    alive = weakref.ref(buffer)
    transfer = transfers.start(complete(request, "sent", buffer), waiting="pipeline")
    del buffer
    gc.collect()
    pending.progress()
    assert alive() is not None
    request.done = True
    pending.progress()
    gc.collect()
    assert alive() is None
    assert transfer.finish() == "sent"


def test_the_count_mismatch_is_the_rows_sent_less_the_rows_received():
    transfers, _ = make_transfers()
    assert transfers.count_mismatch == 0
    for sent, received in ((5, 3), (0, 4), (2, 2)):
        transfers.count_rows(sent=sent, received=received)
    assert transfers.count_mismatch == -2
