"""Reading of the rotary embedding from a config.json, in its old and new spellings."""

import math
from typing import Any

from moempi.config.architecture import LongRope, Rope, Yarn
from moempi.config.families._reading import CheckpointConfig

MAX_POSITIONS = 2**31 - 1
MAX_HEAD_DIM = 1 << 16

_ALWAYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
_NAMED = ("rope_theta", "rope_type", "type")
_KINDS = ("default", "yarn", "longrope", "linear", "dynamic", "llama3")
_YARN_AMPLITUDE = ("attention_factor", "mscale", "mscale_all_dim")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SECTIONS = ("mrope_section", "mrope_interleaved")  # of positions in images; a text has one position
_LONGROPE = ("short_factor", "long_factor", "short_mscale", "long_mscale", "original_max_position_embeddings")


def read_rope(config: CheckpointConfig, *, dim: int, interleaved: bool = False, partial: bool = False) -> Rope:
    """The rotary embedding of `dim` numbers of a head; raises DataError for a type that is not supported.

    Families with `partial` rotate the share of the numbers that the configuration gives; others rotate all.
    """
    if not 0 < dim <= MAX_HEAD_DIM:
        raise config.error(f"a head of {dim} numbers is not supported, only of 1 to {MAX_HEAD_DIM}")
    scaling = scaling_of(config)
    common: dict[str, Any] = {"theta": _theta(config), "interleaved": interleaved}
    share = _share(config, scaling, dim=dim)
    if partial:
        if share is None:
            raise config.error("partial_rotary_factor is missing")
        common["dim"] = int(dim * share)
        if common["dim"] < 1:
            raise config.error(f"partial_rotary_factor = {share} leaves nothing of a head of {dim} to rotate")
    elif share not in (None, 1.0):
        raise config.error(f"partial_rotary_factor = {share} is not supported")
    return Rope(**common, **_scaled(config, scaling, theta=common["theta"], dim=common.get("dim", dim)))


def read_positions(config: CheckpointConfig) -> int:
    """The positions of the model: `max_position_embeddings`, or what YaRN lengthens the original ones to."""
    positions = config.integer("max_position_embeddings")
    scaling = scaling_of(config)
    if scaling and rope_kind(scaling) == "yarn":
        lengthened = scaling.number("factor") * scaling.number("original_max_position_embeddings")
        positions = max(positions, int(min(max(lengthened, 0.0), MAX_POSITIONS)))
    chunks = config.section("dual_chunk_attention_config")
    limit = chunks.integer("original_max_position_embeddings") if chunks else positions
    if positions > limit:
        raise config.error(
            f"dual_chunk_attention_config is not supported beyond its {limit} original positions: "
            f"set max_position_embeddings to {limit}"
        )
    return positions


def scaling_of(config: CheckpointConfig) -> CheckpointConfig | None:
    """The object that describes the embedding: `rope_parameters`, or `rope_scaling`, its earlier name."""
    found = [section for key in ("rope_parameters", "rope_scaling") if (section := config.section(key))]
    if len(found) == 2:
        one, other = ({"rope_type": rope_kind(section)} | section.others(*_NAMED) for section in found)
        different = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        if different:
            raise config.error(f"rope_parameters and rope_scaling differ in {', '.join(different)}: remove one of them")
    return found[0] if found else None


def rope_kind(scaling: CheckpointConfig | None) -> str:
    """The type of the embedding, "default" if it is not scaled."""
    kinds = [scaling.text(key) for key in ("rope_type", "type") if scaling.has(key)] if scaling else []
    if scaling and len(set(kinds)) > 1:
        raise scaling.error("rope_type and type differ")
    return kinds[0] if kinds else "default"


