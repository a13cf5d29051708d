"""The journals of a run: finished requests before the merge, in an append-only file of each rank that records any.

A journal is a header followed by records, each preceded by its length and checksum. If a rank is killed at any moment,
all records written before can be read. Bytes that are no whole record are either damage, if a whole record follows
them, or the journal's bad end. A reader passes over both and reports them. A writer that opens the journal again
removes a record that was cut off at the end, and keeps all other bytes: it appends after them.

    header    magic "MOEMPART", version u32, length u32, fingerprint of the run (that many bytes), XXH3-64 of the above
    record    length u64, XXH3-64 u64 of the payload, payload (MessagePack, that many bytes)

Numbers are little-endian.
"""

import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import BinaryIO

from xxhash import xxh3_64_intdigest

from moempi.errors import StorageError
from moempi.storage.closeable import Closeable
from moempi.storage.files import atomic, hidden_name, is_in_place
from moempi.storage.records import Record, decode, encode

MAGIC = b"MOEMPART"
VERSION = 1
SYNC_INTERVAL_S = 1.0
FOLDER_RANKS = 1000
"""Ranks whose journals are in one folder."""

_HEADER = struct.Struct("<8sII")
_FRAME = struct.Struct("<QQ")
_DIGEST = struct.Struct("<Q")
_MAX_FINGERPRINT_BYTES = 4096

# A payload is a MessagePack map whose first key is "type"; the head of the map has 1 or 3 bytes.
_FIRST_KEY = re.compile(rb"\xa4type")
_MAP_HEAD_BYTES = (1, 3)
_FIRST_KEY_BYTES = 5
# Limits of the search behind damage: memory, and work in bytes. Verifying a record counts its length, at least a page;
# reading a length that does not fit the file counts _HEADER_CHARGE.
_WINDOW_BYTES = 1 << 20
_PAGE_BYTES = 4096
_HEADER_CHARGE = 512
_SEARCH_FACTOR = 16
_SEARCH_BYTES = 64 << 20


def journals_folder(results_path: str | Path) -> Path:
    """The folder of a results file's journals: `<results>.parts`."""
    return Path(f"{results_path}.parts")


def journal_path(results_path: str | Path, rank: int) -> Path:
    """The journal that `rank` writes, in a folder of those of FOLDER_RANKS ranks."""
    return journals_folder(results_path) / f"{rank // FOLDER_RANKS}" / f"rank-{rank:05d}.part"


def journal_paths(results_path: str | Path) -> list[Path]:
    """All journals beside a results file, from this run or an unfinished earlier one, in rank order.

    Earlier versions wrote them into `journals_folder` itself.
    """
    folder = journals_folder(results_path)
    found = (*folder.glob("rank-*.part"), *folder.glob("[0-9]*/rank-*.part"))
    return sorted(found, key=lambda path: (len(path.name), path.name, str(path)))


def whole_folder(journal: Path) -> Path:
    """The `journals_folder` that a journal is in."""
    return journal.parent.parent if journal.parent.name.isdecimal() else journal.parent


def remove_journals(results_path: str | Path) -> None:
    """Remove all journals beside a results file, if any, atomically: a later run finds all of them or none.

    Raises StorageError if the folder cannot be removed.
    """
    folder = journals_folder(results_path)
    try:
        hidden = folder.rename(hidden_name(Path(results_path)))
        shutil.rmtree(hidden)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{results_path}: is complete, but its parts cannot be removed: {error}") from error


@dataclass(frozen=True, order=True)
class Problem:
    """A sentence about a journal; two are equal if they are about the same byte of the same file."""

    path: Path
    offset: int
    sentence: str = field(compare=False)

    def __str__(self) -> str:
        return self.sentence


