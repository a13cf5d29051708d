"""Prompts in the forms that people have: each is found, and gives the prompts that lines of JSON would give."""

import csv
import gzip
import io
import json
import tempfile
import tracemalloc
from contextlib import suppress
from importlib.util import find_spec

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.config.job import Sampling
from moempi.errors import ConfigError, DataError, NoInputError
from moempi.storage import prompts as prompts_module
from moempi.storage.openai_batch import CHAT, COMPLETIONS
from moempi.storage.prompt_file import read_prompts
from moempi.storage.prompt_form import PromptForm, find_form, open_decompressed

SAMPLING = Sampling(max_tokens=7)
NEEDS_ZSTD = pytest.mark.skipif(
    not any(find_spec(name.split(".")[0]) and find_spec(name) for name in ("compression.zstd", "backports.zstd")),
    reason="this Python reads no zstd",
)


def read(path, *, column="", strict=True):
    folder = tempfile.gettempdir()
    return list(read_prompts(path, sampling=SAMPLING, strict=strict, folder=folder, column=column)[0])


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def batch(body, *, url=COMPLETIONS, **fields):
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | fields


def batch_file(tmp_path, *lines):
    return write(tmp_path / "batch.jsonl", "\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("p.jsonl", b'{"prompt": "a"}', PromptForm("jsonl")),
        ("p", b"a question", PromptForm("jsonl")),
        ("p.jsonl", b'not json\n\n{"custom_id": "a", "body": {}}', PromptForm("openai")),
        ("p.txt", b"a question\n", PromptForm("text")),
        ("stdin", b"a question\n", PromptForm("text")),
        ("p.txt", b'\xef\xbb\xbf{"prompt": "a"}\n', PromptForm("jsonl")),
        ("p.csv", b"prompt\na", PromptForm("csv")),
        ("p.parquet", b"PAR1", PromptForm("parquet")),
        ("p.txt.gz", gzip.compress(b"a question", mtime=0), PromptForm("text", "gzip")),
        ("p.jsonl", gzip.compress(b'{"custom_id": 1, "body": {}}', mtime=0), PromptForm("openai", "gzip")),
    ],
)
def test_the_form_is_found_by_content_and_name(tmp_path, name, content, form):
    assert find_form(write(tmp_path / name, content)) == form


def test_a_column_makes_a_file_a_table(tmp_path):
    assert str(find_form(write(tmp_path / "p", b"a,b\n1,2"), column="b")) == "CSV"


# Text and tables


def test_each_line_of_a_text_file_is_a_prompt(tmp_path):
    found = read(write(tmp_path / "p.txt", "\ufefffirst \r\n\n  {second}\nthird"))
    assert [(prompt.id, prompt.text) for prompt in found] == [
        ("line-1", "first "),
        ("line-3", "  {second}"),
        ("line-4", "third"),
    ]


def test_a_line_of_text_that_is_not_utf_8_is_an_error_of_its_own(tmp_path):
    found = read(write(tmp_path / "p.txt", b"a\n\xff\nc"), strict=False)
    assert [bool(prompt.error) for prompt in found] == [False, True, False]
    assert found[1].error.endswith("p.txt:2: not UTF-8")


def test_a_csv_file_gives_its_column_with_ids_and_references(tmp_path):
    text = 'id,question,reference,other\n7,"a ""b"",\r\nc",r,x\n,plain,,\n'
    found = read(write(tmp_path / "p.csv", text), column="question")
    assert [(prompt.id, prompt.text, prompt.reference) for prompt in found] == [
        ("7", 'a "b",\r\nc', "r"),
        ("row-1", "plain", None),
    ]


def test_a_csv_file_without_the_column_names_the_ones_it_has(tmp_path):
    path = write(tmp_path / "p.csv", "id,question\n1,2\n")
    with pytest.raises(DataError, match="has no column 'prompt' but id, question; name one as input"):
        read(path)


def test_bad_rows_of_a_csv_file_are_errors_of_their_own(tmp_path):
    found = read(write(tmp_path / "p.csv", b"id,prompt\n1,a\n2\n3,\xff\n4,d\n"), strict=False)
    assert [bool(prompt.error) for prompt in found] == [False, True, True, False]
    assert "row 1: give either prompt" in found[1].error
    assert found[2].error.endswith("row 2: not UTF-8")