def yarn_magnitude(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1: the factor of YaRN on queries and keys for a context `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _scaled(config: CheckpointConfig, scaling: CheckpointConfig | None, *, theta: float, dim: int) -> dict[str, Any]:
    """The fields of Rope that a type other than default has."""
    kind = rope_kind(scaling)
    if scaling is None:
        return {}
    if not (scaling.has("rope_type") or scaling.has("type")):
        scaling.only(*_ALWAYS, *_SECTIONS)
    if kind == "default":  # may keep the numbers of a scaled one, which then say nothing
        scaling.only(*_ALWAYS, *_YARN, *_YARN_AMPLITUDE, *_LLAMA3, *_LONGROPE, *_SECTIONS)
        return {}
    if kind == "yarn":
        return {"amplitude": _yarn_amplitude(scaling), "yarn": _yarn(scaling)}
    if kind == "longrope":
        return _longrope(config, scaling, dim)
    if kind == "linear":
        scaling.only(*_ALWAYS, "factor")
        return {"divisors": (scaling.number("factor"),)}
    if kind == "dynamic":  # changes the frequencies of sequences beyond max_position_embeddings only
        scaling.only(*_ALWAYS, "factor", "original_max_position_embeddings")
        return {}
    if kind == "llama3":
        return {"divisors": _llama3_divisors(scaling, theta=theta, dim=dim)}
    raise scaling.error(f"rope_type = {kind!r} is not supported, only {', '.join(_KINDS)}")


def _theta(config: CheckpointConfig) -> float:
    sections = [config, *(section for key in ("rope_scaling", "rope_parameters") if (section := config.section(key)))]
    theta = [section.number("rope_theta") for section in sections if section.has("rope_theta")]
    if not theta:
        raise config.error("rope_theta is missing")
    if any(value != theta[0] for value in theta):
        raise config.error(f"rope_theta has several values: {theta}")
    return theta[0]


def _share(config: CheckpointConfig, scaling: CheckpointConfig | None, *, dim: int) -> float | None:
    """The share of a head's `dim` numbers that is rotated, None if the configuration does not say it."""
    sections = [section for section in (scaling, config) if section and section.has("partial_rotary_factor")]
    shares = [section.number("partial_rotary_factor") for section in sections]
    if config.has("rotary_dim"):
        rotated = config.integer("rotary_dim")
        if not 0 < rotated <= dim:
            raise config.error(f"rotary_dim is {rotated}, not 1 to the {dim} numbers of a head")
        shares.append(rotated / dim)
    if shares and not 0 < shares[0] <= 1:
        raise config.error(f"partial_rotary_factor = {shares[0]} is not a share of a head, above 0 and at most 1")
    if any(share != shares[0] for share in shares):
        raise config.error(f"partial_rotary_factor and rotary_dim are several shares of a head: {shares}")
    return shares[0] if shares else None


def _longrope(config: CheckpointConfig, scaling: CheckpointConfig, dim: int) -> dict[str, Any]:
    scaling.only(*_ALWAYS, *_LONGROPE)
    short = {"divisors": _factors(scaling, "short_factor", dim), "amplitude": scaling.number("short_mscale")}
    key, positions = "original_max_position_embeddings", read_positions(config)
    original = next((section.integer(key) for section in (config, scaling) if section.has(key)), positions)
    if positions <= original:
        return short
    long = LongRope(original, _factors(scaling, "long_factor", dim), scaling.number("long_mscale"))
    return short | {"long": long}


def _factors(scaling: CheckpointConfig, key: str, dim: int) -> tuple[float, ...]:
    factors = scaling.numbers(key)
    if len(factors) != dim // 2:
        raise scaling.error(f"{key} has {len(factors)} numbers, not {dim // 2}")
    return factors


def _llama3_divisors(scaling: CheckpointConfig, *, theta: float, dim: int) -> tuple[float, ...]:
    """1 for wavelengths that the original positions hold often, the factor for longer ones, a ramp in between."""
    scaling.only(*_ALWAYS, *_LLAMA3)
    factor, low, high = (scaling.number(key) for key in _LLAMA3[:3])
    if theta <= 0 or factor <= 0 or low <= 0 or high <= low:
        raise scaling.error("rope_theta, factor, low_freq_factor, high_freq_factor: need 0 < each, and low < high")
    original = scaling.number("original_max_position_embeddings")
    wavelengths = (2 * math.pi * theta ** (index / dim) for index in range(0, dim, 2))
    shares = ((original / wavelength - low) / (high - low) for wavelength in wavelengths)
    kept = (min(max(share, 0.0), 1.0) for share in shares)
    return tuple(1 / ((1 - share) / factor + share) for share in kept)


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
