"""The journal of a run: finished requests before the merge, in one append-only file per rank beside the results.

A journal is a header followed by records, each preceded by its length and checksum. If a rank is killed at any moment,
all records written before can be read. A reader drops a torn record at the end; a writer that opens the journal again
truncates it.

    header    magic "MOEMPART", version u32, length u32, fingerprint of the run (that many bytes), XXH3-64 of the above
    record    length u64, XXH3-64 u64 of the payload, payload (MessagePack, that many bytes)

Numbers are little-endian.
"""

import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from xxhash import xxh3_64_intdigest

from moempi.errors import StorageError
from moempi.storage.closeable import Closeable
from moempi.storage.files import atomic, hidden_name
from moempi.storage.records import Record, decode, encode

MAGIC = b"MOEMPART"
VERSION = 1
SYNC_INTERVAL_S = 1.0

_HEADER = struct.Struct("<8sII")
_FRAME = struct.Struct("<QQ")
_DIGEST = struct.Struct("<Q")
_MAX_FINGERPRINT_BYTES = 4096


def journals_folder(results_path: str | Path) -> Path:
    """The folder of a results file's journals: `<results>.parts`."""
    return Path(f"{results_path}.parts")


def journal_path(results_path: str | Path, rank: int) -> Path:
    """The journal that `rank` writes."""
    return journals_folder(results_path) / f"rank-{rank:05d}.part"


def journal_paths(results_path: str | Path) -> list[Path]:
    """All journals beside a results file, from this run or an unfinished earlier one, in rank order."""
    return sorted(journals_folder(results_path).glob("rank-*.part"), key=lambda path: (len(path.name), path.name))


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


class JournalReader(Closeable):
    """A journal opened for reading; reading never changes it.

    `fingerprint` identifies the run, `num_bytes` is the file's size, and `dropped_bytes` the bytes after the last
    complete record, known once `records()` is exhausted. Raises StorageError if the file cannot be read or is not a
    journal.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
        self.num_bytes = os.fstat(self._file.fileno()).st_size
        self.dropped_bytes = 0
        try:
            self.fingerprint, self._start = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield (offset, record) up to the last complete record, one in memory at a time; raises StorageError."""
        for offset, payload in self.payloads():
            yield offset, self._decode(offset, payload)

    def payloads(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, encoded record) like `records`: verifies checksums, decodes nothing."""
        offset = self._start
        while (payload := self._read_payload(offset)) is not None:
            yield offset, payload
            offset += _FRAME.size + len(payload)
        self.dropped_bytes = self.num_bytes - offset

    def record_at(self, offset: int) -> Record:
        """The record at an offset from `records`; raises StorageError if it is no longer intact."""
        payload = self._read_payload(offset)
        if payload is None:
            raise StorageError(f"{self.path}: the record at byte {offset} has changed since it was found")
        return self._decode(offset, payload)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_header(self) -> tuple[str, int]:
        head = self._file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise StorageError(f"{self.path}: not a part of a results file")
        _, version, length = _HEADER.unpack(head)
        if version != VERSION:
            raise StorageError(f"{self.path}: part version {version}, this program reads {VERSION}")
        fingerprint = self._file.read(min(length, _MAX_FINGERPRINT_BYTES))
        if self._file.read(_DIGEST.size) != _DIGEST.pack(xxh3_64_intdigest(head + fingerprint)):
            raise StorageError(f"{self.path}: its header is damaged")
        return fingerprint.decode(), self._file.tell()

    def _read_payload(self, offset: int) -> bytes | None:
        try:
            self._file.seek(offset)
            frame = self._file.read(_FRAME.size)
            if len(frame) < _FRAME.size:
                return None
            length, digest = _FRAME.unpack(frame)
            if length > self.num_bytes - offset - _FRAME.size:
                return None
            payload = self._file.read(length)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror}") from error
        return payload if len(payload) == length and xxh3_64_intdigest(payload) == digest else None

    def _decode(self, offset: int, payload: bytes) -> Record:
        try:
            return decode(payload)
        except msgspec.DecodeError as error:
            raise StorageError(f"{self.path}: the record at byte {offset} is not one of ours: {error}") from error


class JournalWriter(Closeable):
    """Appends records to the journal of one rank.

    Creates the file and its folder, or continues an existing journal after its last complete record. `fingerprint`
    identifies the run (weights, prompts, job). Raises StorageError if the journal belongs to another run or cannot be
    written. Not collective.
    """

    def __init__(self, path: str | Path, *, fingerprint: str) -> None:
        self.path = Path(path)
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
        """Write one record with one system call; blocks for an fdatasync at most once per second.

        Raises StorageError if the disk is full or fails; the journal then ends with the last complete record.
        """
        payload = encode(record)
        try:
            self._write(_FRAME.pack(len(payload), xxh3_64_intdigest(payload)) + payload)
            if time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
                self._sync()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Sync to disk and close; later calls do nothing. Raises StorageError if the disk fails."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            os.fdatasync(file)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(file)

    def _end_of_records(self, fingerprint: str) -> int:
        with JournalReader(self.path) as journal:
            if journal.fingerprint != fingerprint:
                raise StorageError(f"{self.path}: belongs to another run; remove {self.path.parent} to start afresh")
            for _ in journal.payloads():
                pass
            return journal.num_bytes - journal.dropped_bytes

    def _write(self, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(record)

    def _sync(self) -> None:
        os.fdatasync(self._file)
        self._synced_at = time.monotonic()

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path}: cannot be written: {error.strerror}")


def _header(fingerprint: str) -> bytes:
    body = fingerprint.encode()
    if not 0 < len(body) <= _MAX_FINGERPRINT_BYTES:
        raise ValueError(f"a fingerprint has 1 to {_MAX_FINGERPRINT_BYTES} bytes, not {len(body)}")
    header = _HEADER.pack(MAGIC, VERSION, len(body)) + body
    return header + _DIGEST.pack(xxh3_64_intdigest(header))
