"""Lines of prompts that the program cannot compute, or that ask for the most it can: each ends alone in a real run."""

import json

import pytest

from moempi.storage.convert import convert
from moempi.storage.results import ResultFile
from mpirun import ROOT, mpirun, python

SUM = {"prompt": "12+30=", "reference": "42"}
LARGE = "x" * (1 << 20)
REFUSED = [
    b"not json",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "1", "seed": ' + b"9" * 5000 + b"}",
    {LARGE: 1},
    {"prompt": ""},
    {"prompt": "1" * 5000},
    {"tokens": []},
    {"tokens": [5] * 100_000},
    *({"tokens": [5, token]} for token in (True, 1.0, -1, 98, 2**31 - 1, 2**63)),
    *(SUM | {"max_tokens": number} for number in (0, 1.0, 2**31)),
    *(SUM | {"seed": seed} for seed in (-1, 2**63, 2**64)),
    *(SUM | {"top_logprobs": number} for number in (-1, 21, 99, 2**63)),
    *(SUM | {"repetition_penalty": penalty} for penalty in (0, -1, 5e-324, 1e-7, 1e7, 1.7e308)),
    *(SUM | {key: penalty} for key in ("presence_penalty", "frequency_penalty") for penalty in (-2.1, 2.1, "1")),
    *(SUM | {"logit_bias": bias} for bias in ({"98": 1}, {"-1": 1}, {"x": 1}, {"5": 101}, {"5": None}, [5])),
    *(SUM | {"n": number} for number in (0, 1025, 1.0)),
    *(SUM | {"metadata": metadata} for metadata in ([], "text", 3)),
    *(SUM | {"stop": stop} for stop in ("2", [""], ["a", 3])),
    *(SUM | {"id": name} for name in ("", True, 1.5, "twice")),
    SUM | {"reference": ""},
]
COMPUTED = [
    *(SUM | {"max_tokens": 10**9, "ignore_eos": eos} for eos in (False, True)),
    *(SUM | {"temperature": temperature} for temperature in (5e-324, 1e-300, 1e300, 1.7e308)),
    *(SUM | {"temperature": 1.0, "top_p": share} for share in (5e-324, 1e-17, 1.0)),
    *(SUM | {"temperature": 1.0, "min_p": share} for share in (1e-300, 1.0)),
    *(SUM | {"temperature": 1.0, "top_k": number} for number in (98, 2**63 - 1)),
    *(SUM | {"repetition_penalty": penalty} for penalty in (1e-6, 1e6)),
    *(SUM | {key: penalty} for key in ("presence_penalty", "frequency_penalty") for penalty in (-2, 2)),
    *(SUM | {"logit_bias": bias} for bias in ({}, {"0": 100}, {str(token): -100 for token in range(98)})),
    *(SUM | {"min_tokens": number} for number in (1, 2**63 - 1)),
    SUM | {"metadata": {"key": LARGE}},
    *(
        SUM | {"stop": stop}
        for stop in ([f"x{number}" for number in range(10_000)], [LARGE], ["\0"], list("0123456789"))
    ),
    *(SUM | {"id": name} for name in (LARGE, "a\0b", "a\nb\x1b[31m", "[red]", "\u202e", "twice")),
    {"prompt": "12+30=", "reference": 10 * LARGE},
    {"prompt": "\U0001f9ee\0\u0301<eos>"},
    SUM | {"top_logprobs": 20, "seed": 2**63 - 1, "temperature": 1e300},
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "abacus.h5"
    convert(ROOT / "weights/abacus", path)
    return path


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [(2, {}), (2, {"parallel.stages": 2, "task": "score", "score.top_n": 2**62}), (2, {"parallel.tensor": 2})],
    ids=["data", "stages", "tensor"],
)
def test_hostile_lines_end_alone_and_all_others_are_computed(weights, tmp_path, num_ranks, settings):
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "r.h5"
    lines = [*COMPUTED, *REFUSED, *[SUM] * 20]
    prompts.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    named = {"model.weights": weights, "input.prompts": prompts, "output.results": results} | settings
    words = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
    outcome = mpirun(num_ranks, *python("-m", "moempi", "run", ROOT / "jobs/abacus.toml", *words))
    assert outcome.code == 0, outcome.err
    assert "Warning" not in outcome.err
    with ResultFile(results) as file:
        records = list(file.requests())
    ends = [record.finish == "error" for record in records]
    assert ends == [False] * len(COMPUTED) + [True] * len(REFUSED) + [False] * 20
    assert all(record.error and len(record.error) < 1000 for record in records[len(COMPUTED) : -20])
    if "task" not in settings:
        assert [record.text for record in records[-20:]] == ["42"] * 20
    for command in (["show", "jobs/abacus.toml", *words], ["export", results, tmp_path / "r.jsonl"]):
        assert mpirun(1, *python("-m", "moempi", *command)).code == 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == len(lines)