@pytest.mark.parametrize(
    "content",
    [
        b'prompt\n"' + b"x" * 300,
        b"prompt\na\rb\n",
        b"prompt,reference\n" + b"x" * 60 + b"," + b"y" * 60 + b"\n",  # each field is short
    ],
)
def test_a_file_that_is_not_csv_is_refused(tmp_path, content, monkeypatch):
    monkeypatch.setattr(prompts_module, "MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match=r"p\.csv:\d+: is not CSV"):
        read(write(tmp_path / "p.csv", content))


def test_a_parquet_file_gives_text_tokens_ids_and_errors(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"id": [1, 2, 3], "text": ["a \0 \U0001f9ee", None, ""], "tokens": [[5, 6], [7], []]}
    parquet.write_table(arrow.table(table), tmp_path / "p.parquet")
    found = read(tmp_path / "p.parquet", column="text", strict=False)
    assert [(prompt.id, prompt.text, bool(prompt.error)) for prompt in found] == [
        ("1", "a \0 \U0001f9ee", False),
        ("2", None, True),
        ("3", "", False),
    ]
    found = read(tmp_path / "p.parquet", column="tokens", strict=False)
    assert [prompt.tokens is not None and prompt.tokens.tolist() for prompt in found] == [[5, 6], [7], False]
    (tmp_path / "p.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "p.parquet", column="text")


@pytest.mark.skipif(bool(find_spec("pyarrow")), reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tmp_path):
    with pytest.raises(ConfigError, match="needs pyarrow: bash jobs/setup"):
        read(write(tmp_path / "p.parquet", b"PAR1"))


# Compression


def zstd_compress(content):
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return __import__(name, fromlist=["compress"]).compress(content)
        except ImportError:
            continue
    return b""


COMPRESSIONS = [pytest.param(gzip.compress, id="gzip"), pytest.param(zstd_compress, id="zstd", marks=NEEDS_ZSTD)]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_compressed_files_are_read_also_in_several_members(tmp_path, compress):
    content = compress(b'{"prompt": "a"}\n') + compress(b'{"prompt": "b"}\n')
    assert [prompt.text for prompt in read(write(tmp_path / "p.jsonl", content))] == ["a", "b"]


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("change", [lambda content: content[:-6], lambda content: content[:-6] + b"123456"])
def test_a_damaged_or_cut_compressed_file_is_refused(tmp_path, compress, change):
    lines = b"".join(b'{"prompt": "%d"}\n' % (number * 7919) for number in range(200_000))
    with pytest.raises(DataError, match="its compression is damaged"):
        read(write(tmp_path / "p.jsonl", change(compress(lines))))


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_line_that_decompresses_to_much_is_an_error_and_memory_stays_bounded(tmp_path, compress, monkeypatch):
    monkeypatch.setattr(prompts_module, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path / "p.jsonl", compress(b" " * (50 << 20) + b'\n{"prompt": "a"}'))
    tracemalloc.start()
    found = read(path, strict=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(prompt.id, bool(prompt.error)) for prompt in found][-1] == ("line-2", False)
    assert most < 16 << 20


def test_a_binary_file_inside_a_compression_is_refused(tmp_path):
    with pytest.raises(DataError, match="is Parquet inside gzip; decompress it first"):
        read(write(tmp_path / "p.parquet", gzip.compress(b"PAR1", mtime=0)))


def test_a_compressed_file_that_cannot_be_read(tmp_path):
    with pytest.raises(NoInputError), open_decompressed(tmp_path / "missing", "gzip"):
        pass


# OpenAI's batch API

TURN = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "x"}, {}),
        ({"prompt": ["x"]}, {}),
        ({"prompt": "x", "model": "m", "user": "u", "stream": False, "echo": None, "best_of": 1, "store": False}, {}),
        ({"prompt": "x", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 4}, None),
        ({"prompt": "x", "presence_penalty": 1.5, "frequency_penalty": -1, "n": 1, "min_tokens": 2}, None),
        ({"prompt": "x", "stop": "a"}, {"stop": ("a",)}),
        ({"prompt": "x", "stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"prompt": "x", "logprobs": 3}, {"top_logprobs": 3}),
        ({"prompt": "x", "logprobs": 0}, {"top_logprobs": 1}),
        ({"prompt": "x", "logit_bias": {"5": -100, "6": 1.5}}, {"logit_bias": {5: -100.0, 6: 1.5}}),
        ({"prompt": "x", "temperature": None, "stop": None, "max_tokens": None}, {}),
    ],
)
def test_fields_of_a_completion_become_keys_of_a_prompt(tmp_path, body, expected):
    (prompt,) = read(batch_file(tmp_path, batch(body)))
    if expected is None:
        expected = {key: value for key, value in body.items() if key != "prompt"}
    assert (prompt.id, prompt.text) == ("a", "x")
    assert prompt.sampling == msgspec.structs.replace(SAMPLING, **expected)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_completion_tokens": 4, "max_tokens": 5}, {"max_tokens": 4}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"logprobs": True, "top_logprobs": 3}, {"top_logprobs": 3}),
        ({"logprobs": True}, {"top_logprobs": 1}),
        ({"logprobs": True, "top_logprobs": 0}, {"top_logprobs": 1}),
        ({"logprobs": False}, {"top_logprobs": 0}),
        ({"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto"}, {}),
    ],
)
def test_fields_of_a_chat_become_keys_of_a_prompt(tmp_path, body, expected):
    (prompt,) = read(batch_file(tmp_path, batch({"messages": TURN} | body, url=CHAT)))
    assert "hi" in prompt.chat.decode()
    assert prompt.sampling == msgspec.structs.replace(SAMPLING, **expected)


