"""The output lines of `moempi export --format openai` are what the openai package reads."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.storage.export import export
from moempi.storage.export_openai import openai_lines
from storage.test_records import make_request
from storage.test_results import merged

types = pytest.importorskip("openai.types")
chat = pytest.importorskip("openai.types.chat")
CHAT = "/v1/chat/completions"


def exported(folder, records):
    path = merged(folder / "r.h5", records, num_requests=len(records))
    export(path, folder / "out.jsonl", lines=openai_lines)
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "out.jsonl").open(encoding="utf-8")]


def validated(line):
    """The body of an output line, of the package's type; strict, so that no value is converted."""
    assert line.keys() == {"id", "custom_id", "response", "error"}
    kind = {"text_completion": types.Completion, "chat.completion": chat.ChatCompletion}[
        line["response"]["body"]["object"]
    ]
    return kind.model_validate_json(json.dumps(line["response"]["body"]), strict=True)


@pytest.mark.parametrize("endpoint", [None, CHAT])
@pytest.mark.parametrize("top", [0, 2])
def test_a_line_is_a_completion_or_a_chat_completion(tmp_path, endpoint, top):
    record = make_request(0, top=top, text="a \0 \U0001f9ee", endpoint=endpoint, metadata='{"k": "v"}', finish="stop")
    body = validated(*exported(tmp_path, [record]))
    (choice,) = body.choices
    assert (choice.finish_reason, choice.index) == ("stop", 0)
    assert (choice.message.content if endpoint else choice.text) == "a \0 \U0001f9ee"
    usage = body.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 2, 5)
    assert body.created > 0
    if not top:
        assert choice.logprobs is None
    elif endpoint:
        assert [token.logprob for token in choice.logprobs.content] == [-25.0, -25.125]
        assert choice.logprobs.content[1].top_logprobs[1].token == "token_id:303"
    else:
        assert choice.logprobs.tokens == ["token_id:100", "token_id:101"]
        assert choice.logprobs.top_logprobs[0] == {"token_id:300": -50.0, "token_id:301": -50.125}


def test_the_samples_of_a_prompt_are_the_choices_of_one_line_and_a_failed_one_is_an_error(tmp_path):
    records = [
        make_request(0, id="a"),
        make_request(1, id="a#1", prompt_id="a"),
        make_request(2, id="b", num_tokens=0, finish="error", error="p.jsonl:2: bad"),
        make_request(3, id="c", top=1, top_logprobs=np.full((2, 1), -np.inf, np.float32)),
    ]
    several, failed, infinite = exported(tmp_path, records)
    assert [choice.index for choice in validated(several).choices] == [0, 1]
    assert validated(several).usage.completion_tokens == 4
    assert [line["custom_id"] for line in (several, failed, infinite)] == ["a", "b", "c"]
    assert (failed["response"], failed["error"]["message"]) == (None, "p.jsonl:2: bad")
    assert validated(infinite).choices[0].logprobs.top_logprobs[0] == {"token_id:3300": -9999.0}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(text=TEXT, name=TEXT.filter(bool), endpoint=st.sampled_from([None, CHAT]))
def test_any_text_is_what_the_package_reads(tmp_path_factory, text, name, endpoint):
    (line,) = exported(tmp_path_factory.mktemp("any"), [make_request(0, id=name, text=text, endpoint=endpoint)])
    (choice,) = validated(line).choices
    assert (line["custom_id"], choice.message.content if endpoint else choice.text) == (name, text)
