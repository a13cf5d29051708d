"""Weight files, results files, and prompts as arrays: HDF5."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import h5py
import msgspec
import numpy as np

from fuzz.hdf5_damage import TYPES, change_link, change_storage, damage_bytes, damage_objects, dataset_names
from fuzz.mutation import damaged_text, mutated, to_json
from fuzz.prompts import RUN, use_prompts
from fuzz.seeds import ARCHITECTURE, JOB, TOKENIZER
from fuzz.subject import Subject, Use, main, require
from moempi.config.architecture import Architecture
from moempi.config.job import ChatSection, Sampling
from moempi.config.tensors import catalogue
from moempi.engine.chat import render_chats
from moempi.engine.tokenizer import TextTokenizer
from moempi.storage import weights as weight_files
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.prompts import Prompt
from moempi.storage.weights import WeightFile

MAX_TENSORS = 500
CHATS = [Prompt(0, "a", None, None, None, Sampling(), chat=b'{"messages": [{"role": "user", "content": "<s>1"}]}')]


def old_format(source: Path, path: Path) -> None:
    """Copy an HDF5 file to the oldest format, whose metadata has no checksums."""
    with h5py.File(source) as old, h5py.File(path, "w", libver="earliest") as new:
        for name in old:
            old.copy(name, new)
        for name, value in old.attrs.items():
            new.attrs[name] = value


class WeightsFile(Subject):
    """A weight file: printed, laid out, and every tensor read and verified."""

    name = "weights"
    file = "weights.h5"
    commands = ("inspect weights.h5", "run job.toml --world 2", "run job.toml")

    def __init__(self, seeds: Path) -> None:
        old_format(seeds / "weights.h5", seeds / "old.h5")
        self.files = [(seeds / name).read_bytes() for name in ("weights.h5", "old.h5")]
        self.names = dataset_names(seeds / "weights.h5")
        self.contents = contents(seeds / "weights.h5")
        with h5py.File(seeds / "weights.h5") as file:
            self.texts = {
                name: file[name][:].tobytes() for name in (*weight_files.TEXTS, weight_files.CHAT, "checksums")
            }

    def write(self, random: Random) -> Any:
        path, content = Path("weights.h5"), random.choice(self.files)
        Path("job.toml").write_text(JOB.replace("../seeds/none", "weights").replace("../seeds/results", "results"))
        kind = random.randrange(10)
        if kind == 0:
            path.write_bytes(content)
        elif kind < 4:
            path.write_bytes(damage_bytes(random, content))
        else:
            path.write_bytes(content)
            if kind < 7:
                damage_objects(random, path, self.names)
            else:
                self.change_texts(random, path)
        return kind

    def change_texts(self, random: Random, path: Path) -> None:
        """Change the architecture and what must agree with it, and renew the fingerprint."""
        texts = dict(self.texts)
        match random.randrange(5):
            case 0:
                texts["architecture"] = to_json(mutated(random, msgspec.to_builtins(ARCHITECTURE), changes=1))
                texts["catalogue"] = catalogue_of(texts["architecture"]) or texts["catalogue"]
            case 1:
                texts["tokenizer"] = to_json(mutated(random, TOKENIZER))
            case 2:
                texts["catalogue"] = to_json(mutated(random, json.loads(texts["catalogue"]), changes=1))
            case 3:
                texts[weight_files.CHAT] = to_json(mutated(random, json.loads(texts[weight_files.CHAT])))
            case _:
                name = random.choice(list(texts))
                texts[name] = damaged_text(random, texts[name])
        texts["checksums"] = texts["checksums"][: len(texts["checksums"]) // 8 * 8]
        with h5py.File(path, "r+") as file:
            for name, text in texts.items():
                del file[name]
                file[name] = np.frombuffer(text, "<u8" if name == "checksums" else np.uint8)
            file.attrs["fingerprint"] = np.bytes_(weight_files._fingerprint(texts))

    def uses(self, known: int) -> Sequence[Use]:
        return (lambda: self.read(known), lambda: main("inspect weights.h5"), lambda: main("run job.toml --world 2"))

    def read(self, kind: int) -> None:
        found = contents(Path("weights.h5"))
        require(kind > 6 or found == self.contents, "a damaged file gives other weights")
        tokenizer = TextTokenizer(found[1], eos_tokens=found[0].eos_tokens, origin="weights.h5")
        if found[2] not in (None, self.contents[2]):
            render_chats(CHATS, found[2], tokenizer, section=ChatSection(), today=datetime(2025, 12, 31))


def contents(path: Path) -> tuple[Architecture, str, ChatTemplates | None, list[bytes]]:
    """Architecture, tokenizer, chat templates and the tensors of a weight file."""
    with WeightFile.open(path) as file:
        return (
            file.architecture,
            file.tokenizer,
            file.chat,
            [file.read(one.name).tobytes() for one in catalogue(file.architecture)],
        )


def catalogue_of(text: bytes) -> bytes | None:
    """The catalogue of an architecture as text, None if it is none."""
    try:
        architecture = msgspec.json.decode(text, type=Architecture)
    except (ValueError, RecursionError):
        return None
    if architecture.problem() or architecture.num_layers > MAX_TENSORS // 10:
        return None
    return weight_files._encode_catalogue(catalogue(architecture))


class ResultsFile(Subject):
    """A results file: printed, shown, exported, compared, and experts placed by its routing."""

    name = "results"
    file = "results.h5"
    codes = (65, 66, 74)
    commands = (
        "inspect results.h5",
        "show job.toml",
        "export results.h5 out.jsonl",
        "compare ../seeds/results.h5 results.h5 --within 1e9",
        "place results.h5 -o placement.json",
    )

    def __init__(self, seeds: Path) -> None:
        old_format(seeds / "results.h5", seeds / "old.h5")
        self.files = [(seeds / name).read_bytes() for name in ("results.h5", "old.h5")]
        self.names = dataset_names(seeds / "results.h5")

    def write(self, random: Random) -> Any:
        path, content = Path("results.h5"), random.choice(self.files)
        Path("job.toml").write_text(JOB.replace("../seeds/results", "results"))
        kind = random.randrange(10)
        path.write_bytes(damage_bytes(random, content) if 0 < kind < 4 else content)
        if kind >= 4:
            damage_objects(random, path, self.names)
        return random.choice(("", "--ranks 3 --replicas 0.5"))

    def uses(self, known: str) -> Sequence[Use]:
        return (
            self.export,
            lambda: main("inspect results.h5"),
            lambda: main("show job.toml"),
            lambda: main("compare ../seeds/results.h5 results.h5"),
            lambda: main(f"place results.h5 -o placement.json --force {known}"),
        )

    def export(self) -> None:
        main("export results.h5 out.jsonl --force")
        for line in Path("out.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            require(len(row["tokens"]) == len(row["logprobs"]), "tokens and log-probabilities differ in number")


class PromptArrays(Subject):
    """Prompts as arrays of tokens: made into requests."""

    name = "prompts-hdf5"
    file = "prompts.h5"
    commands = ("run job.toml", "show job.toml")

    def write(self, random: Random) -> Any:
        path = Path("prompts.h5")
        Path("job.toml").write_text(RUN.replace("prompts.jsonl", "prompts.h5"))
        lengths = [
            random.randrange(4) if random.random() < 0.3 else random.randrange(1, 4) for _ in range(random.randrange(6))
        ]
        values = [random.randrange(100) for _ in range(sum(lengths))]
        kind = "<i8" if random.random() < 0.6 else random.choice(TYPES[:7])
        if values and random.random() < 0.2:
            values[random.randrange(len(values))] = random.choice((-1, 127, 2**31 - 1, 2**31, 2**62))
        with h5py.File(path, "w", libver=random.choice(("earliest", "latest", ("v110", "v110")))) as file:
            file["values"] = np.array(values, np.int64).astype(kind)
            file["offsets"] = np.cumsum([0, *lengths]).astype(random.choice(("<i8", "<i8", "<u4", ">i2")))
            if random.random() < 0.6:
                ids = [
                    random.choice((b"a", b"b\xff", b"", b"\x1b[2J", b"row-0", b"%d" % i)) for i in range(len(lengths))
                ]
                plain = [b"%d" % index for index in range(len(lengths))]
                file["id"] = np.array(ids if random.random() < 0.2 else plain, "S8") if lengths else np.zeros(0, "S8")
            if random.random() < 0.05:
                random.choice((change_link, change_storage))(random, file, "values")
        match random.randrange(6):
            case 0:
                path.write_bytes(damage_bytes(random, path.read_bytes()))
            case 1 | 2:
                damage_objects(random, path, ("values", "offsets", "id"))

    def uses(self, _: Any) -> Sequence[Use]:
        return (lambda: use_prompts("prompts.h5"),)


SUBJECTS = (WeightsFile, ResultsFile, PromptArrays)
