"""Peak memory of a whole run that scores the likeliest tokens of a large vocabulary, beside one that scores none.

`python tests/engine/test_score_memory.py VOCABULARY TOKENS` prints the peaks of a prompt of TOKENS tokens.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

from mpirun import ENVIRONMENT

ARCHITECTURE = """family = "random"
vocab_size = {vocabulary}
width = 16
num_layers = 1
max_positions = {tokens}
[attention]
num_heads = 1
num_kv_heads = 1
head_dim = 16
[experts]
num = 2
width = 8
[experts.router]
top_k = 1
"""
JOB = """task = "score"
model.weights = "model.h5"
input.prompts = "prompts.h5"
output.results = "{name}.h5"
run.kv_memory = "64MiB"
"""
MIB = 1 << 20


MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""
"""A small process, because the peak of a process begins with that of the process that starts it."""


def moempi(*words: object) -> int:
    """Peak resident memory of a command, in bytes."""
    arguments = [sys.executable, "-c", MEASURE, sys.executable, "-m", "moempi", *map(str, words)]
    outcome = subprocess.run(arguments, check=False, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return int(outcome.stdout)


def peaks(folder: Path, *, vocabulary: int, tokens: int) -> dict[str, int]:
    """Peak memory of jobs that score a prompt of `tokens` tokens and record nothing, 100 likeliest, or those above."""
    (folder / "arch.toml").write_text(ARCHITECTURE.format(vocabulary=vocabulary, tokens=tokens))
    moempi("init", folder / "arch.toml", folder / "model.h5", "--seed", 1)
    with h5py.File(folder / "prompts.h5", "w") as file:
        file["values"] = np.random.default_rng(1).integers(0, vocabulary, tokens)
        file["offsets"] = [0, tokens]
    found = {}
    for name, key in (("none", "score.top_n=0"), ("top_n", "score.top_n=100"), ("threshold", "score.threshold=-8.0")):
        (folder / f"{name}.toml").write_text(JOB.format(name=name))
        found[name] = moempi("run", folder / f"{name}.toml", "--set", key)
    return found


def test_likely_tokens_of_a_large_vocabulary_take_less_than_64_mib(tmp_path):
    found = peaks(tmp_path, vocabulary=131_072, tokens=1024)
    assert found["top_n"] < found["none"] + 64 * MIB
    assert found["threshold"] < found["none"] + 64 * MIB
    assert found["none"] < 131_072 * 1024 * 4  # the logits of the prompt alone


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, peak in peaks(Path(folder), vocabulary=int(sys.argv[1]), tokens=int(sys.argv[2])).items():
            print(f"{name}: {peak / MIB:.1f} MiB", flush=True)
