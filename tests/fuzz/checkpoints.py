"""Checkpoint folders: configurations of all families, safetensors files with their index, and tokenizers."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from config.test_hub_configs import HUB
from fuzz.mutation import BOUNDARIES, damaged, damaged_text, mutated, to_json
from fuzz.subject import Subject, Use, main, require
from moempi.config.architecture import Architecture
from moempi.config.families import FAMILIES, Fused, OnePlus, Rows, Sources, read_architecture
from moempi.config.tensors import Share, Tensor, catalogue
from moempi.storage.weights import WeightFile
from storage.checkpoints import origin_bits
from storage.packed import FORMATS, Format

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Type, shape and bytes of each tensor of a checkpoint."""

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "n_group": 2, "topk_group": 1, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "q_lora_rank": 5, "shared_expert_intermediate_size": 8, "moe_layer_end_index": 1, "first_k_dense_replace": 1,
    "sliding_window": 16, "eos_token_id": [1, 2], "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "num_shared_experts": 1, "rotary_dim": 4, "bos_token_id": 1, "attn_type_list": [1, 1],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5,
    "full_attention_interval": 2,
}  # fmt: skip
LATENT_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
ROPES: tuple[Any, ...] = (
    None,
    {"rope_type": "default"},
    {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 1, "attention_factor": 1e-300},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "short_mscale": 1.2,
        "long_mscale": 1.2,
    },
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
JOB = 'model.weights = "out.h5"\ninput.prompts = "prompts.jsonl"\noutput.results = "results.h5"\n'
GENERATION = {"bos_token_id": 1, "eos_token_id": [1, 2], "do_sample": False}
FILES = ("../a.safetensors", "/etc/passwd", ".safetensors", "a.safetensors\0", "x/a.safetensors", "..", "c.safetensors")
TARGETS = ("/etc/passwd", "c.safetensors", "a.safetensors", "/dev/zero")
DTYPES = ("BF16", "F16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U8", "I8", "I32", "C64", "F4", "bf16", "")


PACKED = (FORMATS["gptq-act_order"], FORMATS["awq"], FORMATS["int4-asymmetric-float16"], FORMATS["nvfp4"])


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the hub with small sizes."""
    sizes = {key: value for key, value in SIZES.items() if config.get(key)}
    if config.get("n_group") == 1:
        sizes |= {"n_group": 1}
    if "kv_lora_rank" in config:
        sizes |= LATENT_HEADS
    if "index_topk" in config:
        sizes |= {"index_n_heads": 2, "index_head_dim": 6, "index_topk": 3}
    if "indexer_types" in config:
        sizes |= {"indexer_types": ["full", "shared"], "mlp_layer_types": ["dense", "sparse"], "index_topk_freq": None}
    if "layer_types" in config:
        kind = next(kind for kind in config["layer_types"] if kind != "full_attention")
        sizes["layer_types"] = [kind, "full_attention"]
    result = deepcopy(dict(config) | sizes)
    if result["model_type"] == "phimoe":
        result["head_dim"] = None
        result["rope_scaling"] |= {"short_factor": [1.0, 1.5], "long_factor": [2.0, 2.5]}
    return result


def tensors_of(architecture: Architecture, model_type: str) -> Tensors:
    """The tensors of a checkpoint of this architecture, in bfloat16."""
    names, shapes = FAMILIES[model_type], {}
    for tensor in catalogue(architecture):
        for name, shape in _shapes(names.sources(tensor), tensor, architecture):
            shapes[name] = shape
    return {name: ("BF16", shape, origin_bits(name, shape).tobytes()) for name, shape in shapes.items()}


def _shapes(sources: Sources, tensor: Tensor, architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(sources, Fused):
        experts, outputs, *inputs = tensor.shape
        yield sources.name, (experts, *inputs, outputs * sources.parts)
        return
    if isinstance(sources, Rows):
        rows, *others = tensor.shape
        parts = sources.parts(architecture)
        between = (1,) if "conv1d" in sources.name else ()
        yield sources.name, (rows // parts[sources.part] * sum(parts), *between, *others)
        return
    if isinstance(sources, OnePlus):
        sources = (sources.name,)
    shape = tensor.shape[1:] if tensor.share is Share.EXPERTS else tensor.shape
    for name in sources:
        yield name, shape[::-1] if tensor.transposed else shape


def header_of(tensors: Tensors) -> dict[str, Any]:
    """The header of a safetensors file."""
    header, end = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(content)]}
        end += len(content)
    return header


def content_of(tensors: Tensors) -> bytes:
    """The bytes of all tensors."""
    return b"".join(content for _, _, content in tensors.values())


def safetensors(header: bytes, content: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file, whose header may be said to have another length."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + content


class Model:
    """A family's small configuration, and the safetensors file that fits it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = small(config)
        self.tensors = tensors_of(read_architecture(self.config, {}, origin="seed"), self.config["model_type"])
        self.file = safetensors(to_json(header_of(self.tensors)), content_of(self.tensors))


