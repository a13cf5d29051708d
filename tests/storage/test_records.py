import errno
import os
import resource
import threading
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.errors import StorageError
from moempi.storage import journal
from moempi.storage.journal import JournalReader, JournalWriter, journal_path, journal_paths, journals_folder
from moempi.storage.records import RankRecord, RequestRecord

TEXTS = ["", "plain", "emoji \U0001f9ee", "nul \0 inside", "../../x", "line\nbreak\r\n", '"quoted"']


def make_request(index, *, num_prompt=3, num_tokens=2, top=0, score_top=None, **fields):
    """A record in which every number encodes its request, field and position."""

    def ids(rows, width, base):
        return (np.arange(rows * width, dtype=np.int32) + 1000 * index + base).reshape(rows, width)

    arrays = {
        "prompt": ids(num_prompt, 1, 0).ravel(),
        "tokens": ids(num_tokens, 1, 100).ravel(),
        "logprobs": -ids(num_tokens, 1, 200).ravel().astype(np.float32) / 8,
    }
    if top:
        arrays["top_tokens"] = ids(num_tokens, top, 300)
        arrays["top_logprobs"] = -ids(num_tokens, top, 400).astype(np.float32) / 8
    if score_top is not None:
        arrays["score"] = -ids(num_prompt, 1, 500).ravel().astype(np.float32) / 8
        arrays["score"][:1] = np.nan
    if score_top:
        arrays["score_top_tokens"] = ids(num_prompt, score_top, 600)
        arrays["score_top_logprobs"] = -ids(num_prompt, score_top, 700).astype(np.float32) / 8
    texts = {"id": f"request-{index}", "finish": "length", "text": TEXTS[index % len(TEXTS)]}
    return RequestRecord(index=index, **{**texts, **arrays, **fields})


def make_rank(rank, **fields):
    defaults = {
        "host": f"node{rank}",
        "expert_load": np.arange(6, dtype=np.int64).reshape(2, 3) + 10 * rank,
        "seconds": {"compute": 1.0 + rank, "exchange": 0.5},
        "steps": 7,
        "tokens": 100 + rank,
    }
    return RankRecord(rank=rank, **{**defaults, **fields})


def assert_same(left, right):
    assert type(left) is type(right)
    for name in left.__struct_fields__:
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            assert one == other, name


def write_journal(path, written, fingerprint="run"):
    with JournalWriter(path, fingerprint=fingerprint) as writer:
        for record in written:
            writer.append(record)
    return path


def read_journal(path):
    with JournalReader(path) as reader:
        return [record for _, record in reader.records()], reader.dropped_bytes


def test_records_come_back_as_they_were(tmp_path):
    written = [make_request(i, top=i % 3, score_top=i if i % 2 else None) for i in range(8)]
    written.append(make_request(8, num_prompt=0, num_tokens=0, finish="error", error="why \0 not", reference="a"))
    written.append(make_rank(3))
    found, dropped = read_journal(write_journal(journal_path(tmp_path / "r.h5", 3), written))
    assert dropped == 0
    for one, other in zip(written, found, strict=True):
        assert_same(one, other)


def test_a_record_is_found_again_at_its_offset(tmp_path):
    path = write_journal(tmp_path / "p", [make_request(i) for i in range(5)])
    with JournalReader(path) as reader:
        offsets = [offset for offset, _ in reader.records()]
        for index in (4, 0, 2):
            assert reader.record_at(offsets[index]).index == index
        with pytest.raises(StorageError, match="changed"):
            reader.record_at(offsets[2] + 1)


def test_an_empty_journal_and_an_empty_request(tmp_path):
    assert read_journal(write_journal(tmp_path / "none", [])) == ([], 0)
    found, _ = read_journal(write_journal(tmp_path / "one", [RequestRecord(index=0, id="", finish="error")]))
    assert found[0].top_tokens.shape == (0, 0)
    assert found[0].score.dtype == np.float32


