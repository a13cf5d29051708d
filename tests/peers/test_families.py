"""Every family against transformers: log-probabilities, greedy tokens and bfloat16, at 1 and at 4 ranks.

Float32 log-probabilities agree within WITHIN and greedy tokens are equal; in bfloat16 the mean distance from the
float32 reference is at most BFLOAT16_SHARE times that of transformers' own bfloat16. A table is printed at the end.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mpirun as launching
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
families = pytest.importorskip("peers.families")

WITHIN = 2e-4
BFLOAT16_SHARE = 1.5
RANKS = (1, 4)
JOBS = {"score": ("score", "float32"), "greedy": ("generate", "float32"), "rounded": ("score", "bfloat16")}
JOB = """
task = "{task}"
[model]
weights = "{folder}/model.h5"
[input]
prompts = "{folder}/{task}.jsonl"
[output]
results = "{folder}/{name}-{ranks}.h5"
[run]
precision = "{precision}"
batch_tokens = 128
max_sequences = 4
[sampling]
max_tokens = {max_tokens}
ignore_eos = true
"""


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    head = f"{'family and options':42}{'float32':>10}{'bfloat16':>11}{'theirs':>9}"
    print("\nlargest and mean differences of log-probabilities from transformers' float32")
    print("\n".join([head, *rows]))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.mpi
@pytest.mark.parametrize("case", families.CASES)
def test_family(case: str, tmp_path: Path, table: list[str]) -> None:
    tokens = families.prompts()
    families.write_checkpoint(tmp_path / "hub", case)
    reference = families.expected(tmp_path / "hub", tokens)
    convert(tmp_path / "hub", tmp_path / "model.h5")
    lines = [json.dumps({"tokens": prompt}) + "\n" for prompt in tokens]
    (tmp_path / "score.jsonl").write_text("".join(lines))
    (tmp_path / "generate.jsonl").write_text("".join(lines[: len(families.LENGTHS)]))
    for ranks in RANKS:
        run_jobs(tmp_path, ranks)
    exact = flat(reference.float32)
    theirs = np.abs(flat(reference.bfloat16) - exact).mean()
    largest, rounded = 0.0, 0.0
    for ranks in RANKS:
        largest = max(largest, float(np.abs(scores(tmp_path / f"score-{ranks}.h5") - exact).max()))
        rounded = max(rounded, float(np.abs(scores(tmp_path / f"rounded-{ranks}.h5") - exact).mean()))
    table.append(f"{case:42}{largest:10.1e}{rounded:11.4f}{theirs:9.4f}")
    assert largest <= WITHIN
    assert rounded <= BFLOAT16_SHARE * theirs
    for ranks in RANKS:
        with ResultFile(tmp_path / f"greedy-{ranks}.h5") as results:
            assert [record.tokens.tolist() for record in results.requests()] == reference.greedy


def run_jobs(folder: Path, ranks: int) -> None:
    """The jobs of JOBS, one after another."""
    paths = []
    for name, (task, precision) in JOBS.items():
        paths.append(folder / f"{name}-{ranks}.toml")
        text = JOB.format(
            task=task, folder=folder, name=name, ranks=ranks, precision=precision, max_tokens=families.NUM_GREEDY
        )
        paths[-1].write_text(text)
    outcome = launching.mpirun(ranks, *launching.python(Path(__file__).with_name("run_jobs.py"), *paths), limit_s=120)
    assert outcome.code == 0, outcome.err


def scores(path: Path) -> np.ndarray:
    """All log-probabilities of the prompts' tokens but the first ones."""
    with ResultFile(path) as results:
        return np.concatenate([record.score[1:] for record in results.requests()])


def flat(parts: list) -> np.ndarray:
    return torch.cat(parts).numpy()
