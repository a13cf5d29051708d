"""A batch of OpenAI's API in a real run has the results of the same prompts as lines of JSON, in and out."""

import json

import pytest

from engine.spelling import write_speller
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile
from mpirun import execute, mpirun, python

STYLE, WRITTEN = "qwen3", "\nA 日\U0001f600é.<|im_end|>Z"
TURN = [{"role": "user", "content": "Hi <|im_end|>"}]
SAMPLED = {"temperature": 1.0, "seed": 3, "max_tokens": 5}
LINES = [
    {"id": "text", "prompt": "\n", "stop": ["é"], "max_tokens": 20, "metadata": {"é": [1]}},
    {"id": "samples", "prompt": "a", "n": 3, "presence_penalty": 1, "top_logprobs": 2, **SAMPLED},
    {"id": "chat", "messages": TURN, "chat_template_kwargs": {"enable_thinking": False}, **SAMPLED},
    {"id": "biased", "tokens": [5], "logit_bias": {"7": 100}, "max_tokens": 2},
    {"id": "refused", "prompt": "a", "max_tokens": 0},
]
BODIES = [
    {"prompt": "\n", "stop": "é", "max_tokens": 20, "metadata": {"é": [1]}, "model": "m", "stream": False},
    {"prompt": ["a"], "n": 3, "presence_penalty": 1, "logprobs": 2, **SAMPLED},
    {"messages": TURN, "chat_template_kwargs": {"enable_thinking": False}, **SAMPLED, "max_completion_tokens": 5},
    {"prompt": [5], "logit_bias": {"7": 100}, "max_tokens": 2},
    {"prompt": "a", "max_tokens": 0},
]


def batch(line, body):
    kind = "chat/completions" if "messages" in body else "completions"
    return {"custom_id": line["id"], "method": "POST", "url": f"/v1/{kind}", "body": body}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speller")
    write_speller(folder / "hub", STYLE, WRITTEN)
    convert(folder / "hub", folder / "model.h5")
    return folder / "model.h5"


def run(weights, folder, lines, *, ranks, options=()):
    folder.mkdir()
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    text = f'model.weights = "{weights}"\ninput.prompts = "{folder}/p.jsonl"\noutput.results = "{folder}/r.h5"\n'
    (folder / "job.toml").write_text(text + 'run.precision = "float32"\n')
    outcome = mpirun(ranks, *python("-m", "moempi", "run", folder / "job.toml", *options))
    assert outcome.code == 0, outcome.err
    with ResultFile(folder / "r.h5") as results:
        return list(results.requests()), outcome


@pytest.mark.mpi
def test_a_batch_has_the_results_of_the_same_prompts_and_is_exported_in_its_own_form(weights, tmp_path):
    expected, _ = run(weights, tmp_path / "lines", LINES, ranks=1)
    found, outcome = run(weights, tmp_path / "batch", map(batch, LINES, BODIES), ranks=3)
    assert "7 requests, 1 of them refused, OpenAI batch" in outcome.err
    assert [record.id for record in found] == ["text", "samples", "samples#1", "samples#2", "chat", "biased", "refused"]
    for one, other in zip(expected, found, strict=True):
        assert (one.id, one.finish, one.text, one.prompt_id) == (other.id, other.finish, other.text, other.prompt_id)
        assert one.prompt.tolist() == other.prompt.tolist()
        assert one.tokens.tolist() == other.tokens.tolist()
    assert found[0].text == "A 日\U0001f600"
    assert len({tuple(record.tokens.tolist()) for record in found[1:4]}) == 3
    assert found[5].tokens.tolist() == [7, 7]
    results, out = tmp_path / "batch/r.h5", tmp_path / "out.jsonl"
    assert execute(*python("-m", "moempi", "export", results, out, "--format", "openai")).code == 0
    text, samples, chat, biased, refused = map(json.loads, out.open(encoding="utf-8"))
    assert [line["custom_id"] for line in (text, samples, chat, biased, refused)] == [line["id"] for line in LINES]
    assert text["response"]["body"]["choices"][0]["text"] == "A 日\U0001f600"
    assert text["response"]["body"]["metadata"] == {"é": [1]}
    assert [choice["index"] for choice in samples["response"]["body"]["choices"]] == [0, 1, 2]
    assert len(samples["response"]["body"]["choices"][2]["logprobs"]["top_logprobs"][4]) in (2, 3)
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == found[4].text
    assert refused["response"] is None
    assert "max_tokens: Expected `int` >= 1" in refused["error"]["message"]


@pytest.mark.mpi
def test_the_defaults_of_sampling_are_those_of_the_checkpoint_but_for_what_the_job_and_its_lines_give(tmp_path):
    write_speller(tmp_path / "hub", STYLE, WRITTEN)
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 3, "eos_token_id": 271}
    (tmp_path / "hub/generation_config.json").write_text(json.dumps(generation))
    convert(tmp_path / "hub", tmp_path / "model.h5")
    lines = [{"id": f"{number}", "prompt": "a", "max_tokens": 4} for number in range(8)]
    found = {}
    for name, given in {
        "model": {"sampling.defaults": "model"},
        "both": {"sampling.defaults": "model", "sampling.temperature": 0.0},
        "same": {"sampling.temperature": 0.7, "sampling.top_k": 3},
        "greedy": {},
    }.items():
        options = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
        records, outcome = run(tmp_path / "model.h5", tmp_path / name, lines, ranks=2, options=options)
        found[name] = [record.tokens.tolist() for record in records]
        assert ("temperature 0.7, top_k 3, top_p 1" in outcome.err) == (name == "model")
    assert found["model"] == found["same"] != found["greedy"]
    assert found["both"] == found["greedy"]
    (tmp_path / "hub/generation_config.json").unlink()
    convert(tmp_path / "hub", tmp_path / "model.h5")
    job = ("run", tmp_path / "model/job.toml", "--set", "sampling.defaults=model")
    assert execute(*python("-m", "moempi", *job)).code == 78
