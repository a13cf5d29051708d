"""Reading of `quantization_config`: how the scales of a checkpoint's 8-bit matrices are stored."""

from dataclasses import dataclass

from moempi.config.families._reading import CheckpointConfig

FLOAT8 = ("fp8", "compressed-tensors")
MXFP4 = ("mxfp4",)
_CHANNEL, _WHOLE = (1, 0), (0, 0)


@dataclass(frozen=True, slots=True)
class Float8:
    """A matrix NAME of 8-bit numbers has one scale per block of `block` (rows, columns), where 0 stands for all.

    The scales are the tensor NAME + `suffix`.
    """

    block: tuple[int, int]
    suffix: str


def read_quantization(config: CheckpointConfig, methods: tuple[str, ...]) -> Float8 | None:
    """The scales of 8-bit matrices, None if there are none; raises DataError for a method that is not in `methods`."""
    section = config.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method") if section.has("quant_method") else None
    if method not in methods:
        known = " or ".join(methods)
        raise section.error(f"quant_method is {method!r:.60}, only {known} is read: take the checkpoint in bfloat16")
    if method == "fp8":
        section.require("fmt", "e4m3", "float8_e4m3fn", None)
        return Float8(_block(section, "weight_block_size"), "_scale_inv")
    return _compressed(section) if method == "compressed-tensors" else None


def _compressed(section: CheckpointConfig) -> Float8:
    section.require("format", "float-quantized", "naive-quantized")
    section.refuse("kv_cache_scheme")
    groups = section.section("config_groups")
    found = {_group(groups, name) for name in groups.others()} if groups else set()
    if len(found) != 1:
        raise section.error("config_groups does not have one strategy for all weights")
    return Float8(found.pop(), "_scale")


def _group(groups: CheckpointConfig, name: str) -> tuple[int, int]:
    group = groups.section(name)
    weights = group.section("weights") if group else None
    if weights is None:
        raise groups.error(f"{name} says nothing of weights")
    weights.require("type", "float")
    weights.require("num_bits", 8)
    weights.require("symmetric", True)
    weights.require("strategy", "channel", "tensor", "block")
    strategy = weights.text("strategy")
    if strategy == "block":
        return _block(weights, "block_structure")
    return _CHANNEL if strategy == "channel" else _WHOLE


def _block(section: CheckpointConfig, key: str) -> tuple[int, int]:
    sizes = section.integers(key)
    if len(sizes) != 2 or min(sizes) < 1:
        raise section.error(f"{key} = {list(sizes)} is not supported, only two positive sizes")
    return sizes[0], sizes[1]
