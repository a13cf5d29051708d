"""Reading of `quantization_config`: how a checkpoint stores matrices in few bits, and what their parts are called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moempi.config.families._reading import CheckpointConfig

METHODS = ("fp8", "compressed-tensors", "gptq", "awq", "modelopt")
MXFP4 = ("mxfp4",)
_CHANNEL, _WHOLE = (1, 0), (0, 0)
_NVFP4_BLOCK, _MXFP4_BLOCK = (1, 16), (1, 32)

Code = Literal["float8", "float4", "signed", "offset"]
Layout = Literal["rows", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """A matrix (outputs, inputs) of numbers q of `bits` bits: its values are (q - zero point) x scale.

    `code` is what the bits of q stand for: a floating-point number (e4m3, e2m1), a signed integer, or an integer whose
    zero point is in `zeros`, without `zeros` 2^(bits - 1). There is one scale, and one zero point, per block of `block`
    (outputs, inputs), where 0 stands for all. The layout "rows" packs along the inputs; "gptq" and "awq" store inputs
    before outputs and pack along the inputs, and along the outputs.

    The other fields name the tensors: `{weight}` is the name of the matrix, `{module}` the same without `.weight`. Of
    several names for scales the first counts that is there. `groups` has the block of each input; if it is not there,
    and need not be, blocks follow each other. `shape` repeats the shape.
    `whole_scale` is one more number that multiplies all scales, or divides them with `divides`. `zero_offset` is added
    to stored zero points, modulo 2^bits. With `rounds`, values have the type of the scales before they are rounded to
    bfloat16. With `outputs_first`, fused experts are (outputs, inputs) also in families that have it the other way.
    """

    code: Code
    block: tuple[int, int]
    bits: int = 8
    layout: Layout = "rows"
    numbers: str = "{weight}"
    scales: tuple[str, ...] = ("{weight}_scale",)
    zeros: str | None = None
    zero_offset: int = 0
    groups: str | None = None
    needs_groups: bool = False
    whole_scale: str | None = None
    divides: bool = False
    shape: str | None = None
    rounds: bool = False
    outputs_first: bool = False


def part_name(pattern: str, weight: str) -> str:
    """The name of a part of the matrix `weight`."""
    return pattern.replace("{weight}", weight).replace("{module}", weight.removesuffix(".weight"))


def read_quantization(config: CheckpointConfig, methods: tuple[str, ...]) -> Quantization | None:
    """How matrices are stored, None if they are not quantized; raises DataError for a method not in `methods`."""
    section = config.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method") if section.has("quant_method") else None
    if method not in methods:
        known = ", ".join(methods)
        raise section.error(
            f"quant_method is {method!r:.60}, only {known} can be read: take the checkpoint in bfloat16"
        )
    return _READERS[method](section)


def _fp8(section: CheckpointConfig) -> Quantization:
    """Blocks as in DeepSeek-V3 (2024, section 3.3), or a scale per matrix as in AutoFP8 and vLLM."""
    section.require("fmt", "e4m3", "float8_e4m3fn", None)
    if section.has("weight_block_size"):
        return Quantization("float8", _block(section, "weight_block_size"), scales=("{weight}_scale_inv",))
    return Quantization("float8", _WHOLE, scales=("{weight}_scale", "{weight}_scale_inv"))


def _modelopt(section: CheckpointConfig) -> Quantization:
    section.require("quant_algo", "FP8", "NVFP4")
    if section.text("quant_algo") == "FP8":
        return Quantization("float8", _WHOLE)
    return Quantization("float4", _NVFP4_BLOCK, bits=4, whole_scale="{weight}_scale_2")


def _mxfp4(_: CheckpointConfig) -> Quantization:
    """Blocks of 32 numbers with one exponent (OCP Microscaling Formats, 2023), as in gpt-oss."""
    return Quantization(
        "float4", _MXFP4_BLOCK, bits=4, numbers="{weight}_blocks", scales=("{weight}_scales",), outputs_first=True
    )


def _gptq(section: CheckpointConfig) -> Quantization:
    section.require("bits", 4, 8)
    section.require("checkpoint_format", "gptq", "gptq_v2", None)
    section.require("format", "gptq", "gptq_v2", None)
    section.require("pack_dtype", "int32", None)
    section.refuse("is_marlin_format", "rotation")
    dynamic = section.section("dynamic")
    if dynamic and any(not pattern.startswith("-:") for pattern in dynamic.others()):
        raise section.error("dynamic gives some matrices other bits: not supported")
    second = "gptq_v2" in (section.others().get("checkpoint_format"), section.others().get("format"))
    return Quantization(
        "offset",
        _group(section),
        bits=section.integer("bits"),
        layout="gptq",
        numbers="{module}.qweight",
        scales=("{module}.scales",),
        zeros="{module}.qzeros",
        zero_offset=0 if second else 1,  # the first version stores each zero point less one
        groups="{module}.g_idx",
        needs_groups=section.option("desc_act"),
        rounds=True,
    )


def _awq(section: CheckpointConfig) -> Quantization:
    section.require("bits", 4)
    section.require("version", "gemm", "GEMM")
    section.require("zero_point", True)
    return Quantization(
        "offset",
        _group(section),
        bits=4,
        layout="awq",
        numbers="{module}.qweight",
        scales=("{module}.scales",),
        zeros="{module}.qzeros",
        rounds=True,
    )


def _compressed(section: CheckpointConfig) -> Quantization:
    section.require("format", *_FORMATS)
    section.refuse("transform_config")
    sparsity = section.section("sparsity_config")
    if sparsity and sparsity.others():
        sparsity.require("format", "dense")  # zeros, if there are any, are stored like other numbers
    groups = section.section("config_groups")
    read = _FORMATS[section.text("format")]
    found = {read(_weights(groups, name)) for name in groups.others()} if groups else set()
    if len(found) != 1:
        raise section.error("config_groups does not have one strategy for all weights")
    return found.pop()


def _weights(groups: CheckpointConfig, name: str) -> CheckpointConfig:
    group = groups.section(name)
    weights = group.section("weights") if group else None
    if weights is None:
        raise groups.error(f"{name} says nothing of weights")
    weights.refuse("dynamic")
    return weights


def _plain(weights: CheckpointConfig) -> Quantization:
    """Numbers of 8 bits that are not packed."""
    weights.require("type", "float", "int")
    weights.require("num_bits", 8)
    weights.require("symmetric", True)
    weights.require("strategy", "channel", "tensor", "block")
    code: Code = "float8" if weights.text("type") == "float" else "signed"
    return Quantization(code, _strategy(weights), rounds=True)


def _packed(weights: CheckpointConfig) -> Quantization:
    weights.require("type", "int")
    weights.require("num_bits", 4, 8)
    weights.require("strategy", "channel", "group")
    weights.require("actorder", None, False, "static", "weight")
    return Quantization(
        "offset",
        _strategy(weights),
        bits=weights.integer("num_bits"),
        numbers="{weight}_packed",
        zeros=None if weights.flag("symmetric") else "{weight}_zero_point",
        shape="{weight}_shape",
        rounds=True,
    )


def _nvfp4(weights: CheckpointConfig) -> Quantization:
    weights.require("strategy", "tensor_group")
    return Quantization(
        "float4",
        _float4_block(weights, 16),
        bits=4,
        numbers="{weight}_packed",
        whole_scale="{weight}_global_scale",
        divides=True,
    )


def _compressed_mxfp4(weights: CheckpointConfig) -> Quantization:
    weights.require("strategy", "group")
    return Quantization("float4", _float4_block(weights, 32), bits=4, numbers="{weight}_packed")


def _float4_block(weights: CheckpointConfig, size: int) -> tuple[int, int]:
    weights.require("type", "float")
    weights.require("num_bits", 4)
    weights.require("symmetric", True)
    weights.require("group_size", size)
    return 1, size


def _strategy(weights: CheckpointConfig) -> tuple[int, int]:
    strategy = weights.text("strategy")
    if strategy == "block":
        return _block(weights, "block_structure")
    if strategy == "group":
        return _group(weights)
    return _CHANNEL if strategy == "channel" else _WHOLE


def _group(section: CheckpointConfig) -> tuple[int, int]:
    size = section.integer("group_size")
    if size < 1 and size != -1:
        raise section.error(f"group_size = {size} is not supported, only a positive size or -1")
    return 1, max(size, 0)


def _block(section: CheckpointConfig, key: str) -> tuple[int, int]:
    sizes = section.integers(key)
    if len(sizes) != 2 or min(sizes) < 1:
        raise section.error(f"{key} = {list(sizes)} is not supported, only two positive sizes")
    return sizes[0], sizes[1]


_READERS: dict[str, Callable[[CheckpointConfig], Quantization]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
_FORMATS: dict[str, Callable[[CheckpointConfig], Quantization]] = {
    "float-quantized": _plain,
    "int-quantized": _plain,
    "naive-quantized": _plain,
    "pack-quantized": _packed,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _compressed_mxfp4,
}