def test_a_journal_torn_at_any_byte_keeps_the_records_before(tmp_path):
    path = write_journal(tmp_path / "p", [make_request(i) for i in range(3)])
    whole = path.read_bytes()
    with JournalReader(path) as reader:
        start = [offset for offset, _ in reader.records()][-1]
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        found, dropped = read_journal(path)
        assert [record.index for record in found] == [0, 1]
        assert dropped == length - start
        write_journal(path, [make_request(9)])
        found, dropped = read_journal(path)
        assert [record.index for record in found] == [0, 1, 9]
        assert dropped == 0


def test_a_flipped_bit_at_any_byte_of_the_last_record_is_detected(tmp_path):
    path = write_journal(tmp_path / "p", [make_request(i) for i in range(3)])
    whole = path.read_bytes()
    with JournalReader(path) as reader:
        start = [offset for offset, _ in reader.records()][-1]
    for position in range(start, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        found, dropped = read_journal(path)
        assert [record.index for record in found] == [0, 1]
        assert dropped == len(whole) - start


@given(tail=st.binary(min_size=1, max_size=200))
def test_any_tail_is_dropped(tmp_path_factory, tail):
    path = write_journal(tmp_path_factory.mktemp("tail") / "p", [make_request(0)])
    with path.open("ab") as file:
        file.write(tail)
    found, dropped = read_journal(path)
    assert ([record.index for record in found], dropped) == ([0], len(tail))


def test_zeros_after_a_power_failure_are_dropped(tmp_path):
    path = write_journal(tmp_path / "p", [make_request(0)])
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert read_journal(path)[1] == 4096


def test_a_header_damaged_at_any_byte_is_refused(tmp_path):
    path = write_journal(tmp_path / "p", [make_request(0)])
    whole = path.read_bytes()
    with JournalReader(path) as reader:
        header_bytes = next(offset for offset, _ in reader.records())
    for position in range(header_bytes):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(StorageError):
            JournalReader(path)
        path.write_bytes(whole[:position])
        with pytest.raises(StorageError):
            JournalReader(path)


def test_the_journal_of_another_run_is_refused_and_kept(tmp_path):
    path = write_journal(tmp_path / "p", [make_request(0)], fingerprint="one")
    before = path.read_bytes()
    with pytest.raises(StorageError, match="another run"):
        JournalWriter(path, fingerprint="two")
    assert path.read_bytes() == before


def test_a_lone_surrogate_becomes_a_replacement_character(tmp_path):
    found, _ = read_journal(write_journal(tmp_path / "p", [make_request(0, text="a\ud800b", error="\udfff")]))
    assert (found[0].text, found[0].error) == ("a\ufffdb", "\ufffd")


def test_a_full_disk_leaves_complete_records(tmp_path):
    path = tmp_path / "p"
    writer = JournalWriter(path, fingerprint="run")
    writer.append(make_request(0))
    size = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
    try:
        with pytest.raises(StorageError, match=str(path)):
            writer.append(make_request(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == size
    writer.append(make_request(2))
    writer.close()
    found, dropped = read_journal(path)
    assert ([record.index for record in found], dropped) == ([0, 2], 0)


def test_an_interrupt_inside_a_record_leaves_complete_records(tmp_path, monkeypatch):
    writer = JournalWriter(tmp_path / "p", fingerprint="run")
    write = os.write

    def interrupted(file, octets):
        write(file, octets[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.append(make_request(0))
    monkeypatch.undo()
    writer.append(make_request(1))
    writer.close()
    assert [record.index for record in read_journal(tmp_path / "p")[0]] == [1]


def test_records_are_synced_at_most_once_a_second_and_at_close(tmp_path, monkeypatch):
    synced, now = [], [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal.os, "fdatasync", synced.append)
    writer = JournalWriter(tmp_path / "p", fingerprint="run")
    for index in range(40):
        now[0] += 0.1
        writer.append(make_request(index))
    assert len(synced) in (3, 4)
    writer.close()
    writer.close()
    assert len(synced) in (4, 5)


def test_appends_do_not_wait_for_the_disk_and_report_its_failure(tmp_path, monkeypatch):
    ended, now = threading.Event(), [100.0]

    def fail_late(_file):
        assert ended.wait(10)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal.os, "fdatasync", fail_late)
    writer = JournalWriter(tmp_path / "p", fingerprint="run")
    for index in range(40):
        now[0] += 0.1
        writer.append(make_request(index))
    ended.set()
    with pytest.raises(StorageError, match="Input/output error"):
        writer.close()
    writer.close()
    assert [record.index for record in read_journal(tmp_path / "p")[0]] == [*range(40)]


def test_a_journal_without_another_thread_syncs_itself(tmp_path, monkeypatch):
    synced, now = [], [100.0]

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal.os, "fdatasync", synced.append)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer = JournalWriter(tmp_path / "p", fingerprint="run")
    now[0] += 2
    writer.append(make_request(0))
    assert len(synced) == 1
    writer.close()
    assert len(synced) == 2


def test_an_append_reports_that_the_disk_failed_before(tmp_path, monkeypatch):
    now = [100.0]

    def fail(_file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal.os, "fdatasync", fail)
    writer = JournalWriter(tmp_path / "p", fingerprint="run")
    now[0] += 2
    writer.append(make_request(0))
    for thread in threading.enumerate():
        if thread.name == "journal sync":
            thread.join()
    writer.append(make_request(1))  # within a second
    now[0] += 2
    with pytest.raises(StorageError, match="Input/output error"):
        writer.append(make_request(2))
    with pytest.raises(StorageError, match="Input/output error"):
        writer.close()


def test_a_file_that_is_not_a_journal_is_refused(tmp_path):
    (tmp_path / "p").write_bytes(b"something else entirely")
    with pytest.raises(StorageError, match="not a part"):
        JournalWriter(tmp_path / "p", fingerprint="run")
    with pytest.raises(StorageError, match="cannot be read"):
        JournalReader(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        JournalWriter(tmp_path / "file" / "p", fingerprint="run")


def test_an_intact_record_of_another_schema_is_passed_over_and_reported(tmp_path):
    path = write_journal(tmp_path / "p", [])
    payload = msgspec.msgpack.encode({"type": "request", "index": "x"})
    with path.open("ab") as file:
        file.write(journal._FRAME.pack(len(payload), journal.xxh3_64_intdigest(payload)) + payload)
    with JournalReader(path) as reader:
        assert list(reader.records()) == []
        assert [str(problem).split(": ")[0] for problem in reader.problems] == [
            f"{path} holds a record at byte 27 that cannot be used"
        ]
        with pytest.raises(StorageError, match="cannot be used"):
            reader.record_at(27)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": np.zeros(3, np.int64)},
        {"logprobs": np.zeros(3, np.float32)},
        {"logprobs": np.zeros(0, np.float32)},
        {"top_tokens": np.zeros((2, 2), np.int32)},
        {"top_tokens": np.zeros((3, 1), np.int32), "top_logprobs": np.zeros((3, 1), np.float32)},
        {"score": np.zeros(2, np.float32)},
        {"prompt": np.zeros((3, 1), np.int32)},
    ],
)
def test_fields_that_disagree_are_refused(fields):
    with pytest.raises(ValueError, match="is "):
        make_request(0, **fields)


@pytest.mark.parametrize(
    "fields", [{"expert_load": np.zeros(3, np.int64)}, {"seconds": {"a/b": 1.0}}, {"seconds": {"host": 1.0}}]
)
def test_rank_records_that_cannot_be_stored_are_refused(fields):
    with pytest.raises(ValueError, match=r"expert_load|free identifier"):
        make_rank(0, **fields)


def test_journals_are_listed_in_rank_order_however_deep(tmp_path):
    """Earlier versions wrote all of them into one folder."""
    results = tmp_path / "r.h5"
    assert journal_paths(results) == []
    for rank in (12, 100000, 2, 1001):
        write_journal(journal_path(results, rank), [])
    write_journal(journals_folder(results) / "rank-00003.part", [])
    assert [path.name for path in journal_paths(results)] == [
        "rank-00002.part",
        "rank-00003.part",
        "rank-00012.part",
        "rank-01001.part",
        "rank-100000.part",
    ]


def test_no_folder_has_the_journals_of_more_than_a_thousand_ranks(tmp_path):
    folders = Counter(journal_path(tmp_path / "r.h5", rank).parent for rank in range(3904))
    assert sorted(folders.values()) == [904, 1000, 1000, 1000]
