"""Recorded hidden states, likeliest tokens and routing of four families against transformers, at 1 and at 4 ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moempi import Results
from moempi.storage.convert import convert
from runner import Runner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
families = pytest.importorskip("peers.families")

WITHIN = 2e-4
TOP = 5
JOB = """
task = "score"
score.top_n = {top}
model.weights = "model.h5"
input.prompts = "prompts.jsonl"
output.results = "results-{ranks}.h5"
run.precision = "float32"
run.batch_tokens = 64
parallel.stages = {stages}
exchange.immediate = true
trace.routing = "weights"
trace.hidden = {layers}
trace.hidden_norm = true
trace.hidden_dtype = "float32"
"""


@pytest.mark.mpi
@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "deepseek_v3-groups-yarn", "gpt_oss-yarn"])
def test_recorded_values_are_those_of_transformers(case: str, tmp_path: Path, runner: Callable[[int], Runner]) -> None:
    tokens = families.prompts(case)
    families.write_checkpoint(tmp_path / "hub", case)
    convert(tmp_path / "hub", tmp_path / "model.h5")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in tokens))
    states, logprobs = reference(tmp_path / "hub", tokens)
    for ranks, stages in ((1, 1), (4, 2)):
        job = tmp_path / f"job-{ranks}.toml"
        job.write_text(JOB.format(ranks=ranks, stages=stages, top=TOP, layers=list(range(len(states[0])))))
        outcome = runner(ranks).run("run", job)
        assert outcome.code == 0, outcome.err
        with Results(tmp_path / f"results-{ranks}.h5") as results:
            for result, layers, expected in zip(results, states, logprobs, strict=True):
                for layer, rows in enumerate(layers):
                    scale = max(float(np.abs(rows).max()), 1.0)
                    np.testing.assert_allclose(result.hidden(layer) / scale, rows / scale, rtol=0, atol=WITHIN)
                found = result.score_top_logprobs[1:]
                top = -np.sort(-expected, axis=1)[:, :TOP]
                np.testing.assert_allclose(found, top[: len(found)], rtol=0, atol=WITHIN)
                assert result.routing is None or (result.routing >= 0).all()


def reference(folder: Path, prompts: list[list[int]]) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """The states behind each layer, the last behind the final norm, and log-probabilities of the computed tokens."""
    model = families.load(folder, torch.float32)
    states, logprobs = [], []
    for prompt in prompts:
        with torch.no_grad():
            found = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
        computed = max(len(prompt) - 1, 1)
        states.append([layer[0, :computed].numpy() for layer in found.hidden_states[1:]])
        logprobs.append(torch.log_softmax(found.logits[0].float(), dim=-1)[:computed].numpy())
    return states, logprobs
