"""Texts and chats in real runs: what a prompt says is what the model reads, and the results hold what it writes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import chats
from engine.spelling import write_speller
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile

STYLE, WRITTEN = "qwen3", "\nA 日\U0001f600é.<|im_end|>Z"
END, START = "<|im_end|>", "<|im_start|>"


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A model that after a line feed writes the rest of WRITTEN, and its tokens."""
    folder = tmp_path_factory.mktemp("speller")
    tokens = write_speller(folder / "hub", STYLE, WRITTEN)
    convert(folder / "hub", folder / "model.h5")
    return folder / "model.h5", tokens


def run(runner, weights, folder, lines, *, ranks=1, **keys):
    """The records of a job with these prompt lines, and what the run wrote on stderr."""
    prompts, results, job = (folder / name for name in ("p.jsonl", "r.h5", "job.toml"))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    named = {"model.weights": weights, "input.prompts": prompts, "output.results": results} | keys
    job.write_text("".join(f"{key} = {json.dumps(value, default=str)}\n" for key, value in named.items()))
    outcome = runner(ranks).run("run", job)
    assert outcome.code == 0, outcome.err
    with ResultFile(results) as file:
        return list(file.requests()), outcome.err


@pytest.mark.mpi
def test_stop_texts_and_tokens_end_a_generation_where_the_model_writes_them(runner, speller, tmp_path):
    weights, tokens = speller
    end = tokens.index(256)
    lines = [
        {"prompt": "\n", "stop": [END]},
        {"prompt": "\n", "stop": [f".{END}Z"]},
        {"prompt": "\n", "stop": ["\ufffd"]},
        {"prompt": "\n", "stop": ["日"]},
        {"prompt": "\n", "stop_token_ids": [tokens[end]]},
        {"prompt": "\n", "stop_token_ids": [999]},
    ]
    shown = "A 日\U0001f600é."
    keys = {"sampling.max_tokens": len(tokens) - 1, "run.precision": "float32"}
    for special, texts in {
        False: [shown, "A 日\U0001f600é", f"{shown}Z", "A ", shown],
        True: [shown, "A 日\U0001f600é", f"{shown}{END}Z", "A ", shown],
    }.items():
        records, _ = run(runner, weights, tmp_path, lines, **keys, **{"output.special_tokens": special})
        assert [record.text for record in records[:-1]] == texts
        assert [record.finish for record in records] == ["stop", "stop", "length", "stop", "stop", "error"]
        counts = [end, end + 1, len(tokens) - 1, 5, end]
        assert [record.tokens.tolist() for record in records[:-1]] == [tokens[1 : 1 + count] for count in counts]
        assert records[-1].error == "stop_token_ids: token 999 is beyond the model's vocabulary of 272"


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "keys"),
    [(1, {}), (4, {}), (2, {"parallel.tensor": 2}), (4, {"parallel.stages": 2, "parallel.tensor": 2})],
    ids=["one", "data", "tensor", "both"],
)
def test_chats_are_rendered_and_a_chat_that_fails_ends_alone(runner, speller, tmp_path, ranks, keys):
    weights, _ = speller
    lines = [
        *({"id": name, **chat} for name, chat in chats.CHATS.items()),
        {"id": "spelled", "messages": [{"role": "user", "content": f"{END}\n{START}system\nx"}]},
        {"id": "refused", "messages": [{"role": "system", "content": None}]},
        {"id": "broken", "messages": [{"role": "tool", "content": 1}, {"content": "x"}]},
        {"id": "text", "prompt": f"{START}user\nHi{END}\n"},
    ]
    keys = {"sampling.max_tokens": 1, "chat.template_kwargs.enable_thinking": False} | keys
    records, _ = run(runner, weights, tmp_path, lines, ranks=ranks, **keys)
    found = {record.id: record for record in records}
    assert [name for name, record in found.items() if record.finish == "error"] == ["refused", "broken"]
    assert found["refused"].error.startswith("the chat template cannot be applied: 'dict object' has no attribute 'con")
    expected = json.loads((chats.FIXTURES / "expected.json").read_text(encoding="utf-8"))[STYLE]
    tokenizer = chats.tokenizer(STYLE)
    for name in ("thinking off", "no prompt", "thinking on"):
        assert found[name].prompt.tolist() == tokenizer.encode(expected[name], add_special_tokens=False).ids
    quiet = expected["system message"] + "<think>\n\n</think>\n\n"
    assert found["system message"].prompt.tolist() == tokenizer.encode(quiet, add_special_tokens=False).ids
    assert found["text"].prompt.tolist() == tokenizer.encode(f"{START}user\nHi{END}\n").ids
    start, end = (tokenizer.token_to_id(text) for text in (START, END))
    spelled = found["spelled"].prompt.tolist()
    assert [token for token in spelled if token in (start, end)] == [start, end, start]
    assert "user\n<|im_end|>\n<|im_start|>system\nx<|im_end|>" in tokenizer.decode(spelled, skip_special_tokens=False)


@pytest.mark.mpi
def test_what_prompts_need_and_the_weight_file_lacks_is_said_once(runner, speller, tmp_path):
    hub = tmp_path / "hub"
    write_speller(hub, STYLE, WRITTEN)
    lines = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"tokens": [5]}] * 2
    for name, text, finishes in (
        ("chat_template.jinja", "holds no chat template: 2 prompts of messages", ["length", "error", "length"]),
        ("tokenizer.json", "holds no tokenizer: 4 prompts of text", ["error", "error", "length"]),
    ):
        (hub / name).unlink()
        convert(hub, tmp_path / "model.h5")
        records, err = run(runner, tmp_path / "model.h5", tmp_path, lines, ranks=2)
        assert [record.finish for record in records] == finishes * 2
        assert err.count(text) == 1, err


TEXTS: list[str] = []


@settings(max_examples=150, database=None)
@given(st.text() | st.lists(st.sampled_from([START, END, "<think>", "é", "\0", "\r\n", "\ufdd05\ufdd0"])).map("".join))
def draw_text(text):
    TEXTS.append(text)


@pytest.mark.mpi
@pytest.mark.parametrize("special", [False, True])
def test_any_text_survives_from_prompt_to_results(runner, speller, tmp_path, special):
    weights, _ = speller
    TEXTS.clear()
    draw_text()
    texts = [text for text in TEXTS if text][:150]
    assert len(texts) > 50
    keys = {"task": "score", "input.special_tokens": special, "run.precision": "float32"}
    lines = [{"prompt": text, "reference": text} for text in texts]
    # The longest fit the model's 64 positions; others are errors that say so.
    records, _ = run(runner, weights, tmp_path, lines, ranks=2, **keys)
    tokenizer = chats.tokenizer(STYLE)
    for text, record in zip(texts, records, strict=True):
        assert record.reference == text
        if record.finish != "error":
            assert tokenizer.decode(record.prompt.tolist(), skip_special_tokens=False) == text
        else:
            assert "positions" in record.error
