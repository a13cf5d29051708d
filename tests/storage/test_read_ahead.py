"""Reading ahead of a reader: in order, at most LEAD_BYTES ahead, and never an error."""

import os
import threading
import time

import pytest

from moempi.errors import DataError
from moempi.storage import read_ahead
from moempi.storage.read_ahead import ReadAhead

MB = 1 << 20
LIMIT_S = 60.0


@pytest.fixture
def advised(monkeypatch):
    """The (start, bytes) of what the operating system was asked to read."""
    pieces = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, start, length, _advice: pieces.append((start, length)))
    return pieces


def wait_until(holds):
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_pieces_follow_the_ranges_and_stay_close_to_the_reader(tmp_path, monkeypatch, advised):
    monkeypatch.setattr(read_ahead, "LEAD_BYTES", 8 * MB)
    (tmp_path / "f").touch()
    consumed = [0]
    with ReadAhead(tmp_path / "f", [range(MB, 6 * MB), range(100, 101), range(MB, 90 * MB)], lambda: consumed[0]):
        wait_until(lambda: len(advised) == 4)
        time.sleep(0.05)
        assert advised == [(MB, 4 * MB), (5 * MB, MB), (100, 1), (MB, 4 * MB)]
        consumed[0] = 3 * MB
        wait_until(lambda: len(advised) == 5)
        assert advised[-1] == (5 * MB, 4 * MB)
        consumed[0] = 80 * MB  # a reader that overtakes is not followed through what it has read
        wait_until(lambda: advised[-1][0] > 80 * MB)
    assert len(advised) < 12


def test_it_ends_with_its_reader(tmp_path, monkeypatch, advised):
    monkeypatch.setattr(read_ahead, "LEAD_BYTES", MB)
    (tmp_path / "f").touch()
    begin = time.monotonic()
    with ReadAhead(tmp_path / "f", [range(1 << 40)], lambda: 0):
        wait_until(lambda: advised)
    assert time.monotonic() - begin < LIMIT_S
    assert len(advised) == 1


def test_a_file_that_is_damaged_is_the_readers_to_report(tmp_path, monkeypatch, advised):
    def ranges():
        yield range(5)
        raise DataError("damaged")

    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    (tmp_path / "f").touch()
    with ReadAhead(tmp_path / "f", ranges(), lambda: 0) as reading:
        wait_until(lambda: not reading._thread.is_alive())
    assert (advised, seen) == ([(0, 5)], [])


def test_a_file_that_is_missing_is_the_readers_to_report(tmp_path, advised):
    with ReadAhead(tmp_path / "missing", [range(5)], lambda: 0):
        pass
    assert not advised


def test_nothing_is_read_ahead_where_no_thread_can_start(tmp_path, monkeypatch, advised):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    (tmp_path / "f").touch()
    with ReadAhead(tmp_path / "f", [range(5)], lambda: 0):
        pass
    assert not advised
