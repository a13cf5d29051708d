"""Prompts that memory does not hold: the same prompts, in order; repeated ids among very many."""

import json
import os
import resource
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.config.job import Sampling
from moempi.errors import DataError, StorageError
from moempi.storage import prompt_spool, repeated
from moempi.storage.prompt_file import PromptCounts, read_prompts
from moempi.storage.prompt_spool import PromptCodec, PromptSpool, num_bytes
from moempi.storage.prompts import Prompt
from moempi.storage.repeated import RepeatedDigests, digest

SAMPLING = Sampling(max_tokens=7, stop=("x",))
OTHER = Sampling(max_tokens=3, temperature=0.1, logit_bias={5: -1.5}, stop=("a", "b"), stop_token_ids=(3,), n=2)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
PROMPTS = st.builds(
    Prompt,
    index=st.integers(0, 2**60),
    id=TEXT,
    text=st.none() | TEXT,
    tokens=st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda found: np.array(found, np.int32)),
    reference=st.none() | TEXT,
    sampling=st.sampled_from([SAMPLING, OTHER]),
    error=TEXT,
    chat=st.none() | st.binary(max_size=9),
    metadata=st.none() | TEXT,
    prompt_id=st.none() | TEXT,
    group=st.none() | TEXT,
    replay=st.none() | TEXT,
)


def fields(prompt):
    found = msgspec.structs.asdict(prompt)
    return found | {"tokens": None if prompt.tokens is None else (prompt.tokens.dtype, prompt.tokens.tolist())}


def spool_of(prompts, folder):
    spool = PromptSpool(PromptCodec(SAMPLING), folder)
    for prompt in prompts:
        spool.append(prompt)
    return spool


@given(prompts=st.lists(PROMPTS, max_size=12), block=st.integers(1, 5), num_bytes=st.integers(0, 40))
def test_a_spool_gives_its_prompts_as_they_were(tmp_path_factory, prompts, block, num_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_spool, "BLOCK", block)
        patch.setattr(prompt_spool, "BLOCK_BYTES", num_bytes)
        patch.setattr(prompt_spool, "MEMORY_BYTES", 100)
        with spool_of(prompts, tmp_path_factory.mktemp("spool")) as spool:
            assert len(spool) == len(prompts)
            for found in (spool, list(zip(spool, spool, strict=True))):  # two iterations at a time
                pairs = [one if isinstance(one, tuple) else (one, one) for one in found]
                assert [fields(one) for one, _ in pairs] == [fields(other) for _, other in pairs]
                assert [fields(one) for one, _ in pairs] == [fields(prompt) for prompt in prompts]
                assert all((one.sampling is SAMPLING) == (one.sampling == SAMPLING) for one, _ in pairs)


def test_the_file_of_a_spool_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_spool, "MEMORY_BYTES", 1000)
    with spool_of(_many(5000), tmp_path) as spool:
        assert [prompt.index for prompt in spool] == list(range(5000))
        assert not list(tmp_path.iterdir())
        held = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
        assert any(name.startswith(str(tmp_path)) for name in held)
    assert len(spool) == 0


def _many(count):
    return (Prompt(index, f"q{index}", "x" * 50, None, None, SAMPLING) for index in range(count))


def test_a_folder_that_takes_no_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_spool, "MEMORY_BYTES", 1000)
    with pytest.raises(StorageError, match="missing: a file of prompts in it cannot be written: No such file"):
        spool_of(_many(5000), tmp_path / "missing")


def test_an_error_that_names_a_path_that_is_no_text_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_spool, "BLOCK", 1)
    (prompt,) = spool_of([Prompt(0, "a", None, None, None, SAMPLING, "p\udcff: bad")], tmp_path)
    assert prompt.error == "p\ufffd: bad"


# Repeated ids


@given(texts=st.lists(st.sampled_from([f"q{number}" for number in range(30)])), block=st.integers(1, 7))
def test_repeated_texts_are_found(texts, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "_BLOCK", block)
        digests = RepeatedDigests()
        for first in range(0, len(texts), 2):
            digests.add(texts[first : first + 2])
        expected = {digest(text) for text in texts if texts.count(text) > 1}
        assert digests.found() == expected
        assert digests.found() == expected