class ConfigFile(Subject):
    """config.json and generation_config.json of every family: converted, printed and laid out."""

    name = "config"
    file = "hub/config.json"
    named = ("hub",)
    commands = ("convert hub out.h5", "run job.toml")

    def __init__(self, _: Path) -> None:
        self.models = [Model(config) for config in HUB]
        self.keys = sorted({key for model in self.models for key in model.config})

    def write(self, random: Random) -> Any:
        model = random.choice(self.models)
        config = dict(model.config)
        for _ in range(random.choice((0, 0, 1, 2))):
            self.change(random, config)
        folder = Path("hub")
        folder.mkdir()
        text = to_json(mutated(random, config))
        (folder / "config.json").write_bytes(damaged_text(random, text) if random.random() < 0.1 else text)
        if random.random() < 0.3:
            text = to_json(mutated(random, GENERATION))
            (folder / "generation_config.json").write_bytes(
                damaged_text(random, text) if random.random() < 0.1 else text
            )
        (folder / "model.safetensors").write_bytes(model.file)
        Path("job.toml").write_text(JOB)
        Path("prompts.jsonl").write_text('{"tokens": [3, 4, 5], "max_tokens": 3}')

    def change(self, random: Random, config: dict[str, Any]) -> None:
        """Give a key the value that it has in another family, or another rotary embedding."""
        if random.random() < 0.3:
            config[random.choice(("rope_scaling", "rope_parameters"))] = deepcopy(random.choice(ROPES))
            return
        key = random.choice(self.keys)
        config[key] = deepcopy(random.choice(self.models).config.get(key))

    def uses(self, _: Any) -> Sequence[Use]:
        return (lambda: main("convert hub out.h5 --force"), self.lay_out)

    def lay_out(self) -> None:
        main("convert hub out.h5 --force")
        main("inspect out.h5")
        main("run job.toml --world 2")


class CheckpointFolder(Subject):
    """Safetensors files and their index, plain, with 8-bit and 4-bit weights: converted, and values compared."""

    name = "checkpoint"
    file = "hub/model.safetensors"
    named = ("hub",)
    commands = ("convert hub out.h5",)

    def __init__(self, _: Path) -> None:
        models = {model.config["model_type"]: model for model in map(Model, HUB)}
        self.models = [
            models["qwen2_moe"],
            models["olmoe"],
            _with_8_bits(models["deepseek_v2"]),
            _with_4_bits(models["gpt_oss"]),
            *(_packed(models["qwen2_moe"], form) for form in PACKED),
        ]

    def write(self, random: Random) -> Any:
        model = random.choice(self.models)
        folder = Path("hub")
        folder.mkdir()
        (folder / "config.json").write_bytes(to_json(model.config))
        header, content = header_of(model.tensors), content_of(model.tensors)
        kind = random.randrange(10)
        if kind < 2:
            self.write_shards(random, folder, model)
            return
        length = None
        if kind == 2:
            content = damaged(random, content)
        elif kind < 7:
            random.choice(HEADER_CHANGES)(random, header)
        text = to_json(mutated(random, header, changes=1) if kind == 7 else header)
        if kind == 8:
            text = damaged_text(random, text)
        if random.random() < 0.1:
            text += b" " * random.choice((1, 7, 8, 5000))
        if random.random() < 0.05:
            length = int.from_bytes(random.choice(BOUNDARIES), "little") if random.random() < 0.7 else len(text) + 1
        (folder / "model.safetensors").write_bytes(safetensors(text, content, length=length))

    def write_shards(self, random: Random, folder: Path, model: Model) -> None:
        """Two files and an index, one of the three damaged."""
        files = ("a.safetensors", "b.safetensors")
        where = {name: files[index % 2] for index, name in enumerate(model.tensors)}
        for file in files:
            tensors = {name: tensor for name, tensor in model.tensors.items() if where[name] == file}
            (folder / file).write_bytes(safetensors(to_json(header_of(tensors)), content_of(tensors)))
        if random.random() < 0.4:
            strange = (
                "../a.safetensors",
                "/etc/passwd",
                ".safetensors",
                "a.safetensors\0",
                "x/a.safetensors",
                "..",
                "c.safetensors",
            )
            where[random.choice(list(where))] = random.choice(strange)
            (folder / "c.safetensors").symlink_to(
                random.choice(("/etc/passwd", "c.safetensors", "a.safetensors", "/dev/zero"))
            )
        index = to_json(mutated(random, {"metadata": {"total_size": 1}, "weight_map": where}))
        (folder / "model.safetensors.index.json").write_bytes(
            damaged_text(random, index) if random.random() < 0.15 else index
        )

    def uses(self, _: Any) -> Sequence[Use]:
        return (self.convert, lambda: main("convert hub out.h5 --force") or main("inspect out.h5"))

    def convert(self) -> None:
        main("convert hub out.h5 --force")
        with WeightFile.open("out.h5") as file:
            found = {tensor.name: file.read(tensor.name) for tensor in catalogue(file.architecture)}
        path = Path("hub/model.safetensors")
        if not Path("hub/model.safetensors.index.json").exists():
            expected = self.independent(path.read_bytes(), "model.embed_tokens.weight")
            require(expected is None or found["embedding"].tobytes() == expected, "a tensor has other values")

    def independent(self, content: bytes, name: str) -> bytes | None:
        """The bytes of a bfloat16 tensor, read without the program."""
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + length])[name]
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        return content[first:last] if entry["dtype"] == "BF16" else None


