"""Finished requests on their way to the results file: one append-only part per rank, beside the results file.

A part is a header and then records, each behind its length and checksum. Whatever moment a rank is killed at, the
records before that moment can be read back; a torn record at the end is dropped when reading and cut off when a
writer opens the part again.

    header    magic "MOEMPART", version u32, length u32, fingerprint of the run (that many bytes), XXH3-64 of all before
    record    length u64, XXH3-64 u64 of the payload, payload (MessagePack, that many bytes)

Numbers are little-endian.
"""

import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
from xxhash import xxh3_64_intdigest

from moempi.errors import StorageError
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
    """The folder of a results file's parts: `<results>.parts`."""
    return Path(f"{results_path}.parts")


def journal_path(results_path: str | Path, rank: int) -> Path:
    """The part that `rank` writes."""
    return journals_folder(results_path) / f"rank-{rank:05d}.part"


def journal_paths(results_path: str | Path) -> list[Path]:
    """All parts beside a results file, of this run or an unfinished one before it, in rank order; possibly none."""
    return sorted(journals_folder(results_path).glob("rank-*.part"), key=lambda path: (len(path.name), path.name))


def remove_journals(results_path: str | Path) -> None:
    """Remove all parts beside a results file at once, so that no later run meets a few of them; none is no error.

    Raises StorageError when the folder cannot be removed.
    """
    folder = journals_folder(results_path)
    try:
        hidden = folder.rename(hidden_name(Path(results_path)))
        shutil.rmtree(hidden)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{results_path}: is complete, but its parts cannot be removed: {error}") from error


class JournalReader:
    """A part opened for reading; reading never changes it.

    `fingerprint` is the run's, `num_bytes` the file's size, `dropped_bytes` what lies after the last whole record,
    known when `records()` is exhausted. Raises StorageError when the file cannot be read or is no part.
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
        """Yield (offset, record) from the first to the last whole record, one in memory at a time."""
        for offset, payload in self.payloads():
            yield offset, self._decode(offset, payload)

    def payloads(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, encoded record) as `records` does; checksums are verified, nothing is decoded."""
        offset = self._start
        while (payload := self._read_payload(offset)) is not None:
            yield offset, payload
            offset += _FRAME.size + len(payload)
        self.dropped_bytes = self.num_bytes - offset

    def record_at(self, offset: int) -> Record:
        """The record at an offset that `records` gave; raises StorageError when it is not whole any more."""
        payload = self._read_payload(offset)
        if payload is None:
            raise StorageError(f"{self.path}: the record at byte {offset} has changed since it was found")
        return self._decode(offset, payload)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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


class JournalWriter:
    """Appends records to a rank's part, creating it and its folder, or continuing it behind its last whole record.

    `fingerprint` says which run the records belong to (weights, prompts, job). Raises StorageError when the part
    belongs to another run or cannot be written. Not collective; each rank has its own.
    """

    def __init__(self, path: str | Path, *, fingerprint: str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                with atomic(self.path) as fresh:
                    fresh.write_bytes(_header(fingerprint))
            self._end = self._last_whole_record(fingerprint)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.ftruncate(self._file, self._end)
        except OSError as error:
            raise self._failure(error) from error
        self._synced_at = time.monotonic()

    def append(self, record: Record) -> None:
        """Write one record with one system call; reach the disk at most once per second, blocking for that.

        Raises StorageError when the disk is full or fails; the part then still ends with its last whole record.
        """
        payload = encode(record)
        try:
            self._write(_FRAME.pack(len(payload), xxh3_64_intdigest(payload)) + payload)
            if time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
                self._sync()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Reach the disk and close; later calls do nothing. Raises StorageError when the disk fails."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            os.fdatasync(file)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_whole_record(self, fingerprint: str) -> int:
        with JournalReader(self.path) as part:
            if part.fingerprint != fingerprint:
                raise StorageError(f"{self.path}: belongs to another run; remove {self.path.parent} to start afresh")
            for _ in part.payloads():
                pass
            return part.num_bytes - part.dropped_bytes

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
