"""The undamaged files from which inputs are made: a model, a job, prompts, results with recorded routing, and so on."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from fuzz.mutation import to_toml
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.topology_file import LEVEL_NAMES
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.records import Record
from mpirun import ROOT
from storage.models import write_model
from storage.test_records import make_rank, make_request
from storage.test_results import merged
from storage.test_traces import make_routing

MEMORY_FOLDER = Path("/dev/shm")
"""Syncing a file costs nothing there."""

ARCHITECTURE = Architecture(
    family="qwen3_moe",
    vocab_size=100,
    width=8,
    num_layers=2,
    max_positions=64,
    attention=AttentionShape(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="head"),
    experts=Experts(num=4, width=6, router=Router(top_k=2)),
    dense_layers=(0,),
    dense_width=12,
)
RANKS, RANKS_PER_NODE, REQUESTS, TOKENS = 4, 2, 6, 3
MOE_LAYERS = (1,)
LEVELS = [{"name": name, "latency_us": 0.5 * i, "bandwidth_gb_s": 40.0 / (i + 1)} for i, name in enumerate(LEVEL_NAMES)]
TOPOLOGY = {"version": 2, "levels": LEVELS, "nodes": [0, 0, 1, 1], "islands": [0, 1, 2, 3], "switches": [0, 0, 0, 0]}
HOSTED = [{"layer": layer, "hosted": [[0, 3], [1], [2, 0], [3]]} for layer in MOE_LAYERS]
PLACEMENT = {"version": 1, "num_experts": 4, "layers": HOSTED}
MACHINE = {"name": "m", "tflops": 1.0, "memory_gb_s": 10.0, "turn_us": 1.0, "reads_ahead": True, "levels": LEVELS}
CHAT = ChatTemplates(
    {
        "default": "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }}<eos>{% endfor %}",
        "tool_use": "{{ tools | tojson(indent=1) }}{% if messages == 1 %}{{ raise_exception('a') }}{% endif %}",
    },
    {"bos_token": "<pad>", "eos_token": "<eos>"},
)
TOKENIZER = json.loads((ROOT / "weights/abacus/tokenizer.json").read_text(encoding="utf-8"))
JOB = """
[model]
weights = "../seeds/none.h5"
architecture = "../seeds/arch.toml"
[input]
prompts = "../seeds/prompts.jsonl"
[output]
results = "../seeds/results.h5"
"""
COUNTERS = {f"{level}_{kind}": 100 for level, kind in product(LEVEL_NAMES, ("bytes", "messages"))}


def without_none(tree: Any) -> Any:
    """A tree without the keys that are None, which TOML cannot hold."""
    if not isinstance(tree, dict):
        return tree
    return {key: without_none(value) for key, value in tree.items() if value is not None}


@contextmanager
def seeded_folder() -> Iterator[Path]:
    """A folder for inputs, with the seeds."""
    parent = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="moempi-fuzz-", dir=parent) as folder:
        write_seeds(Path(folder) / "seeds")
        yield Path(folder)


def write_seeds(folder: Path) -> None:
    """Write all seeds into a new folder."""
    folder.mkdir()
    write_model(folder / "weights.h5", ARCHITECTURE, tokenizer=json.dumps(TOKENIZER), chat=CHAT)
    (folder / "job.toml").write_text(JOB)
    (folder / "arch.toml").write_bytes(to_toml(Random(0), without_none(msgspec.to_builtins(ARCHITECTURE))))
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"id": "request-{i}", "prompt": "1+{i}="}}\n' for i in range(REQUESTS))
    )
    (folder / "machine.toml").write_bytes(to_toml(Random(0), MACHINE))
    write_results(folder / "results.h5")


def write_results(path: Path) -> None:
    """Results of RANKS ranks on two nodes, with routing, likeliest tokens and references."""
    merged(path, records(), num_requests=REQUESTS)


def records() -> list[Record]:
    """The records of that run."""
    requests = [
        make_request(index, top=2, score_top=1, computed=TOKENS, reference="é" if index % 2 else None)
        for index in range(REQUESTS)
    ]
    return [*map(_rank, range(RANKS)), *map(_routing, range(RANKS)), *requests]


def _rank(rank):
    place = {"seat": rank, "node": rank // RANKS_PER_NODE, "island": -1, "switch": -1, "stage": 0, "data": rank}
    place |= {"tensor": 0, "hops": 1, "departs": 0, "row_bytes": 16}
    load = np.full((2, 4), 4, np.int64)
    counters, hosted = COUNTERS, dict.fromkeys(MOE_LAYERS, (rank,))
    return make_rank(rank, expert_load=load, place=place, counters=counters, hosted=hosted)


def _routing(rank):
    tokens = [(request, position) for request in range(rank, REQUESTS, RANKS) for position in range(TOKENS)]
    record = make_routing(0, tokens, layers=MOE_LAYERS, rank=rank)
    experts = record.columns["experts"] % ARCHITECTURE.experts.num
    return msgspec.structs.replace(record, columns={**record.columns, "experts": experts})
