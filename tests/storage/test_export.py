import json

import pytest

from moempi.errors import NoInputError, StorageError
from moempi.storage.export import export
from storage.test_records import make_request
from storage.test_results import merged


def exported(tmp_path, requests):
    path = merged(tmp_path / "r.h5", requests, num_requests=len(requests))
    assert export(path, tmp_path / "out.jsonl") == len(requests)
    return [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]


def test_one_object_per_request(tmp_path):
    requests = [
        make_request(0, top=2, text="nul \0 \U0001f9ee\u2028\n", reference="46", first_token_s=0.5, end_to_end_s=2.0),
        make_request(1, num_prompt=0, num_tokens=0, id="../../x", finish="error", error="p.jsonl:2: bad", text=""),
    ]
    first, second = exported(tmp_path, requests)
    assert first == {
        "id": "request-0",
        "finish": "length",
        "prompt_tokens": 3,
        "text": "nul \0 \U0001f9ee\u2028\n",
        "tokens": [100, 101],
        "logprobs": [-25.0, -25.125],
        "top_tokens": [[300, 301], [302, 303]],
        "top_logprobs": [[-50.0, -50.125], [-50.25, -50.375]],
        "first_token_s": 0.5,
        "end_to_end_s": 2.0,
        "reference": "46",
    }
    assert second == {
        "id": "../../x",
        "finish": "error",
        "error": "p.jsonl:2: bad",
        "prompt_tokens": 0,
        "text": "",
        "tokens": [],
        "logprobs": [],
    }


def test_scores_are_null_where_there_is_no_probability(tmp_path):
    (found,) = exported(tmp_path, [make_request(0, num_tokens=0, score_top=1)])
    assert found["score"] == [None, -62.625, -62.75]
    assert found["score_top_tokens"] == [[600], [601], [602]]


def test_export_of_no_requests(tmp_path):
    assert exported(tmp_path, []) == []


def test_failures_leave_no_file(tmp_path):
    with pytest.raises(NoInputError):
        export(tmp_path / "missing.h5", tmp_path / "out.jsonl")
    path = merged(tmp_path / "r.h5", [make_request(0)], num_requests=1)
    with pytest.raises(StorageError):
        export(path, tmp_path / "no" / "out.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.h5"]