def test_runs_of_digests_are_few(monkeypatch):
    monkeypatch.setattr(repeated, "_BLOCK", 4)
    digests = RepeatedDigests()
    for number in range(4000):
        digests.add([f"q{number}"])
    assert not digests.found()
    assert len(digests._runs) <= 11
    assert sum(map(len, digests._runs)) == 4000


def ids(path, *, strict=False):
    prompts, _ = read_prompts(path, sampling=SAMPLING, strict=strict, folder=path.parent)
    return [(prompt.id, prompt.error.partition(": ")[2]) for prompt in prompts]


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("collides", [False, True])
def test_only_a_repeated_id_is_an_error_and_not_an_equal_digest(tmp_path, monkeypatch, collides):
    if collides:
        monkeypatch.setattr("moempi.storage.prompts.digest", lambda text: 7)
        monkeypatch.setattr(repeated, "digest", lambda text: 7)
    path = write(tmp_path / "p", *({"id": name, "prompt": "1"} for name in "abac"))
    assert ids(path) == [("a", ""), ("b", ""), ("line-3", f"id 'a' was used before, at {path}:1"), ("c", "")]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (("a", "b", "{", "a"), "p:3: "),
        (("a", "a", "{"), "p:2: id 'a' was used before"),
        (("a", "b", "line-4", "a"), "p:4: id 'a' was used before"),
        (("a", '{"id": "a"}', "b"), "p:2: give either"),
    ],
)
def test_a_strict_run_ends_at_the_first_error_of_the_file(tmp_path, lines, error):
    path = write(tmp_path / "p", *(line if "{" in line else {"id": line, "prompt": "1"} for line in lines))
    with pytest.raises(DataError) as found:
        ids(path, strict=True)
    assert str(found.value).startswith(f"{tmp_path}/{error}")


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_of_a_check_names_the_line(tmp_path, strict):
    def check(prompt):
        return msgspec.structs.replace(prompt, error="replay: no such file") if prompt.id == "b" else prompt

    path = write(tmp_path / "p", {"id": "a", "prompt": "1"}, {"id": "b", "prompt": "2"}, "{")
    expected = f"{path}:2: replay: no such file"
    if strict:
        with pytest.raises(DataError, match=expected):
            read_prompts(path, sampling=SAMPLING, strict=True, folder=tmp_path, check=check)
        return
    prompts, _ = read_prompts(path, sampling=SAMPLING, strict=False, folder=tmp_path, check=check)
    errors = [prompt.error for prompt in prompts]
    assert errors[:2] == ["", expected]
    assert errors[2].startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    "long",
    [
        {"id": "i" * 1000},
        {"group": "g" * 1000},
        {"replay": "r" * 1000},
        {"sampling": Sampling(stop=("s" * 500, "t" * 500))},
        {"sampling": Sampling(logit_bias=dict.fromkeys(range(1000), 1.0))},
        {"sampling": Sampling(stop_token_ids=tuple(range(1000)))},
    ],
    ids=["id", "group", "replay", "stop", "logit_bias", "stop_token_ids"],
)
def test_all_that_may_be_long_counts(long):
    plain = Prompt(0, "", "", None, None, SAMPLING)
    assert num_bytes(msgspec.structs.replace(plain, **long)) >= num_bytes(plain) + 900


def test_prompts_are_counted(tmp_path):
    path = write(
        tmp_path / "p",
        {"prompt": "1", "group": "g", "top_logprobs": 4},
        {"tokens": [1], "n": 3},
        {"messages": [{"role": "user", "content": "x"}]},
        "{",
    )
    calls = []
    _, counts = read_prompts(path, sampling=SAMPLING, strict=False, folder=tmp_path, on_block=lambda: calls.append(1))
    assert counts == PromptCounts(requests=6, texts=1, chats=1, refused=1, top_logprobs=4, groups={"g", None})
    assert calls == [1]


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_spool, "MEMORY_BYTES", 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageError, match="a file of prompts in it cannot be written: File too large"):
            spool_of(_many(5000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
