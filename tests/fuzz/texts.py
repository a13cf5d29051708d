"""Jobs, architectures, machines, placements, topologies and states of runs: TOML and JSON."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from fuzz.mutation import Raw, any_value, damaged_text, mutated, to_json, to_toml
from fuzz.seeds import ARCHITECTURE, JOB, MACHINE, MOE_LAYERS, PLACEMENT, RANKS, TOPOLOGY, without_none
from fuzz.subject import Subject, Use, main, require, run
from moempi.commands import run as run_command
from moempi.config.architecture import (
    Clamp,
    DeltaRule,
    Indexer,
    Latent,
    Rope,
    StateSpace,
    Yarn,
    read_architecture_file,
)
from moempi.config.job import read_job_file, result_keys
from moempi.config.tensors import catalogue
from moempi.config.topology_file import read_topology
from moempi.layout.topology import from_file

ALL_RANKS = "--world 4 --ranks-per-node 2"
MAX_MODEL_BYTES = 1 << 20

JOB_VALUES: dict[str, Sequence[Any]] = {
    "task": ("generate", "score"),
    "run.backend": ("auto", "numpy", "cupy"),
    "run.precision": ("bfloat16", "float32"),
    "run.reproducible": (True, False),
    "run.capture": (True, False),
    "run.micro_batches": ("auto", 1, 2, 4096),
    "run.max_sequences": (1, 7, 1_000_000),
    "run.batch_tokens": (1, 512, 1 << 24),
    "run.kv_memory": ("auto", "2GiB", "1.5 KB", "0B", "999999999999999.9TiB"),
    "run.timeout_s": (3.0, 1e8, 5e-324),
    "sampling.max_tokens": (1, 2**31 - 1),
    "sampling.temperature": (0.0, 0.7, 1e308),
    "sampling.top_p": (1.0, 5e-324),
    "sampling.stop": ((), ("a", "é\0")),
    "score.top_n": (0, 3, 2**63 - 1),
    "exchange.hops": (1, 2),
    "exchange.immediate": (False, True),
    "parallel.stages": (1, 2),
    "parallel.stage_layers": ([], [1, 1], [2]),
    "parallel.stage_ranks": ([], [2, 2], [4]),
    "parallel.tensor": (1, 2),
    "parallel.experts_per_rank": (0, 1, 4),
    "topology.rank_memory": ("auto", "64GB", "1B"),
    "balance.mode": ("off", "bias", "capacity"),
    "balance.capacity": (1.0, 1e6),
    "trace.routing": (False, True, "experts", "weights"),
    "trace.home": (False, True),
    "trace.hidden": ([], [0], [1, 1], [999]),
    "trace.hidden_sublayer": ("attention", "feed_forward"),
    "trace.hidden_norm": (False, True),
    "trace.hidden_positions": ("all", "last", "output"),
    "trace.hidden_dtype": ("bfloat16", "float32"),
    "trace.statistics": (False, True),
    "score.dtype": ("float16", "float32"),
    "replay.weights": (False, True),
}
OTHER_KEYS = ("output.results", "model.architecture", "x.y", "", "run", "run." * 200 + "a", "a\0.b")
RESULTS = (
    "results.h5",
    "sub/dir/r.h5",
    "",
    ".",
    "x" * 300,
    "loop/x",
    "fifo",
    "a\0b",
    "é.h5",
    "/dev/null",
    "/dev/null/x",
)


class JobFile(Subject):
    """job.toml with keys overridden by --set: laid out, forecast, its outputs checked."""

    name = "job"
    file = "job.toml"
    named = ("",)  # a layout that cannot be names keys and numbers
    codes = (64, 65, 66, 74, 78)
    commands = (
        f"run job.toml {ALL_RANKS}",
        "plan job.toml --machine ../seeds/machine.toml --ranks 4",
        "state job.toml",
    )

    def write(self, random: Random) -> Any:
        flat: dict[str, Any] = {
            "model.weights": "../seeds/none.h5",
            "model.architecture": "../seeds/arch.toml",
            "input.prompts": "../seeds/prompts.jsonl",
            "output.results": "results.h5",
        }
        flat |= {key: random.choice(JOB_VALUES[key]) for key in random.sample(sorted(JOB_VALUES), random.randrange(5))}
        chance = random.random()
        if chance < 0.05:
            flat["output.results"] = random.choice(RESULTS)
            Path("loop").symlink_to("loop")
            os.mkfifo("fifo")
        tree: dict[str, Any] = {}
        for key, value in flat.items():
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = value
        text = to_toml(random, mutated(random, tree) if 0.05 < chance < 0.5 else tree)
        Path("job.toml").write_bytes(damaged_text(random, text) if 0.5 < chance < 0.65 else text)
        return [_override(random) for _ in range(random.choice((0, 0, 0, 1, 2)))]

    def uses(self, known: list[str]) -> Sequence[Use]:
        words = [word for override in known for word in ("--set", override)]
        machine = ("--machine", "../seeds/machine.toml", "--ranks", "4")
        return (
            lambda: run("run", "job.toml", *ALL_RANKS.split(), *words),
            lambda: run("plan", "job.toml", *machine, *words),
            lambda: self.check_outputs(known),
        )

    def check_outputs(self, overrides: list[str]) -> None:
        job = read_job_file("job.toml", overrides=overrides)
        msgspec.json.encode(result_keys(job))
        chosen = type("Chosen", (), {"job": Path("job.toml"), "force": False})
        run_command._check_outputs(chosen, job)


def _override(random: Random) -> str:
    key = random.choice(
        (*JOB_VALUES, "output.results", "model.architecture", "x.y", "", "run", "run." * 200 + "a", "a\0.b")
    )
    values = JOB_VALUES.get(key, ("a",))
    value = random.choice(values) if random.random() < 0.6 else any_value(random)
    text = str(value) if isinstance(value, Raw) else json.dumps(value, default=str)
    return random.choice((f"{key}={text}", f"{key} = {text}", f"{key}={value}"[:6000], key))


OPTIONS = {
    "attention.qk_norm": ("none", "head", "vector"),
    "attention.biases": ("none", "qkv", "all"),
    "attention.clip": (None, 8.0),
    "attention.sinks": (True, False),
    "attention.window": (0, 4),
    "attention.windowed_layers": ([], [0, 1]),
    "attention.rope": (
        {},
        {"theta": 5e5, "dim": 2},
        msgspec.to_builtins(Rope(interleaved=True, yarn=Yarn(factor=40.0, original_positions=4096))),
        msgspec.to_builtins(Rope(divisors=(1.0, 2.0))),
    ),
    "attention.latent": (
        None,
        None,
        msgspec.to_builtins(Latent(6, 2, 4, query_rank=5)),
        msgspec.to_builtins(Latent(6, 2, 4, query_rank=5, indexer=Indexer(2, 4, 3))),
    ),
    "experts.clamp": (None, msgspec.to_builtins(Clamp(1.7, 7.0))),
    "experts.biases": (True, False),
    "experts.shared_width": (0, 5),
    "experts.router": (
        {"top_k": 2, "scoring": "sigmoid", "correction": True, "num_groups": 2, "group_score": "top2"},
        {"top_k": 2, "scoring": "sparsemixer"},
        {"top_k": 1, "scoring": "softmax_chosen", "bias": True, "float32_logits": True},
    ),
    "attention.output_gate": (True, False),
    "delta_rule": (None, msgspec.to_builtins(DeltaRule(1, 2, 3, 4, taps=3))),
    "delta_layers": ([], [0], [0, 0], [7]),
    "state_space": (None, msgspec.to_builtins(StateSpace(4, 3, num_groups=2, state_dim=5, taps=3))),
    "state_space_layers": ([], [0], [0, 0], [7]),
    "without_attention": ([], [1], [0, 1], [7]),
    "without_feed_forward": ([], [0], [1, 1], [7]),
    "activation": ("swiglu", "relu2"),
    "float32_norms": (True, False),
    "tied_embeddings": (True, False),
    "head_bias": (True, False),
    "norm": ("rms", "rms_float32", "layer"),
    "num_layers": (1, 2, 1000),
    "dense_layers": ([], [0], [0, 1, 2]),
    "experts.num": (4, 2, 1 << 16),
    "eos_tokens": ([], [1, 2]),
}


class ArchitectureFile(Subject):
    """arch.toml: laid out and forecast, and if it is small, made into a weight file."""

    name = "architecture"
    file = "arch.toml"
    codes = (66, 78)
    named = ("arch.toml", "parallel.", "none.h5")
    commands = (f"run job.toml {ALL_RANKS}", "plan job.toml --machine ../seeds/machine.toml --ranks 4")

    def write(self, random: Random) -> Any:
        tree = json.loads(msgspec.json.encode(ARCHITECTURE))
        for key in random.sample(sorted(OPTIONS), random.choice((0, 1, 1, 2, 3))):
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree)[name] = random.choice(OPTIONS[key])
        tree = mutated(random, without_none(tree))
        text = to_toml(random, tree)
        Path("arch.toml").write_bytes(damaged_text(random, text) if random.random() < 0.1 else text)
        job = JOB.replace("../seeds/arch", "arch")
        Path("job.toml").write_text(job)

    def uses(self, _: Any) -> Sequence[Use]:
        return (
            lambda: main(f"run job.toml {ALL_RANKS}"),
            lambda: main("plan job.toml --machine ../seeds/machine.toml --ranks 4"),
            self.initialize,
        )

    def initialize(self) -> None:
        architecture = read_architecture_file("arch.toml")
        if sum(tensor.num_bytes for tensor in catalogue(architecture)) < MAX_MODEL_BYTES:
            main("init arch.toml out.h5 --force")
            main("inspect out.h5")


class MachineFile(Subject):
    """machine.toml: a forecast on it."""

    name = "machine"
    file = "machine.toml"
    codes = (66, 78)
    commands = ("plan ../seeds/job.toml --machine machine.toml --ranks 4 --ranks-per-node 2",)
    settings = ("run.backend=numpy", "exchange.hops=2", "parallel.tensor=2", "parallel.stages=2", "task=score")

    def write(self, random: Random) -> Any:
        text = to_toml(random, mutated(random, MACHINE))
        Path("machine.toml").write_bytes(damaged_text(random, text) if random.random() < 0.15 else text)
        return random.choice(self.settings)

    def uses(self, known: str) -> Sequence[Use]:
        return (lambda: main(f"{self.commands[0]} --set {known}"),)


class PlacementFile(Subject):
    """placement.json: a layout and a forecast with it."""

    name = "placement"
    file = "placement.json"
    codes = (66, 78)
    named = ("placement.json", "placement.file")
    commands = (f"run ../seeds/job.toml {ALL_RANKS} --set placement.file=placement.json",)

    def write(self, random: Random) -> Any:
        hosted = [[] for _ in range(RANKS)]
        for expert in range(4):
            for rank in random.sample(range(RANKS), random.choice((1, 1, 2, 4))):
                hosted[rank].append(expert)
        tree = PLACEMENT | {"layers": [{"layer": layer, "hosted": hosted} for layer in MOE_LAYERS]}
        text = to_json(mutated(random, tree))
        Path("placement.json").write_bytes(damaged_text(random, text) if random.random() < 0.15 else text)

    def uses(self, _: Any) -> Sequence[Use]:
        plan = "plan ../seeds/job.toml --machine ../seeds/machine.toml --ranks 4 --set placement.file=placement.json"
        return (lambda: main(self.commands[0]), lambda: main(plan))


class TopologyFile(Subject):
    """topology.json: experts are placed for it, and each rank's levels of links are read."""

    name = "topology"
    file = "topology.json"
    codes = (64, 66, 74, 78)
    named = ("topology.json", "--ranks")
    commands = ("place ../seeds/results.h5 --topology topology.json --ranks 4 -o out.json",)

    def write(self, random: Random) -> Any:
        tree = json.loads(json.dumps(TOPOLOGY))
        if random.random() < 0.3:
            tree["nodes"] = [index // random.choice((1, 2, 3)) for index in range(random.choice((4, 4, 8)))]
        if random.random() < 0.3:
            tree["islands"], tree["switches"] = [], random.choice(([], [7, 7, 7, 7]))
        text = to_json(mutated(random, tree))
        Path("topology.json").write_bytes(damaged_text(random, text) if random.random() < 0.1 else text)
        return random.choice(("--ranks 4", "", "--ranks 8 --ranks-per-node 3 --replicas 0.5"))

    def uses(self, known: str) -> Sequence[Use]:
        return (self.levels, lambda: main(f"place ../seeds/results.h5 --topology topology.json -o out.json {known}"))

    def levels(self) -> None:
        topology = from_file(read_topology("topology.json"))
        for rank in range(min(len(topology.nodes), 100)):
            require(len(topology.levels(rank)) == len(topology.nodes), "a rank has a level for another number of ranks")


STATE = {
    "state": "running",
    "requests": 10,
    "finished": 3,
    "tokens": 100,
    "reason": "",
    "rank": 0,
    "phase": "decode",
    "exit_code": 0,
    "world_size": 4,
    "started": "2026-01-01T00:00:00+00:00",
    "updated": "2026-01-01T00:00:00+00:00",
    "job": "",
    "replaces": "1 2",
}


class StateFile(Subject):
    """run.json: what `moempi state` prints."""

    name = "state"
    file = "results.h5.run.json"
    codes = (65, 66)
    commands = ("state job.toml",)

    def write(self, random: Random) -> Any:
        tree = STATE | {"state": random.choice(("running", "finished", "stopped", "failed"))}
        text = to_json(mutated(random, tree))
        Path("results.h5.run.json").write_bytes(damaged_text(random, text) if random.random() < 0.2 else text)
        Path("job.toml").write_text(JOB.replace("../seeds/results.h5", "results.h5"))
        if random.random() < 0.2:
            Path("results.h5").touch()

    def uses(self, _: Any) -> Sequence[Use]:
        return (lambda: main("state job.toml"),)


SUBJECTS = (JobFile, ArchitectureFile, MachineFile, PlacementFile, TopologyFile, StateFile)
