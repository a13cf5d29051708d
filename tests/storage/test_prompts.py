import json
import tempfile

import h5py
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.config.job import Sampling
from moempi.errors import DataError, NoInputError
from moempi.printing import MAX_LINE_LENGTH
from moempi.storage import prompts
from moempi.storage.prompt_file import read_prompts
from moempi.storage.prompts import make_prompts

SAMPLING = Sampling(max_tokens=7, stop=("x",))


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def read(path, *, strict=False):
    return list(read_prompts(path, sampling=SAMPLING, strict=strict, folder=tempfile.gettempdir())[0])


def test_lines_become_prompts_in_order(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "12+34=", "reference": "46"},
        b"",
        {"id": "../../x", "tokens": [0, 5, 2**31 - 1]},
        {"prompt": "emoji \U0001f9ee nul \0"},
    )
    first, second, third = read(path, strict=True)
    assert (first.index, first.id, first.text, first.tokens, first.reference) == (0, "a", "12+34=", None, "46")
    assert first.sampling is SAMPLING
    assert (second.index, second.id, second.text, second.reference) == (1, "../../x", None, None)
    assert second.tokens.dtype == np.int32
    assert second.tokens.tolist() == [0, 5, 2**31 - 1]
    assert (third.index, third.id, third.text) == (2, "line-4", "emoji \U0001f9ee nul \0")
    assert not any(prompt.error for prompt in (first, second, third))


def test_objects_become_the_same_prompts_as_lines_with_them(tmp_path):
    objects = [
        {"prompt": "12+34=", "reference": "46", "metadata": {"a": [1]}},
        {"id": 7, "tokens": [5, 6], "temperature": 0.5, "n": 2},
        {"messages": [{"role": "user", "content": "x"}], "tools": []},
        {"id": "bad", "prompt": "x", "max_tokens": 0},
        {"id": 7, "prompt": "again"},
        {"prompt": "x", "tokens": [1]},
    ]
    of_lines = read(write_lines(tmp_path / "p.jsonl", *objects))
    of_objects = make_prompts(objects, sampling=SAMPLING)
    for line, one in zip(of_lines, of_objects, strict=True):
        for key in ("index", "id", "text", "reference", "sampling", "chat", "prompt_id"):
            assert getattr(line, key) == getattr(one, key)
        assert bool(line.error) == bool(one.error)
    assert [prompt.id for prompt in of_objects] == ["line-1", "7", "7#1", "line-3", "bad", "line-5", "line-6"]
    assert of_objects[4].error == "prompts[3]: max_tokens: Expected `int` >= 1"


def test_objects_may_hold_numbers_of_numpy_and_what_json_cannot_hold_is_an_error():
    array, scalars, no_json, huge = make_prompts(
        [{"tokens": np.array([5, 6])}, {"tokens": [np.int64(5)]}, {"id": "s", "prompt": 1j}, {"tokens": [2**70]}],
        sampling=SAMPLING,
    )
    assert (array.tokens.tolist(), scalars.tokens.tolist()) == ([5, 6], [5])
    assert (no_json.id, no_json.error) == ("s", "prompts[2]: holds a complex, which is no JSON")
    assert huge.error


def test_a_line_overrides_sampling(tmp_path):
    path = write_lines(
        tmp_path / "p", {"prompt": "a", "temperature": 0.5, "stop": ["\n"], "seed": 3, "ignore_eos": True}
    )
    assert read(path)[0].sampling == Sampling(max_tokens=7, temperature=0.5, stop=("\n",), seed=3, ignore_eos=True)


def test_messages_are_kept_as_they_are(tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "1 < 2 é\0", "name": None}, {"role": "x", "parts": [{"a": 1.5}]}],
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    path = write_lines(tmp_path / "p", chat, {"messages": [{"role": "user"}]}, {"prompt": "a"})
    first, second, third = read(path, strict=True)
    assert (first.text, first.tokens, third.chat) == (None, None, None)
    kept = {"messages": chat["messages"], "tools": chat["tools"], "template_kwargs": chat["chat_template_kwargs"]}
    assert json.loads(first.chat) == kept
    assert json.loads(second.chat) == {"messages": [{"role": "user"}], "tools": None, "template_kwargs": {}}


