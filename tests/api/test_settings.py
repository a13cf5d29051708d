"""Settings of a Python program are keys of a job file, with the checks of a job file."""

import pytest

from moempi.api.sampling_params import SamplingParams
from moempi.config.job import Sampling
from moempi.config.settings import read_settings
from moempi.errors import ConfigError


def test_settings_are_keys_of_a_job_by_their_last_name_or_sections():
    job, sampling = read_settings(
        "w.h5",
        {"stages": 2, "precision": "float32", "top_n": 3, "template_kwargs": {"a": 1}, "run": {"lanes": 4}}
        | {"placement": {"file": "p.json"}, "max_tokens": 5, "stage_layers": [1, 2], "parallel.tensor": 2},
    )
    assert job.model.weights == "w.h5"
    assert (job.parallel.stages, job.parallel.tensor, job.parallel.stage_layers) == (2, 2, (1, 2))
    assert (job.run.precision, job.run.lanes, job.run.batch_tokens) == ("float32", 4, 512)
    assert (job.score.top_n, job.chat.template_kwargs, job.placement.file) == (3, {"a": 1}, "p.json")
    assert (job.sampling.max_tokens, sampling) == (5, {"max_tokens"})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"precison": "float32"}, "LLM: unknown setting precison; did you mean precision?"),
        ({"xyzzy": 1}, r"LLM: unknown setting xyzzy; settings are the keys of \[run\], \[parallel\], \[sampling\]"),
        ({"precision": "float16"}, r"LLM: run\.precision: Invalid enum value 'float16'"),
        ({"stages": 0}, r"LLM: parallel\.stages: Expected `int` >= 1"),
        ({"stages": "2"}, r"LLM: parallel\.stages: Expected `int`, got `str`"),
        ({"run": {"lane": 2}}, r"LLM: unknown key run\.lane; did you mean run\.lanes\?"),
        ({"file": "x.json"}, "LLM: file is a key of several sections; write topology=.*or placement="),
        ({"special_tokens": True}, "LLM: special_tokens is a key of several sections; write input=.*or output="),
        ({"prompts": "p.jsonl"}, "LLM: unknown setting prompts"),
        ({"input": {"prompts": "p.jsonl"}}, r"LLM: input\.prompts is for job files"),
        ({"output": {"results": "r.h5"}}, r"LLM: output\.results is for job files"),
        ({"model": {"weights": "other.h5"}}, "LLM: model is for job files"),
        ({"trace": {"routing": True}}, "LLM: trace is for job files"),
        ({"score": {"threshold": -3.0}}, "LLM: score.threshold is for job files"),
        ({"task": "score"}, "LLM: unknown setting task"),
    ],
)
def test_a_wrong_setting_is_refused_as_a_job_refuses_it(settings, error):
    with pytest.raises(ConfigError, match=error):
        read_settings("w.h5", settings)


def test_sampling_parameters_replace_the_settings_that_they_name():
    given = SamplingParams(max_tokens=7, stop=["a", "b"], logit_bias={5: -1})
    assert given.applied_to(Sampling(top_k=3, max_tokens=1)) == Sampling(
        top_k=3, max_tokens=7, stop=("a", "b"), logit_bias={5: -1.0}
    )
    assert repr(given) == "SamplingParams(max_tokens=7, stop=('a', 'b'), logit_bias={5: -1.0})"


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"temprature": 1}, "SamplingParams: unknown key temprature; did you mean temperature?"),
        ({"max_tokens": 0}, "SamplingParams: max_tokens: Expected `int` >= 1"),
        ({"stop": "a"}, "SamplingParams: stop: Expected `array`, got `str`"),
        ({"defaults": "model"}, "SamplingParams: defaults is a setting of LLM"),
    ],
)
def test_a_wrong_sampling_parameter_is_refused(keys, error):
    with pytest.raises(ConfigError, match=error):
        SamplingParams(**keys)