class JournalReader(Closeable):
    """A journal opened for reading; reading never changes it.

    `fingerprint` identifies the run and `num_bytes` is the file's size. Known once `records()` is exhausted:
    `damaged_at` is the offset of the first damage or -1, `damages` the number of damaged places, and `dropped_bytes`
    the size of the bad end. Raises StorageError if the file cannot be read or is not a journal.
    """

    REMEDY = "move it out of its folder to compute its requests again"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if self.path.exists() and not self.path.is_file():
                raise StorageError(f"{path}: is not a regular file; {self.REMEDY}")
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
        self.num_bytes = os.fstat(self._file.fileno()).st_size
        self.dropped_bytes = 0
        self.damaged_at = -1
        self.damages = 0
        self._reported = 0
        self._first_reported = (-1, "")
        self._search_bytes = _SEARCH_BYTES + _SEARCH_FACTOR * self.num_bytes
        try:
            self.fingerprint, self._start = self._read_header()
        except BaseException:
            self._file.close()
            raise

    @property
    def problems(self) -> list[Problem]:
        """The first damage, the bad end and the first reported record, once `records()` is exhausted."""
        found = []
        if self.damages:
            places = f" and in {self.damages - 1} more places" if self.damages > 1 else ""
            found.append(
                (self.damaged_at, f"is damaged at byte {self.damaged_at}{places}, the records behind it are kept")
            )
        if self.dropped_bytes:
            end = self.num_bytes - self.dropped_bytes
            found.append((end, f"ends with {self.dropped_bytes} torn bytes at byte {end}"))
        if self._reported:
            offset, what = self._first_reported
            more = f" (and {self._reported - 1} more records)" if self._reported > 1 else ""
            found.append((offset, f"holds a record at byte {offset} {what}{more}"))
        return [Problem(self.path, offset, f"{self.path} {what}") for offset, what in found]

    def records(self, *, num_requests: int = sys.maxsize) -> Iterator[tuple[int, Record]]:
        """Yield (offset, record) of all whole records that can be used, one in memory at a time.

        A record that cannot be used, or is of a request beyond `num_requests`, is added to `problems`. Raises
        StorageError.
        """
        for offset, payload in self.payloads():
            try:
                record = decode(payload, num_requests=num_requests)
            except ValueError as error:
                self.report(offset, f"that cannot be used: {error}")
            else:
                yield offset, record

    def report(self, offset: int, what: str) -> None:
        """Add a whole record to `problems`, with `what` is wrong about it."""
        if not self._reported:
            self._first_reported = (offset, what)
        self._reported += 1

    def payloads(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, encoded record) like `records`: verifies checksums, decodes nothing."""
        self.damaged_at, self.damages, self.dropped_bytes, self._reported = -1, 0, 0, 0
        offset = self._start
        while offset < self.num_bytes:
            payload = self._read_payload(offset)
            if payload is not None:
                yield offset, payload
                offset += _FRAME.size + len(payload)
                continue
            resumed = self._resume(offset)
            if resumed is None:
                self.dropped_bytes = self.num_bytes - offset
                return
            self.damaged_at = offset if self.damaged_at < 0 else self.damaged_at
            self.damages += 1
            offset = resumed

    def record_at(self, offset: int) -> Record:
        """The record at an offset from `records`; raises StorageError if it is no longer intact."""
        payload = self._read_payload(offset)
        if payload is None:
            raise StorageError(f"{self.path}: the record at byte {offset} has changed since it was found")
        try:
            return decode(payload)
        except ValueError as error:
            raise StorageError(f"{self.path}: the record at byte {offset} cannot be used: {error}") from error

    @property
    def append_at(self) -> int:
        """The offset at which a writer continues, once `records()` is exhausted.

        A record that was cut off at the end of the file is overwritten: its length leads beyond the end, or its bytes
        are zeros that a power failure left.
        """
        end = self.num_bytes - self.dropped_bytes
        tail = self._read(end, _WINDOW_BYTES)
        beyond = len(tail) < _FRAME.size or end + _FRAME.size + _FRAME.unpack_from(tail)[0] > self.num_bytes
        zeros = len(tail) == self.dropped_bytes and not any(tail)
        return end if beyond or zeros else self.num_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_header(self) -> tuple[str, int]:
        head = self._read(0, _HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise StorageError(f"{self.path}: not a part of a results file, or its header is damaged; {self.REMEDY}")
        _, version, length = _HEADER.unpack(head)
        fingerprint = self._read(_HEADER.size, min(length, _MAX_FINGERPRINT_BYTES))
        start = _HEADER.size + len(fingerprint) + _DIGEST.size
        if self._read(start - _DIGEST.size, _DIGEST.size) != _DIGEST.pack(xxh3_64_intdigest(head + fingerprint)):
            raise StorageError(f"{self.path}: its header is damaged; {self.REMEDY}")
        if version != VERSION:
            raise StorageError(f"{self.path}: part version {version}, this program reads {VERSION}; {self.REMEDY}")
        return fingerprint.decode(errors="replace"), start

    def _read(self, offset: int, num_bytes: int) -> bytes:
        try:
            self._file.seek(offset)
            return self._file.read(num_bytes)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _read_payload(self, offset: int) -> bytes | None:
        """The payload of the frame at `offset` if it is whole, else None."""
        frame = self._read(offset, _FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        length, digest = _FRAME.unpack(frame)
        if length > self.num_bytes - offset - _FRAME.size:
            return None
        payload = self._read(offset + _FRAME.size, length)
        return payload if len(payload) == length and xxh3_64_intdigest(payload) == digest else None

    def _resume(self, damaged_at: int) -> int | None:
        """The offset of the first whole record behind damage; None if there is none.

        If the damaged frame's own length leads to a whole record or to the end of the file, its text may contain the
        bytes of another journal: a record before that place counts only if records follow it up to that place.
        """
        end = self._own_end(damaged_at)
        for offset in self._frames_after(damaged_at):
            if offset >= end or self._leads_to(offset, end):
                return offset
        return None

    def _own_end(self, offset: int) -> int:
        """The end of the damaged frame at `offset` by its own length; 0 if that is not a border between records."""
        frame = self._read(offset, _FRAME.size)
        if len(frame) < _FRAME.size:
            return 0
        end: int = offset + _FRAME.size + _FRAME.unpack(frame)[0]
        whole = end == self.num_bytes or (end < self.num_bytes and self._verified_payload(end) is not None)
        return end if whole else 0

    def _leads_to(self, offset: int, end: int) -> bool:
        """Whether whole records follow each other from `offset` to `end`."""
        while offset < end and (payload := self._verified_payload(offset)) is not None:
            offset += _FRAME.size + len(payload)
        return offset == end

    def _frames_after(self, damaged_at: int) -> Iterator[int]:
        """Yield the offsets of whole records behind `damaged_at`, found by the first key of their payloads."""
        position, size = damaged_at + 1, _PAGE_BYTES
        while position < self.num_bytes:
            window = self._read(position, size)
            for match in _FIRST_KEY.finditer(window):
                for head in _MAP_HEAD_BYTES:
                    offset = position + match.start() - head - _FRAME.size
                    if offset > damaged_at and self._verified_payload(offset) is not None:
                        yield offset
            position += size - _FIRST_KEY_BYTES + 1
            size = min(2 * size, _WINDOW_BYTES)

    def _verified_payload(self, offset: int) -> bytes | None:
        """Like `_read_payload`, but counts its work; raises StorageError beyond the limit of a search."""
        frame = self._read(offset, _FRAME.size)
        length = _FRAME.unpack(frame)[0] if len(frame) == _FRAME.size else self.num_bytes
        if length > self.num_bytes - offset - _FRAME.size:
            self._search_bytes -= _HEADER_CHARGE
            payload = None
        else:
            self._search_bytes -= max(length, _PAGE_BYTES)
            payload = self._read_payload(offset)
        if self._search_bytes < 0:
            raise StorageError(f"{self.path}: is damaged in too many places; {self.REMEDY}")
        return payload


class JournalWriter(Closeable):
    """Appends records to the journal of one rank.

    Creates the file and its folder, or continues an existing journal at its end; see `JournalReader.append_at`.
    `fingerprint` identifies the run (weights, prompts, job). Raises StorageError if the journal belongs to another run
    or cannot be written. Not collective.
    """

    def __init__(self, path: str | Path, *, fingerprint: str) -> None:
        self.path = Path(path)
        self._syncing: Thread | None = None
        self._sync_error: OSError | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                with atomic(self.path) as fresh:
                    fresh.write_bytes(_header(fingerprint))
            self._end = self._end_of_records(fingerprint)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.ftruncate(self._file, self._end)
        except OSError as error:
            raise self._failure(error) from error
        self._synced_at = time.monotonic()

    def append(self, record: Record) -> None:
        """Write one record with one system call, and once per second start an fdatasync, which blocks no one.

        Raises StorageError if the disk is full or fails, in an fdatasync before this call too; the journal then ends
        with the last complete record. Also raises it, within a second, if the file was removed or replaced.
        """
        payload = encode(record)
        try:
            self._write(_FRAME.pack(len(payload), xxh3_64_intdigest(payload)) + payload)
            if time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
                self._start_sync()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Sync to disk and close; later calls do nothing.

        Raises StorageError if the disk fails, or if the file was removed or replaced.
        """
        if self._file < 0:
            return
        file, self._file = self._file, -1
        if self._syncing is not None:
            self._syncing.join()
        try:
            self._require_in_place(file)
            self._raise_sync_error()
            os.fdatasync(file)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(file)

    def _end_of_records(self, fingerprint: str) -> int:
        with JournalReader(self.path) as journal:
            if journal.fingerprint != fingerprint:
                raise StorageError(
                    f"{self.path}: belongs to another run; remove {whole_folder(self.path)} to start afresh"
                )
            for _ in journal.payloads():
                pass
            return journal.append_at

    def _write(self, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(record)

    def _require_in_place(self, file: int) -> None:
        if not is_in_place(file, self.path):
            raise StorageError(f"{self.path}: was removed or replaced during the run, its records are lost; run again")

    def _start_sync(self) -> None:
        """Start an fdatasync beside the run, unless the one before has not ended."""
        self._synced_at = time.monotonic()
        self._require_in_place(self._file)
        if self._syncing is not None and self._syncing.is_alive():
            return
        self._raise_sync_error()
        thread = Thread(target=self._sync, args=(self._file,), name="journal sync", daemon=True)
        try:
            thread.start()
            self._syncing = thread
        except RuntimeError:  # no more threads here
            self._sync(self._file)

    def _sync(self, file: int) -> None:
        try:
            os.fdatasync(file)
        except OSError as error:
            self._sync_error = error

    def _raise_sync_error(self) -> None:
        if self._sync_error is not None:
            raise self._sync_error

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path}: cannot be written: {error.strerror}")


def _header(fingerprint: str) -> bytes:
    body = fingerprint.encode()
    if not 0 < len(body) <= _MAX_FINGERPRINT_BYTES:
        raise ValueError(f"a fingerprint has 1 to {_MAX_FINGERPRINT_BYTES} bytes, not {len(body)}")
    header = _HEADER.pack(MAGIC, VERSION, len(body)) + body
    return header + _DIGEST.pack(xxh3_64_intdigest(header))