ANY_LINE = st.sampled_from(
    [
        b'{"tokens": [5, 7]}',
        b'{"id": "a", "prompt": "12+34=", "reference": "46"}',
        b'{"id": 7, "tokens": [0], "group": "g"}',
        b'{"prompt": ""}\r',
        b'{"prompt": "x", "temperature": 0.5, "n": 2}',
        b'{"messages": [{"role": "user"}]}',
        b'{"tokens": [1], "metadata": {"a": 1}}',
        b'{"id": "a", "tokens": [2]}',
        b'{"tokens": [-1]}',
        b'{"id": 3}',
        b'{"prompt": "a", "tokens": [1]}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a"} {"prompt": "b"}',
        b'{"tokens":',
        b"[5]}",
        b"  ",
        b"",
    ]
)


@given(lines=st.lists(ANY_LINE, max_size=9), num_bytes=st.integers(1, 200), limit=st.integers(20, 60))
def test_lines_that_are_decoded_together_become_the_same_prompts_as_one_by_one(
    tmp_path_factory, lines, num_bytes, limit
):
    path = tmp_path_factory.mktemp("p") / "p"
    path.write_bytes(b"\n".join([*lines, b'{"tokens": [3]}']))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "_LINES_BYTES", num_bytes)
        patch.setattr(prompts, "MAX_LINE_BYTES", limit)
        together = read(path)
        patch.setattr(prompts, "_plain_prompts", lambda *_: None)
        patch.setattr(prompts, "_LINES_BYTES", 1 << 20)
        one_by_one = read(path)
    for prompt, expected in zip(together, one_by_one, strict=True):
        found, wanted = msgspec.structs.asdict(prompt), msgspec.structs.asdict(expected)
        np.testing.assert_array_equal(found.pop("tokens"), wanted.pop("tokens"))
        assert found == wanted


