"""Reading of the rotary embedding from a config.json, in its old and new spellings."""

import math
from typing import Any

from moempi.config.architecture import Rope, Yarn
from moempi.config.families._reading import CheckpointConfig

_ALWAYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
_YARN_AMPLITUDE = ("attention_factor", "mscale", "mscale_all_dim")
_LONGROPE = ("short_factor", "long_factor", "short_mscale", "long_mscale", "original_max_position_embeddings")


def read_rope(config: CheckpointConfig, *, dim: int, interleaved: bool = False, partial: bool = False) -> Rope:
    """The rotary embedding of `dim` numbers of a head; raises DataError unless default, yarn or longrope.

    Families with `partial` rotate the share of the numbers that the configuration gives; others rotate all.
    """
    scaling = scaling_of(config)
    kind = _kind(scaling)
    common: dict[str, Any] = {"theta": _theta(config), "interleaved": interleaved}
    share = _share(config, scaling)
    if partial:
        if share is None:
            raise config.error("partial_rotary_factor is missing")
        common["dim"] = int(dim * share)
        if common["dim"] < 1:
            raise config.error(f"partial_rotary_factor = {share} leaves nothing of a head of {dim} to rotate")
    elif share not in (None, 1.0):
        raise config.error(f"partial_rotary_factor = {share} is not supported")
    if scaling is None or kind == "default":
        return Rope(**common)
    if kind == "yarn":
        return Rope(**common, amplitude=_yarn_amplitude(scaling), yarn=_yarn(scaling))
    if kind == "longrope":
        scaling.only(*_ALWAYS, *_LONGROPE)
        return Rope(**common, amplitude=scaling.number("short_mscale"), divisors=scaling.numbers("short_factor"))
    raise scaling.error(f"rope_type = {kind!r} is not supported, only 'default', 'yarn' or 'longrope'")


def scaling_of(config: CheckpointConfig) -> CheckpointConfig | None:
    """The object that describes the embedding: `rope_parameters`, or `rope_scaling`, its earlier name."""
    found = [section for key in ("rope_parameters", "rope_scaling") if (section := config.section(key))]
    if len({str(_kind(section)) for section in found}) > 1:
        raise config.error("rope_parameters and rope_scaling differ")
    return found[0] if found else None


def yarn_magnitude(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1: the factor of YaRN on queries and keys for a context `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _kind(scaling: CheckpointConfig | None) -> str | None:
    kinds = [scaling.text(key) for key in ("rope_type", "type") if scaling.has(key)] if scaling else []
    if scaling and len(set(kinds)) > 1:
        raise scaling.error("rope_type and type differ")
    return kinds[0] if kinds else "default"


def _theta(config: CheckpointConfig) -> float:
    sections = [config, *(section for key in ("rope_scaling", "rope_parameters") if (section := config.section(key)))]
    theta = [section.number("rope_theta") for section in sections if section.has("rope_theta")]
    if not theta:
        raise config.error("rope_theta is missing")
    if any(value != theta[0] for value in theta):
        raise config.error(f"rope_theta has several values: {theta}")
    return theta[0]


def _share(config: CheckpointConfig, scaling: CheckpointConfig | None) -> float | None:
    sections = [section for section in (scaling, config) if section and section.has("partial_rotary_factor")]
    return sections[0].number("partial_rotary_factor") if sections else None


def _yarn(scaling: CheckpointConfig) -> Yarn:
    scaling.only(*_ALWAYS, *_YARN, *_YARN_AMPLITUDE)
    return Yarn(
        factor=scaling.number("factor"),
        original_positions=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.constant("beta_fast", absent=32.0),
        beta_slow=scaling.constant("beta_slow", absent=1.0),
        truncate=scaling.option("truncate", absent=True),
    )


def _yarn_amplitude(scaling: CheckpointConfig) -> float:
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    factor = scaling.number("factor")
    mscale, mscale_all_dim = (scaling.constant(key, absent=0.0) for key in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return yarn_magnitude(factor, 1.0)
