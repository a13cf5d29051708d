"""Every family against transformers: log-probabilities, greedy tokens and bfloat16, at 1 and at 4 ranks,
which are also two stages of two ranks, each a tensor group where the layout allows it.

Float32 log-probabilities agree within WITHIN, or within ROUNDINGS times what transformers' own float32 differs from its
float64 at the position, if that is more; greedy tokens and the routers' choices are equal, but for choices between
experts whose weights are within MARGIN of each other. In bfloat16 the mean distance from the float32 reference is at
most BFLOAT16_SHARE times that of transformers' own bfloat16. A table is printed at the end.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from moempi.storage.convert import convert
from moempi.storage.results import ResultFile
from runner import Runner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
families = pytest.importorskip("peers.families")

WITHIN = 2e-4
ROUNDINGS = 4
MARGIN = 1e-3
BFLOAT16_SHARE = 1.5
RANKS = (1, 4)
# Families whose query and key norms are over all heads, which a tensor group does not divide.
WHOLE_NORMS = ("olmoe", "minimax_m2")
# Name: task, precision, ranks of a tensor group, stages.
JOBS = {
    "score": ("score", "float32", 1, 1),
    "greedy": ("generate", "float32", 1, 1),
    "rounded": ("score", "bfloat16", 1, 1),
    "divided": ("score", "float32", 2, 1),
    "staged": ("score", "float32", 1, 2),
    "staged_greedy": ("generate", "float32", 1, 2),
    "divided_staged": ("score", "float32", 2, 2),
}
OF_4_RANKS = ("score", "staged", "greedy", "staged_greedy", "rounded")
OF_TENSOR_GROUPS = ("divided", "divided_staged")
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
[parallel]
tensor = {tensor}
stages = {stages}
[trace]
routing = {trace}
[sampling]
max_tokens = {max_tokens}
ignore_eos = true
"""


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    head = f"{'family and options':42}{'float32':>10}{'rounding':>10}{'more':>5}"
    head += f"{'bfloat16':>11}{'theirs':>9}{'choices':>9}{'other':>6}"
    print("\nlargest difference of log-probabilities from transformers' float32, and of this from its float64;")
    print(f"positions that differ by more than {WITHIN:.0e}; mean differences in bfloat16; the routers' choices, and")
    print("how many of them are another expert")
    print("\n".join([head, *rows]))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.mpi
@pytest.mark.parametrize("case", families.CASES)
def test_family(case: str, tmp_path: Path, table: list[str], runner: Callable[[int], Runner]) -> None:
    tokens = families.prompts(case)
    families.write_checkpoint(tmp_path / "hub", case)
    convert(tmp_path / "hub", tmp_path / "model.h5")
    lines = [json.dumps({"tokens": prompt}) + "\n" for prompt in tokens]
    (tmp_path / "score.jsonl").write_text("".join(lines))
    continued = [(prompt, families.num_greedy(prompt)) for prompt in tokens[: len(families.LENGTHS)]]
    lines = [json.dumps({"tokens": prompt, "max_tokens": limit}) + "\n" for prompt, limit in continued]
    (tmp_path / "generate.jsonl").write_text("".join(lines))
    groups = () if case.startswith(WHOLE_NORMS) else OF_TENSOR_GROUPS
    running = [runner(1).start("run", job) for job in write_jobs(tmp_path, 1, ("score", "greedy", "rounded"))]
    running += [runner(4).start("run", job) for job in write_jobs(tmp_path, 4, (*OF_4_RANKS, *groups))]
    reference = families.expected(tmp_path / "hub", tokens)
    for outcome in running:
        ended = outcome()
        assert ended.code == 0, ended.err
    exact, rounding = flat(reference.float32), flat(reference.rounding)
    theirs = np.abs(flat(reference.bfloat16) - exact).mean()
    alone = scores(tmp_path / "score-1.h5")
    scored = ("score", "staged", *groups)
    others = [scores(tmp_path / f"{name}-4.h5") for name in scored]
    differences = np.max([np.abs(found - exact) for found in (alone, *others)], axis=0)
    rounded = max(float(np.abs(scores(tmp_path / f"rounded-{ranks}.h5") - exact).mean()) for ranks in RANKS)
    chosen, other, margin = compare_choices(tmp_path / "score-1.h5", reference)
    row = f"{case:42}{differences.max():10.1e}{rounding.max():10.1e}{(differences > WITHIN).sum():5}"
    table.append(f"{row}{rounded:11.4f}{theirs:9.4f}{chosen:9}{other:6}")
    assert margin <= MARGIN
    for name in scored:
        assert compare_choices(tmp_path / f"{name}-4.h5", reference)[2] <= MARGIN
    assert (differences <= np.maximum(WITHIN, ROUNDINGS * rounding)).all()
    assert rounded <= BFLOAT16_SHARE * theirs
    for others_of_same_bits in others[:2]:
        np.testing.assert_array_equal(others_of_same_bits, alone)
    for name in ("greedy-1", "greedy-4", "staged_greedy-4"):
        with ResultFile(tmp_path / f"{name}.h5") as results:
            assert [record.tokens.tolist() for record in results.requests()] == reference.greedy


def write_jobs(folder: Path, ranks: int, names: tuple[str, ...]) -> list[Path]:
    """The job files of these of JOBS."""
    paths = []
    for name in names:
        task, precision, tensor, stages = JOBS[name]
        places = {"folder": folder, "name": name, "ranks": ranks}
        values = {"task": task, "precision": precision, "tensor": tensor, "stages": stages}
        values["max_tokens"] = families.NUM_GREEDY
        values["trace"] = str(task == "score" and precision == "float32").lower()
        paths.append(folder / f"{name}-{ranks}.toml")
        paths[-1].write_text(JOB.format(**places, **values))
    return paths


def compare_choices(path: Path, reference: "families.Expected") -> tuple[int, int, float]:
    """How many choices were compared, how many are another expert, and the largest margin among these.

    The margin is how far the weight of an expert that only we chose is from that of the one that only they did.
    """
    with h5py.File(path) as file:
        ours, weights = file["routing/experts"][:], file["routing/weights"][:]
    theirs, their_weights = reference.experts.numpy(), reference.weights.numpy()
    assert ours.shape == theirs.shape
    only_ours = (ours[..., :, None] != theirs[..., None, :]).all(axis=-1)
    only_theirs = (theirs[..., :, None] != ours[..., None, :]).all(axis=-1)
    margins = np.abs(weights[only_ours] - their_weights[only_theirs])
    return ours.size, int(only_ours.sum()), float(margins.max(initial=0))


def scores(path: Path) -> np.ndarray:
    """All log-probabilities of the prompts' tokens but the first ones."""
    with ResultFile(path) as results:
        return np.concatenate([record.score[1:] for record in results.requests()])


def flat(parts: list) -> np.ndarray:
    return torch.cat(parts).numpy()