BAD_LINES = [
    (b"not json", "JSON is malformed"),
    (b'{"prompt": "a"} {"prompt": "b"}', "trailing"),
    (b'{"id": "bad", "prompt": "a', ""),
    (b'["a"]', "Expected `object`, got `array`"),
    (b'{"id": "bad"}', "give either prompt, tokens or messages"),
    (b'{"id": "bad", "prompt": "a", "tokens": [1]}', "give either prompt, tokens or messages"),
    (b'{"id": "bad", "prompt": "a", "messages": [{"role": "user"}]}', "give either prompt, tokens or messages"),
    (b'{"id": "bad", "messages": []}', "messages: Expected `array` of length >= 1"),
    (b'{"id": "bad", "messages": {"role": "user"}}', "messages: Expected `array | null`, got `object`"),
    (b'{"id": "bad", "messages": ["hi"]}', "messages[0]: Expected `object`, got `str`"),
    (b'{"id": "bad", "messages": [{"role": "user"}, {"content": "a"}]}', "messages[1]: has no role"),
    (b'{"id": "bad", "messages": [{"role": 3}]}', "messages[0]: has no role"),
    (b'{"id": "bad", "messages": [{"role": "user"}], "tools": {}}', "tools: Expected `array | null`, got `object`"),
    (b'{"id": "bad", "messages": [{"role": "user"}], "chat_template_kwargs": []}', "chat_template_kwargs: Expected"),
    (b'{"id": "bad", "messages": [{"role": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"id": "bad", "prompt": "a", "tools": []}', "tools and chat_template_kwargs are for a prompt of messages"),
    (b'{"id": "bad", "tokens": [1], "chat_template_kwargs": {}}', "are for a prompt of messages"),
    (b'{"id": "bad", "prompt": "a", "stop_token_ids": [-1]}', "stop_token_ids[0]: Expected `int` >= 0"),
    (b'{"id": "bad", "prompt": 3}', "prompt: Expected `str | null`, got `int`"),
    (b'{"id": 1.5, "prompt": "a"}', "id: Expected"),
    (b'{"id": true, "prompt": "a"}', "id: Expected"),
    (b'{"id": "bad", "prompt": "a", "metadata": []}', "metadata: Expected `object`"),
    (b'{"id": "bad", "prompt": "a", "metadata": {"a": "\\ud800"}}', ""),
    (b'{"id": "bad", "prompt": "a", "metadata": {"a": "\xff"}}', ""),
    (b'{"id": "bad", "prompt": "a", "metadata": {"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", ""),
    (b'{"id": "bad", "prompt": "a", "repetition_penalty": 1e-40}', "repetition_penalty: Expected `float` >= 1e-06"),
    (b'{"id": "bad", "prompt": "a", "presence_penalty": 2.5}', "presence_penalty: Expected `float` <= 2"),
    (b'{"id": "bad", "prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"id": "bad", "prompt": "a", "n": 0}', "n: Expected `int` >= 1"),
    (b'{"id": "", "prompt": "a"}', "id: Expected `str` of length >= 1"),
    (b'{"id": "bad", "prompt": "a", "reference": ""}', "reference: Expected `str` of length >= 1"),
    (b'{"id": "bad", "tokens": []}', "tokens: Expected `array` of length >= 1"),
    (b'{"id": "bad", "tokens": [1, -1]}', "tokens[1]: Expected `int` >= 0"),
    (b'{"id": "bad", "tokens": [2147483648]}', "tokens[0]: Expected `int` <= 2147483647"),
    (b'{"id": "bad", "tokens": [1.5]}', "tokens[0]: Expected `int`, got `float`"),
    (b'{"id": "bad", "prompt": "a", "temprature": 1.0}', "unknown key temprature; did you mean temperature?"),
    (b'{"id": "bad", "promt": "a"}', "unknown key promt; did you mean prompt?"),
    (b'{"id": "bad", "prompt": "a", "zzzzzz": 1}', "unknown key zzzzzz; known keys are id, prompt, tokens"),
    (b'{"id": "bad", "prompt": "a", "temperature": NaN}', "malformed"),
    (b'{"id": "bad", "prompt": "a", "top_logprobs": 21}', "top_logprobs: 21 is more than 20; raise sampling.top_lo"),
    (b'{"id": "bad", "prompt": "a", "temperature": 1e999}', "out of range"),
    (b'{"id": "bad", "prompt": "a", "temperature": -1}', "temperature: Expected `float` >= 0"),
    (b'{"id": "bad", "prompt": "a", "top_p": 0}', "top_p: Expected `float` > 0"),
    (b'{"id": "bad", "prompt": "a", "max_tokens": null}', "max_tokens: Expected `int`, got `null`"),
    (b'{"id": "bad", "prompt": "\\ud800"}', ""),
    (b'{"id": "bad", "prompt": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, ""),
    (b'{"id": "bad", "prompt": ' + b'{"a":' * 100_000, ""),
    (b'{"id": "bad", "prompt": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "unknown key deep"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_becomes_an_error_and_the_others_are_read(tmp_path, line, message):
    path = write_lines(tmp_path / "p.jsonl", b"", {"id": "a", "prompt": "b"}, line, {"id": "c", "prompt": "d"})
    before, bad, after = read(path)
    assert (before.id, after.id, after.index) == ("a", "c", 2)
    assert bad.error.startswith(f"{path}:3: ")
    assert message in bad.error
    assert len(bad.error) < len(str(path)) + 400
    assert (bad.index, bad.text, bad.tokens) == (1, None, None)
    assert bad.id in ("bad", "line-3")
    with pytest.raises(DataError, match=r"p\.jsonl:3: "):
        read(path, strict=True)


def test_a_bad_line_keeps_its_id(tmp_path):
    path = write_lines(tmp_path / "p", {"id": "a", "prompt": 3}, {"id": "a", "prompt": "b"})
    assert [(prompt.id, bool(prompt.error)) for prompt in read(path)] == [("a", True), ("line-2", True)]


@pytest.mark.parametrize(("of_job", "limit"), [(0, 20), (5, 20), (30, 30), (2**40, 2**40)])
def test_no_line_widens_the_columns_of_all_requests(tmp_path, of_job, limit):
    """The results have as many likeliest tokens at each token as the request that wants most."""
    path = write_lines(tmp_path / "p", *({"prompt": "a", "top_logprobs": number} for number in (0, limit, limit + 1)))
    prompts, counts = read_prompts(path, sampling=Sampling(top_logprobs=of_job), strict=False, folder=tmp_path)
    assert counts.top_logprobs == max(limit, of_job)
    assert [bool(prompt.error) for prompt in prompts] == [False, False, True]
    assert max(prompt.sampling.top_logprobs for prompt in prompts) == max(limit, of_job)


@pytest.mark.parametrize(
    "lines",
    [[{"k" * (1 << 20): 1}], [{"`" * (1 << 20): 1}], [{"id": "i" * (1 << 20), "prompt": "a"}] * 2],
    ids=["key", "quotes", "id"],
)
def test_an_error_shows_the_beginning_of_a_long_name(tmp_path, lines):
    error = read(write_lines(tmp_path / "p", *lines))[-1].error
    assert error
    assert len(error) < 1000


def test_the_later_of_two_equal_ids_is_bad(tmp_path):
    path = write_lines(
        tmp_path / "p", {"id": "a", "prompt": "1"}, {"id": "b", "prompt": "2"}, {"id": "a", "prompt": "3"}
    )
    found = read(path)
    assert [prompt.id for prompt in found] == ["a", "b", "line-3"]
    assert found[2].error == f"{path}:3: id 'a' was used before, at {path}:1"


def test_a_huge_line_is_an_error_and_memory_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_LINE_BYTES", 100)
    exact = b'{"prompt": "' + b"x" * 86 + b'"}'
    assert len(exact) == 100
    path = write_lines(
        tmp_path / "p", exact, exact + b" ", b"y" * 1000, b"z" * 202, {"id": "last", "prompt": "a"}, b"w" * 500
    )
    found = read(path)
    assert [bool(prompt.error) for prompt in found] == [False, True, True, True, False, True]
    assert "longer than" in found[2].error
    assert (found[4].id, found[5].id) == ("last", "line-6")


@pytest.mark.parametrize(("id_length", "most"), [(5, 1024), (100_000, 11)])
def test_samples_are_made_a_few_at_a_time(tmp_path, id_length, most):
    path = write_lines(tmp_path / "p", *({"id": f"{i}".zfill(id_length), "prompt": "", "n": 1024} for i in range(3)))
    blocks = list(prompts.find_prompts(path, sampling=SAMPLING, repeated=()))
    assert max(map(len, blocks)) <= most
    found = [prompt.index for block in blocks for prompt in block]
    assert found == list(range(3 * 1024))


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "p"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n  \r\n{"prompt": "b"}\r\n')
    assert [(prompt.text, prompt.id) for prompt in read(path, strict=True)] == [("a", "line-1"), ("b", "line-3")]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "empty").write_bytes(content)
    with pytest.raises(DataError, match="empty: has no prompts"):
        read(tmp_path / "empty")


def test_missing_files(tmp_path):
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(NoInputError, match="cannot be read"):
            read(missing)


def test_a_number_as_id_is_its_text(tmp_path):
    path = write_lines(tmp_path / "p", {"id": 7, "prompt": "a"}, {"id": "8", "prompt": "b"}, {"id": 8, "prompt": "c"})
    assert [(prompt.id, bool(prompt.error)) for prompt in read(path)] == [("7", False), ("8", False), ("line-3", True)]


def test_metadata_stays_as_it_was_written(tmp_path):
    metadata = b'{"b": 1.0, "a" : [12345678901234567890, 1e-7, null],  "\\u00e9": {}}'
    path = write_lines(
        tmp_path / "p", b'{"prompt": "a", "metadata": ' + metadata + b" }", b'{"prompt": "a", "metadata": null}'
    )
    assert [prompt.metadata for prompt in read(path, strict=True)] == [metadata.decode(), None]


def test_samples_are_requests_of_their_own(tmp_path):
    path = write_lines(
        tmp_path / "p", {"id": "a", "prompt": "x", "n": 3}, {"prompt": "y"}, {"id": "a#1", "prompt": "z"}
    )
    found = read(path)
    assert [(prompt.index, prompt.id, prompt.prompt_id, prompt.text) for prompt in found] == [
        (0, "a", None, "x"),
        (1, "a#1", "a", "x"),
        (2, "a#2", "a", "x"),
        (3, "line-2", None, "y"),
        (4, "line-3", None, None),
    ]
    assert "'a#1' was used before" in found[4].error


@given(line=st.binary(max_size=60))
def test_any_bytes_make_a_prompt_or_an_error(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line)
    assert read(path)[0].text == "a"


@given(text=st.text(), name=st.text(min_size=1))
def test_any_text_is_read_as_written(tmp_path_factory, text, name):
    path = write_lines(tmp_path_factory.getbasetemp() / "text.jsonl", {"id": name, "prompt": text})
    found = read(path, strict=True)[0]
    assert (found.id, found.text) == (name, text)


@pytest.mark.parametrize(
    "lines",
    [
        [{"id": "x" * 50_000, "prompt": "a"}, {"id": "x" * 50_000, "prompt": "b"}],
        [{"prompt": "a"}, {"prompt": "b", "k" * 50_000: 1}],
    ],
)
def test_an_error_names_file_and_line_and_is_short(tmp_path, lines):
    path = write_lines(tmp_path / "p.jsonl", *lines)
    bad = read(path)[1]
    assert bad.error.startswith(f"{path}:2: ")
    assert len(bad.error) <= MAX_LINE_LENGTH


def write_arrays(path, rows, *, ids=None, dtype=np.int32):
    with h5py.File(path, "w") as file:
        file["values"] = np.array([token for row in rows for token in row], dtype)
        file["offsets"] = np.cumsum([0, *(len(row) for row in rows)])
        if ids is not None:
            file["id"] = ids
    return path


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.uint32, np.uint64, ">i4"])
def test_token_arrays(tmp_path, dtype):
    found = read(write_arrays(tmp_path / "p.h5", [[1, 2], [300]], dtype=dtype), strict=True)
    assert [prompt.tokens.tolist() for prompt in found] == [[1, 2], [300]]
    assert [(prompt.id, prompt.index) for prompt in found] == [("row-0", 0), ("row-1", 1)]
    assert all(prompt.tokens.dtype == np.int32 and prompt.sampling is SAMPLING for prompt in found)


@pytest.mark.parametrize(("ids", "expected"), [([7, 8], ["7", "8"]), (np.array(["é".encode(), b"b"]), ["é", "b"])])
def test_token_arrays_with_ids(tmp_path, ids, expected):
    found = read(write_arrays(tmp_path / "p.h5", [[1], [2]], ids=ids))
    assert [prompt.id for prompt in found] == expected


def test_bad_rows_become_errors_and_the_others_are_read(tmp_path):
    ids = np.array([b"a", b"empty", b"low", b"high", b"", b"\xff", b"a", b"z"])
    path = write_arrays(tmp_path / "p.h5", [[1], [], [-1], [2**31], [1], [1], [1], [5]], ids=ids, dtype=np.int64)
    found = read(path)
    assert [bool(prompt.error) for prompt in found] == [False, *[True] * 6, False]
    assert [prompt.id for prompt in found] == ["a", "empty", "low", "high", "row-4", "row-5", "row-6", "z"]
    assert found[1].error == f"{path}: row 1: has no tokens"
    with pytest.raises(DataError, match="row 1"):
        read(path, strict=True)


def test_token_arrays_without_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no prompts"):
        read(write_arrays(tmp_path / "p.h5", []))


def rewrite(name, value):
    def change(file):
        del file[name]
        if value is not None:
            file[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        rewrite("values", None),
        rewrite("offsets", None),
        rewrite("offsets", np.array([0, 2])),
        rewrite("offsets", np.array([1, 2, 3])),
        rewrite("offsets", np.array([0, 4, 3])),
        rewrite("offsets", np.zeros(0, np.int64)),
        rewrite("offsets", np.array([0.0, 2.0, 3.0])),
        rewrite("values", np.zeros((3, 1), np.int32)),
        rewrite("values", h5py.ExternalLink("elsewhere.h5", "/values")),
        rewrite("id", ["a", "b"]),
        rewrite("id", np.arange(3)),
    ],
)
def test_arrays_of_another_format_are_refused(tmp_path, change):
    path = write_arrays(tmp_path / "p.h5", [[1, 2], [3]], ids=[1, 2])
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=str(path)):
        read(path)


def test_a_damaged_hdf5_file_is_refused(tmp_path):
    path = write_arrays(tmp_path / "p.h5", [[1, 2], [3]])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=str(path)):
        read(path)
