"""A file of prompts has the same requests whatever the portions are in which it is read."""

import gzip
import json
import tempfile
from itertools import chain, product

import h5py
import msgspec
import numpy as np
import pytest

from moempi.config.job import Sampling
from moempi.errors import DataError
from moempi.storage import prompts as prompts_module
from moempi.storage.prompt_file import PromptCounts, PromptFile

SAMPLING = Sampling()


@pytest.fixture(autouse=True)
def few_lines_at_a_time(monkeypatch):
    """A portion ends behind a block of lines, so blocks are lines."""
    monkeypatch.setattr(prompts_module, "_LINES_BYTES", 1)


def open_prompts(path, **options):
    given = {"sampling": SAMPLING, "strict": False, "folder": tempfile.gettempdir()} | options
    return PromptFile(path, **given)


def portions(path, at_least, **options):
    """The requests of each portion."""
    found = []
    with open_prompts(path, **options) as file:
        while not file.is_read:
            with file.read(at_least) as spool:
                found.append(list(spool))
    return found


def fields(prompts):
    return [
        msgspec.structs.asdict(prompt)
        | {"tokens": None if prompt.tokens is None else prompt.tokens.tolist(), "sampling": prompt.sampling}
        for prompt in prompts
    ]


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


LINES = [
    {"prompt": "1"},
    {"id": "a", "tokens": [1, 2], "n": 3},
    "{",
    {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3},
    "",
    {"id": "b", "prompt": "2", "group": "g"},
    {"prompt": "3", "max_tokens": 5},
    {"prompt": "4", "metadata": {"k": 1}},
]


def files(folder):
    """A file of each form."""
    yield write(folder / "lines.jsonl", *LINES)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "lines.jsonl").read_bytes()))
    yield folder / "packed.jsonl.gz"
    yield write(folder / "lines.txt", "one", "", "two", "three", "four")
    yield write(folder / "table.csv", "id,prompt", "a,one", "b,two", "a,three", "c,four")
    with h5py.File(folder / "arrays.h5", "w") as file:
        file["values"], file["offsets"] = np.arange(9), np.array([0, 1, 3, 6, 9])
    yield folder / "arrays.h5"


def test_portions_are_the_whole_in_order(tmp_path):
    for path, at_least in product(files(tmp_path), (1, 2, 3, 5, 100)):
        with open_prompts(path) as file, file.read() as spool:
            whole, counts = list(spool), file.counts
        each = portions(path, at_least)
        assert fields(chain.from_iterable(each)) == fields(whole), (path, at_least)
        assert all(len(portion) >= at_least for portion in each[:-1])
        assert [prompt.index for prompt in whole] == list(range(len(whole)))
        with open_prompts(path) as file:
            while not file.is_read:
                before = file.counts.requests
                with file.read(at_least) as spool:
                    assert file.counts.requests - before == len(spool)
            assert file.counts == counts
    assert len(each) == 1


@pytest.mark.parametrize("collides", [False, True])
@pytest.mark.parametrize("at_least", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("names", ["abab", "abcdeaf", "aabbccdd", "abcdefg", "abcabcabc"])
def test_an_id_of_an_earlier_portion_is_an_error(tmp_path, monkeypatch, names, at_least, collides):
    if collides:
        monkeypatch.setattr("moempi.storage.prompts.digest", lambda text: 7)
        monkeypatch.setattr("moempi.storage.repeated.digest", lambda text: 7)
    path = write(tmp_path / "p.jsonl", *({"id": name, "prompt": name} for name in names))
    found = list(chain.from_iterable(portions(path, at_least)))
    for number, (name, prompt) in enumerate(zip(names, found, strict=True)):
        first = names.index(name)
        expected = "" if first == number else f"{path}:{number + 1}: id {name!r} was used before, at {path}:{first + 1}"
        assert (prompt.index, prompt.error) == (number, expected)


def test_repeated_ids_have_the_file_read_two_times_more_and_not_once_a_portion(tmp_path, monkeypatch):
    read = []
    find_prompts = prompts_module.find_prompts

    def find(*arguments, **options):
        read.append(len(options["repeated"]))
        return find_prompts(*arguments, **options)

    monkeypatch.setattr("moempi.storage.prompt_file.find_prompts", find)
    path, blocks = tmp_path / "p.jsonl", []
    portions(write(path, *({"id": f"{number}", "prompt": "1"} for number in range(20))), 3)
    assert read == [0]
    write(path, *({"id": f"{number // 2}", "prompt": "1"} for number in range(40)))
    read.clear()
    found = portions(path, 3, on_block=lambda: blocks.append(1))
    assert read == [0, 20]
    assert len(blocks) == 80  # each line is seen twice, as those that were returned are read again
    assert [bool(prompt.error) for prompt in chain.from_iterable(found)] == [False, True] * 20


def test_all_are_read_if_one_replays_a_file(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "2", "replay": "r.h5"}, *({"prompt": "3"},) * 9)
    assert list(map(len, portions(path, 2))) == [11]
    assert list(map(len, portions(path, 1))) == [1, 10]


def test_a_strict_file_ends_at_its_first_error(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "2"}, "{", {"prompt": "3"})
    with open_prompts(path, strict=True) as file:
        file.read(2).close()
        with pytest.raises(DataError, match=r"p\.jsonl:3: "):
            file.read(2)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{number}"} for number in range(6)))
    with open_prompts(path) as file:
        file.read(2).close()
        with path.open("a") as appended:
            appended.write('{"prompt": "more"}\n')
        with pytest.raises(DataError, match="changed while it is read; restore it"):
            file.read(2)


def test_another_file_in_its_place_is_not_read(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{number}"} for number in range(6)))
    with open_prompts(path) as file:
        file.read(2).close()
        write(tmp_path / "new", {"prompt": "new"}).replace(path)
        with file.read() as spool:
            assert [prompt.text for prompt in spool] == ["2", "3", "4", "5"]
        assert file.is_read


def test_a_file_that_is_removed_is_read_to_its_end(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{number}"} for number in range(6)), "{")
    with open_prompts(path) as file:
        file.read(2).close()
        assert file.found() == f"{path}: 2 requests so far, JSON lines"
        path.unlink()
        with file.read() as spool:
            assert len(spool) == 5
        assert file.found() == f"{path}: 7 requests, 1 of them refused, JSON lines"


def test_another_file_in_its_place_cannot_be_read_again_for_repeated_ids(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"id": name, "prompt": "1"} for name in "abca"))
    with open_prompts(path) as file:
        file.read(2).close()
        write(tmp_path / "new", {"prompt": "new"}).replace(path)
        with pytest.raises(DataError, match="changed while it is read"):
            file.read(2)


def test_counts_are_merged():
    first = PromptCounts(3, 1, 1, 1, 2, {"g"}, 1, {"a": None})
    first.merge(PromptCounts(4, 2, 0, 1, 1, {None}, 2, {"b": None}))
    assert first == PromptCounts(7, 3, 1, 2, 2, {"g", None}, 3, {"a": None, "b": None})
