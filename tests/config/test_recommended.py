"""The sampling rules of generation_config.json become defaults, and never what the job gives."""

import pytest

from moempi.config.job import Sampling
from moempi.config.reading import given_keys
from moempi.config.recommended import recommended_sampling, with_recommended


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 20}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"do_sample": True, "top_k": -1, "top_p": 0, "min_p": "x", "temperature": None}, {"temperature": 1.0}),
        ({"do_sample": False, "repetition_penalty": 1.05}, {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"do_sample": 1, "top_k": 20}, {}),
    ],
)
def test_what_is_recommended(generation, expected):
    assert recommended_sampling(generation) == expected


def test_what_the_job_gives_stays():
    recommended = {"temperature": 0.6, "top_k": 20, "other": 3.0}
    found = with_recommended(Sampling(seed=7, logit_bias={5: 1.0}), recommended, given={"temperature"})
    assert found == Sampling(seed=7, logit_bias={5: 1.0}, top_k=20)
    with pytest.raises(ValueError, match="top_k"):
        with_recommended(Sampling(), {"top_k": -1}, given=())


def test_given_keys_are_those_of_the_file_and_of_overrides(tmp_path):
    (tmp_path / "job.toml").write_text("sampling.temperature = 0.0\n[run]\noverlap = true\n")
    assert given_keys(tmp_path / "job.toml", "sampling", overrides=["sampling.top_k=3"]) == {"temperature", "top_k"}
    assert given_keys(tmp_path / "job.toml", "score") == frozenset()
