"""Whole runs on small checkpoints against log-probabilities recorded from transformers (tests/peers/record.py).

Each checkpoint runs on the CPU backend and on the CUDA kernels.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from moempi.backend.cpu.kernels import load_kernels
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
JOB = """
task = "score"
[model]
weights = "{0}/model.h5"
[input]
prompts = "{0}/prompts.jsonl"
[output]
results = "{0}/results.h5"
[run]
precision = "{1}"
batch_tokens = 24
"""


NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))


@pytest.mark.parametrize("module", ["moempi.cli", "simt.run"], ids=["numpy", "kernels"])
@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-4), ("bfloat16", 1.0)])
@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_equal_the_recorded_ones(name, precision, within, module, tmp_path, runner):
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    convert(FIXTURES / name, tmp_path / "model.h5")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"tokens": expected["tokens"]}))
    (tmp_path / "job.toml").write_text(JOB.format(tmp_path, precision))
    outcome = runner(2, module=module).run("run", tmp_path / "job.toml")
    assert outcome.code == 0, outcome.err
    with ResultFile(tmp_path / "results.h5") as results:
        (record,) = results.requests()
    difference = np.abs(record.score[1:] - expected["logprobs"])
    assert difference.max() <= within
    assert difference.mean() <= within / 4


@pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or a processor without kernels")
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, ["trace.hidden=[0,1]"]) for name in NAMES]
    + [(name, ["trace.hidden=[0,1]", "trace.hidden_sublayer=attention"]) for name in NAMES]
    + [("qwen3_moe", ["exchange.hops=2", "topology.ranks_per_node=1"]), ("qwen3_moe", ["parallel.tensor=2"])],
)
def test_rows_of_products_have_bfloat16_values(name, options, tmp_path, runner):
    """The kernels cut the low bits of these rows without notice."""
    convert(FIXTURES / name, tmp_path / "model.h5")
    tokens = json.loads((FIXTURES / name / "expected.json").read_text())["tokens"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"tokens": tokens}))
    (tmp_path / "job.toml").write_text(JOB.format(tmp_path, "bfloat16"))
    words = [word for option in options for word in ("--set", option)]
    outcome = runner(2, module="backend.cpu.narrow_rows").run("run", tmp_path / "job.toml", *words)
    assert outcome.code == 0, outcome.err