def _with_8_bits(model: Model) -> Model:
    """The same checkpoint with two matrices of 8-bit numbers and their scales."""
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        _, shape, _ = model.tensors[name]
        model.tensors[name] = ("F8_E4M3", shape, bytes(index % 120 for index in range(prod(shape))))
        model.tensors[f"{name}_scale_inv"] = ("F32", (1, 1), np.float32(0.5).tobytes())
    model.config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return model


def _packed(model: Model, form: Format) -> Model:
    """The same checkpoint with packed projections of the attention."""
    model, random = deepcopy(model), np.random.default_rng(5)
    for name in [name for name in model.tensors if "self_attn" in name and name.endswith("proj.weight")]:
        _, shape, _ = model.tensors.pop(name)
        parts, _ = form.write(random, shape)
        for suffix, (kind, array) in parts.items():
            model.tensors[f"{name.removesuffix('weight')}{suffix}"] = (kind, array.shape, array.tobytes())
    model.config["quantization_config"] = form.config
    return model


def _with_4_bits(model: Model) -> Model:
    """A checkpoint of inputs of 32 numbers whose experts are blocks of 4-bit numbers with exponents."""
    config = model.config | {"hidden_size": 32, "intermediate_size": 32}
    model = Model(config | {"head_dim": 8})
    model.config |= {"hidden_size": 32, "intermediate_size": 32}
    model.tensors = tensors_of(read_architecture(model.config, {}, origin="seed"), "gpt_oss")
    for name in [name for name in model.tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        _, (experts, inputs, outputs), _ = model.tensors.pop(name)
        shape = (experts, outputs, inputs // 32)
        model.tensors[f"{name}_blocks"] = ("U8", (*shape, 16), bytes(index % 256 for index in range(16 * prod(shape))))
        model.tensors[f"{name}_scales"] = ("U8", shape, bytes(120 + index % 9 for index in range(prod(shape))))
    return model


def overlap(random: Random, header: dict[str, Any]) -> None:
    one, other = random.sample(sorted(header), 2)
    header[one]["data_offsets"] = list(header[other]["data_offsets"])


def shift(random: Random, header: dict[str, Any]) -> None:
    """Offsets a little, or very far, from where they were; the size may stay."""
    offsets = header[random.choice(sorted(header))]["data_offsets"]
    by = random.choice((1, -1, 2, 8, 2**31, 2**40, 2**63, -(2**63), 2**64 - 1))
    offsets[0] += by
    if random.random() < 0.5:
        offsets[1] += by


def reshape(random: Random, header: dict[str, Any]) -> None:
    entry = header[random.choice(sorted(header))]
    shape = entry["shape"]
    entry["shape"] = random.choice(
        (shape[::-1], [1, *shape], [*shape, 1], [prod(shape)], [], [2**62, 2**62, 0], [-1, *shape], [2**32, 2**32])
    )


def retype(random: Random, header: dict[str, Any]) -> None:
    header[random.choice(sorted(header))]["dtype"] = random.choice(DTYPES)


def rename(random: Random, header: dict[str, Any]) -> None:
    name = random.choice(sorted(header))
    others = (
        f"{name}\0x",
        f"{name}s",
        "",
        "k" * 5000,
        name.replace("0", "99999999999"),
        name.replace("layers.", "layers.-"),
    )
    header[random.choice(others)] = header.pop(name)


def add(random: Random, header: dict[str, Any]) -> None:
    """A tensor of no bytes, metadata, or what older programs save."""
    end = max(entry["data_offsets"][1] for entry in header.values())
    name = random.choice(("x", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.7.x.weight"))
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    if random.random() < 0.5:
        header["__metadata__"] = random.choice(({"format": "pt"}, {"a": 1}, [], None, {"k" * 5000: "v" * 5000}))


HEADER_CHANGES: tuple[Callable[[Random, dict[str, Any]], None], ...] = (overlap, shift, reshape, retype, rename, add)


SUBJECTS = (ConfigFile, CheckpointFolder)