def test_tokens_metadata_and_samples_of_a_batch(tmp_path):
    lines = [
        batch({"prompt": [5, 6], "metadata": {"k": "v"}}),
        batch({"prompt": [[7]], "n": 2}, custom_id="b"),
        batch({"prompt": "y"}, custom_id=3),
    ]
    found = read(batch_file(tmp_path, *lines))
    assert [prompt.id for prompt in found] == ["a", "b", "b#1", "3"]
    assert [prompt.tokens is not None and prompt.tokens.tolist() for prompt in found] == [[5, 6], [7], [7], False]
    assert found[0].metadata == '{"k":"v"}' or json.loads(found[0].metadata) == {"k": "v"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (batch({"prompt": "x", "stream": True}), "body.stream: not supported"),
        (batch({"prompt": "x", "suffix": "y", "echo": True}), "body.suffix, body.echo: not supported"),
        (batch({"prompt": "x", "best_of": 2}), "body.best_of: not supported"),
        (batch({"prompt": "x", "messages": TURN}), "body.messages: not supported"),
        (batch({"messages": TURN, "response_format": {"type": "json_object"}}, url=CHAT), "body.response_format: not"),
        (batch({"messages": TURN, "audio": {}, "logprobs": True}, url=CHAT), "body.audio: not supported"),
        (batch({"prompt": ["x", "y"]}), "body.prompt: holds 2 prompts"),
        (batch({"prompt": "x", "temperature": -1}), "temperature: Expected `float` >= 0"),
        (batch({"prompt": "x", "seed": -1}), "seed: Expected `int` >= 0"),
        (batch({"prompt": "x", "n": 0}), "n: Expected `int` >= 1"),
        (batch({"prompt": "x", "logprobs": "all"}), "top_logprobs: Expected"),
        (batch({"prompt": "x", "id": "mine"}), "body.id: not supported"),
        (batch({"prompt": "x"}, url="/v1/embeddings"), "url: Invalid enum value"),
        (batch({"prompt": "x"}, method="GET"), "method: Invalid enum value"),
        (batch({"model": "m"}), "give either prompt, tokens or messages"),
        (batch([]), "body: Expected `object`"),
        ({"custom_id": "a", "url": COMPLETIONS}, "missing required field `body`"),
        ({"id": "a", "prompt": "x"}, "missing required field `custom_id`"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_of_that_line_alone(tmp_path, line, message):
    good = [batch({"prompt": "x"}, custom_id=name) for name in ("first", "last")]
    found = read(batch_file(tmp_path, good[0], line, good[1]), strict=False)
    assert [bool(prompt.error) for prompt in found] == [False, True, False]
    assert message.lower() in found[1].error.lower()
    assert (found[1].id, found[1].index) == ("a", 1)


# Any text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def csv_bytes(text):
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["prompt"], [text]])
    return written.getvalue().encode()


@given(text=TEXT)
def test_any_text_is_read_as_written_in_every_form(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    files = {"any.jsonl": json.dumps({"prompt": text}), "any.csv": csv_bytes(text)}
    files["any-batch.jsonl"] = json.dumps(batch({"prompt": text}))
    files["any.jsonl.gz"] = gzip.compress(json.dumps({"prompt": text}, ensure_ascii=False).encode())
    if text.strip() and not set("\r\n") & set(text) and not text.startswith(("\ufeff", "{")):
        files["any.txt"] = text
    for name, content in files.items():
        assert [prompt.text for prompt in read(write(folder / name, content))] == [text], name


@given(content=st.binary(max_size=80), name=st.sampled_from(["a.csv", "a.txt", "a.jsonl", "a.jsonl.gz"]))
def test_any_bytes_give_prompts_or_one_error(tmp_path_factory, content, name):
    path = write(tmp_path_factory.getbasetemp() / name, content)
    with suppress(DataError, ConfigError):  # the latter without zstd
        assert read(path, strict=False)


@given(line=st.binary(max_size=80))
def test_any_line_of_a_batch_is_a_prompt_or_an_error(tmp_path_factory, line):
    first = json.dumps(batch({"prompt": "x"})).encode()
    found = read(write(tmp_path_factory.getbasetemp() / "lines.jsonl", first + b"\n" + line), strict=False)
    assert found[0].text == "x"
