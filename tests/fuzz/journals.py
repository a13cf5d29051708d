"""Journals of runs, and kept kernels: files of the program itself that may be damaged."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from fuzz.mutation import BOUNDARIES, damaged, mutated
from fuzz.seeds import REQUESTS, records
from fuzz.subject import Subject, Use, main, require
from moempi.backend.kept_files import MAX_BYTES, keep, kept_folder, read_kept
from moempi.engine.earlier import Earlier, finished_requests
from moempi.errors import StorageError
from moempi.storage import journal
from moempi.storage.journal import JournalReader, JournalWriter
from moempi.storage.merge import merge
from moempi.storage.records import encode
from storage.test_results import PROVENANCE

FINGERPRINT = "f"
TYPES = (
    "O",
    "|O8",
    "S0",
    "<U1",
    "V0",
    "<f8",
    "<i8",
    "i4,i4",
    "(2,2)i4",
    "M8[s]",
    "x",
    "",
    "(",
    "<c16",
    "3i4",
    "a" * 1000,
)
SHAPES: tuple[Any, ...] = ([], [0], [-1], [2**62], [1, 2, 3], [0, 0], [2**63], ["a"], 5, None, [2**40, 0], [1] * 70)


def decoded(payload: bytes) -> dict[str, Any]:
    """The keys and values of a record; empty if the payload has been damaged before."""
    try:
        tree = msgspec.msgpack.decode(payload)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


class JournalFile(Subject):
    """A journal: its requests are counted and merged, the results exported; a writer continues it."""

    name = "journal"
    file = "rank-00000.part"
    codes = (StorageError.exit_code,)
    named = ("rank-00000.part", "rank ", "requests have no record", "routing")

    def __init__(self, _: Path) -> None:
        self.payloads = [encode(record) for record in records()]
        self.digests = {xxh3_64_intdigest(payload) for payload in self.payloads}
        self.header = journal._header(FINGERPRINT)

    def write(self, random: Random) -> Any:
        payloads = list(self.payloads)
        kind = random.randrange(10)
        for _ in range(random.choice((1, 1, 2)) if kind > 3 else 0):
            self.change(random, payloads)
        frames = [self.frame(random, payload, lying=kind == 4) for payload in payloads]
        content = self.header + b"".join(frames)
        first = len(self.header) if random.random() < 0.7 else 0
        Path("rank-00000.part").write_bytes(damaged(random, content, first=first) if 0 < kind < 4 else content)
        return kind < 4

    def change(self, random: Random, payloads: list[bytes]) -> None:
        """Change one payload, or their number and order."""
        index = random.randrange(len(payloads))
        tree = decoded(payloads[index])
        match random.randrange(8) if tree else 0:
            case 0:
                payloads[index] = damaged(random, payloads[index])
            case 1 | 2:
                names = [name for name, value in tree.items() if isinstance(value, list) and len(value) == 3]
                packed = tree[random.choice(names)] if names else [0, 0, b"a"]
                match random.randrange(3):
                    case 0:
                        packed[0] = random.choice(TYPES)
                    case 1:
                        packed[1] = random.choice(SHAPES)
                    case _:
                        packed[2] = (
                            damaged(random, packed[2]) if random.random() < 0.6 else random.choice((b"", packed[2] * 2))
                        )
                payloads[index] = msgspec.msgpack.encode(tree)
            case 3 | 4 | 5:
                payloads[index] = self.encoded(mutated(random, tree, changes=1))
            case 6:
                payloads.insert(index, random.choice(payloads))
            case _:
                payloads.append(payloads.pop(index))

    def encoded(self, tree: Any) -> bytes:
        try:
            return msgspec.msgpack.encode(tree)
        except (ValueError, TypeError, OverflowError, msgspec.MsgspecError):
            return b"\x81\xa4type\xa7request"

    def frame(self, random: Random, payload: bytes, *, lying: bool) -> bytes:
        length = journal._FRAME.pack(len(payload), xxh3_64_intdigest(payload))
        if lying and random.random() < 0.3:
            length = random.choice(BOUNDARIES) + length[8:]
        return length + payload

    def uses(self, known: bool) -> Sequence[Use]:
        return (partial(self.count, known), self.merge, self.go_on)

    def count(self, known: bool) -> int:
        """Count the finished requests; a journal with problems, which a run warns of, counts as refused."""
        path = Path("rank-00000.part")
        finished, next_step, problems = finished_requests([path], FINGERPRINT, REQUESTS)
        Earlier.from_finished(finished, next_step=next_step)
        require(all(path.name in str(problem) for problem in problems), "a problem does not name the journal")
        with JournalReader("rank-00000.part") as reader:
            found = [xxh3_64_intdigest(payload) for _, payload in reader.payloads()]
        require(not known or self.digests.issuperset(found), "damage gives another record")
        return StorageError.exit_code if problems else 0

    def merge(self) -> None:
        merge("results.h5", ["rank-00000.part"], num_requests=REQUESTS, provenance=PROVENANCE)
        main("export results.h5 out.jsonl --force")

    def go_on(self) -> None:
        """Append a record to a journal; all that could be read before can be read afterwards."""
        before = self.readable()
        with JournalWriter("rank-00000.part", fingerprint=FINGERPRINT) as writer:
            writer.append(records()[0])
        require(self.readable()[: len(before)] == before, "a writer destroys records")

    def readable(self) -> list[bytes]:
        with JournalReader("rank-00000.part") as reader:
            return [payload for _, payload in reader.payloads()]


class KeptKernel(Subject):
    """A kept kernel: read only if it is whole and nobody else could have written it."""

    name = "kernel"
    file = "moempi/kernel.so"
    codes = (StorageError.exit_code,)

    def __init__(self, seeds: Path) -> None:
        keep(b"\x7fELF" + bytes(range(256)) * 20, seeds / "kernel.so")
        self.content = (seeds / "kernel.so").read_bytes()

    def write(self, random: Random) -> Any:
        folder = Path("moempi")
        folder.mkdir(mode=0o700)
        path = folder / "kernel.so"
        path.write_bytes(self.content)
        path.chmod(0o600)
        match random.randrange(10):
            case 0:
                path.chmod(random.choice((0o666, 0o620, 0o602, 0o000, 0o4777)))
            case 1:
                path.rename("elsewhere.so")
                random.choice(
                    (partial(os.symlink, "../elsewhere.so"), os.mkfifo, os.mkdir, partial(os.symlink, "kernel.so"))
                )(path)
            case 2:
                folder.chmod(random.choice((0o777, 0o770, 0o000, 0o1777)))
            case 3:
                os.truncate(
                    path, random.choice((0, 5, 16, len(self.content) - 1, len(self.content) + 1, MAX_BYTES - 1))
                )
            case 4:
                shutil.chown(random.choice((path, folder)), user=1)
            case 5 | 6 | 7:
                path.write_bytes(damaged(random, self.content))

    def uses(self, _: Any) -> Sequence[Use]:
        return (self.read,)

    def read(self) -> int:
        os.environ["XDG_CACHE_HOME"] = str(Path.cwd())
        trusted = {os.geteuid()}
        folder = kept_folder(trusted)
        compiled = read_kept(folder / "kernel.so", trusted) if folder else None
        require(compiled in (None, self.content[:-16]), "a damaged kernel is loaded")
        return 0 if compiled else StorageError.exit_code


SUBJECTS = (JournalFile, KeptKernel)
