"""Damaged journals: a reader keeps every undamaged record and accepts no damaged one; a writer destroys nothing."""

import shutil
from contextlib import suppress

import msgspec
import pytest

from hostile import at_once
from moempi.errors import StorageError
from moempi.storage import journal
from moempi.storage.journal import JournalReader, JournalWriter
from moempi.storage.records import TraceRecord, encode
from storage.test_records import make_rank, make_request, read_journal, write_journal

RECORDS = [*(make_request(i, top=i % 3, score_top=1 if i == 2 else None) for i in range(5)), make_rank(0)]
FRAME_BYTES = 16


def scan(path):
    """Offsets and payloads of the records, and the reader with what it found."""
    with JournalReader(path) as reader:
        return list(reader.payloads()), reader


def sentences(reader):
    return list(map(str, reader.problems))


def frame(payload):
    return journal._FRAME.pack(len(payload), journal.xxh3_64_intdigest(payload)) + payload


@pytest.fixture
def sound(tmp_path):
    path = write_journal(tmp_path / "p", RECORDS)
    return path, path.read_bytes(), scan(path)[0]


def flipped(whole, bit):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_flipped_bit_loses_its_record_alone_and_is_reported(sound):
    path, whole, records = sound
    offsets = [offset for offset, _ in records]
    assert len(whole) > 1800
    for bit in range(8 * offsets[0], 8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        hit = sum(offset <= bit // 8 for offset in offsets) - 1
        found, reader = scan(path)
        assert found == records[:hit] + records[hit + 1 :], bit
        if hit < len(records) - 1:
            assert (reader.damaged_at, reader.damages, reader.dropped_bytes) == (offsets[hit], 1, 0), bit
            assert sentences(reader) == [f"{path} is damaged at byte {offsets[hit]}, the records behind it are kept"]
        else:
            assert (reader.damages, reader.dropped_bytes) == (0, len(whole) - offsets[hit]), bit
            assert [sentence.startswith(f"{path} ends with") for sentence in sentences(reader)] == [True]


def test_every_flipped_bit_of_the_header_is_refused_with_a_remedy(sound):
    path, whole, records = sound
    for bit in range(8 * records[0][0]):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(StorageError, match="move it out of its folder") as error:
            JournalReader(path)
        assert str(path) in str(error.value)
        assert error.value.exit_code == 74


def test_a_tear_at_any_byte_is_no_damage(sound):
    path, whole, records = sound
    for length in range(records[0][0], len(whole)):
        path.write_bytes(whole[:length])
        found, reader = scan(path)
        assert found == [(offset, p) for offset, p in records if offset + FRAME_BYTES + len(p) <= length]
        assert reader.damages == 0


def test_a_writer_continues_a_damaged_journal_and_destroys_nothing(sound):
    path, whole, records = sound
    for hit, (offset, payload) in enumerate(records):
        for position in (offset, offset + 9, offset + FRAME_BYTES + len(payload) // 2):
            damaged = flipped(whole, 8 * position)
            path.write_bytes(damaged)
            write_journal(path, [make_request(9)])
            if (hit, position) != (len(records) - 1, offset) or whole[offset] & 1:  # a longer record is a tear
                assert path.read_bytes().startswith(damaged)
            found, reader = scan(path)
            assert found[:-1] == records[:hit] + records[hit + 1 :]
            assert found[-1][1] == encode(make_request(9))
            assert reader.dropped_bytes == 0


@pytest.mark.parametrize("tail", [bytes(4096), bytes(5), b"\xff" * 40])
def test_a_torn_end_is_overwritten(sound, tail):
    path, whole, _ = sound
    path.write_bytes(whole + tail)
    write_journal(path, [make_request(9)])
    assert path.read_bytes() == whole + frame(encode(make_request(9)))


def test_several_damaged_places_are_counted(sound):
    path, whole, records = sound
    damaged = whole
    for hit in (0, 2, 3):
        damaged = flipped(damaged, 8 * (records[hit][0] + 20))
    path.write_bytes(damaged)
    found, reader = scan(path)
    assert found == [records[hit] for hit in (1, 4, 5)]
    assert (reader.damaged_at, reader.damages) == (records[0][0], 2)
    assert "and in 1 more places" in sentences(reader)[0]


def test_bytes_that_are_added_removed_or_zeroed_lose_no_other_record(sound):
    path, whole, records = sound
    first, second, third = (offset for offset, _ in records[:3])
    for damaged, lost in [
        (whole[:second] + b"foreign" * 1000 + whole[second:], []),
        (whole[: second + 5] + whole[second + 8 :], [1]),
        (whole[:first] + bytes(third - first) + whole[third:], [0, 1]),
        (whole[:first] + whole[second:], [0]),
    ]:
        path.write_bytes(damaged)
        found, _ = scan(path)
        assert [p for _, p in found] == [p for hit, (_, p) in enumerate(records) if hit not in lost]


@pytest.mark.parametrize("last", [False, True])
def test_a_record_inside_the_text_of_a_damaged_record_is_not_accepted(tmp_path, last):
    """No bit of the payload or checksum of the outer record brings out the inner one."""
    inner = frame(b"\x81\xa4type\xa3abc")
    payload = encode(make_request(0, text="x")).replace(b"\xa1x", bytes([0xD9, len(inner)]) + inner)
    path = write_journal(tmp_path / "p", [make_request(1)])
    start = path.stat().st_size
    path.write_bytes(path.read_bytes() + frame(payload) + (b"" if last else frame(encode(make_request(2)))))
    whole, records = path.read_bytes(), scan(path)[0]
    assert len(records) == 3 - last
    for bit in range(8 * (start + 8), 8 * (start + FRAME_BYTES + len(payload))):
        path.write_bytes(flipped(whole, bit))
        assert scan(path)[0] == records[:1] + records[2:]


def test_the_search_finds_every_kind_of_record():
    routing = TraceRecord(
        table="routing",
        since=0,
        step=0,
        rank=0,
        layers=(),
        requests=make_rank(0).expert_load[0, :0],
        positions=make_request(0, num_prompt=0).prompt,
        columns={"experts": make_request(0, num_prompt=0).prompt.reshape(0, 0, 1)},
    )
    for record in (make_request(0), make_rank(0), routing):
        head = encode(record).index(b"\xa4type")
        assert head in journal._MAP_HEAD_BYTES


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xa4type",
        b"\x06" + bytes(15) + b"\x81\xa4type",
        b"\xff\xff\xff\x03" + bytes(12) + b"\x81\xa4type",
        b"\0",
        b"x",
    ],
)
def test_crafted_garbage_takes_seconds(sound, garbage):
    path, whole, records = sound
    cut = records[2][0]
    path.write_bytes(whole[:cut] + garbage * ((32 << 20) // len(garbage)) + whole[cut:])
    with at_once(processor_s=10), suppress(StorageError):  # in too many places
        assert [p for _, p in scan(path)[0]] == [p for _, p in records]


def test_a_file_that_is_not_regular_is_refused_at_once(tmp_path):
    journal.os.mkfifo(tmp_path / "p")
    with pytest.raises(StorageError, match="not a regular file"):
        JournalReader(tmp_path / "p")


# The file under the writer


def remove_file(path):
    path.unlink()


def remove_folder(path):
    shutil.rmtree(path.parent)


def replace_file(path):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def move_folder(path):
    path.parent.rename(path.parent.with_name("elsewhere"))


def replace_folder_by_a_file(path):
    shutil.rmtree(path.parent)
    path.parent.touch()


@pytest.mark.parametrize(
    "disturb",
    [remove_file, remove_folder, replace_file, move_folder, replace_folder_by_a_file],
    ids=lambda f: f.__name__,
)
def test_a_journal_that_loses_its_name_is_an_error_within_a_second_and_at_the_end(tmp_path, monkeypatch, disturb):
    path, now = tmp_path / "parts" / "p", [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    writer = JournalWriter(path, fingerprint="run")
    writer.append(make_request(0))
    disturb(path)
    now[0] += 1.0
    with pytest.raises(StorageError, match="was removed or replaced"):
        writer.append(make_request(1))
    with pytest.raises(StorageError, match="was removed or replaced"):
        writer.close()
    writer.close()


def test_damage_behind_a_read_record_is_found_when_it_is_read_again(sound):
    path, whole, records = sound
    assert read_journal(path)[1] == 0
    with JournalReader(path) as reader:
        list(reader.payloads())
        path.write_bytes(flipped(whole, 8 * (records[1][0] + 30)))
        with pytest.raises(StorageError, match="has changed"):
            reader.record_at(records[1][0])


def packed_as(**changes):
    """The payload of a record with other values of some fields."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode(RECORDS[0])) | changes)


@pytest.mark.parametrize(
    "payload",
    [
        packed_as(id="?").replace(b"\xa1?", b"\xa1\xff"),
        packed_as(prompt=["a", [1], b"a"]),
        packed_as(prompt=["|O", [1], b"\0" * 8]),
        packed_as(prompt=[["<i4"], [1], b"\0" * 4]),
        packed_as(prompt=["<i4", [-1], b"\0" * 5]),
        packed_as(index=2**63),
        packed_as(index=-1),
        packed_as(computed=-1),
        packed_as(computed=1000),
    ],
    ids=[
        "text",
        "type alias",
        "objects",
        "compound type",
        "shape",
        "large index",
        "index",
        "computed",
        "more computed",
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_payload_with_a_right_checksum_that_is_no_record_is_passed_over_and_reported(sound, payload):
    path, whole, records = sound
    path.write_bytes(whole + frame(payload) + frame(encode(RECORDS[0])))
    with JournalReader(path) as reader:
        assert len(list(reader.records())) == len(records) + 1
        (problem,) = map(str, reader.problems)
    assert f"byte {len(whole)}" in problem
    assert "cannot be used" in problem
