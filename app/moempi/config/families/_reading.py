"""Typed reading of a checkpoint's config.json, with errors that name the key."""

from collections.abc import Collection, Mapping
from typing import Any

from moempi.config.architecture import MAX_LAYERS
from moempi.config.reading import MAX_MESSAGE_LENGTH
from moempi.errors import DataError

_SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})


class CheckpointConfig:
    """The content of config.json and of generation_config.json ({} if there is none), read by key.

    A key may have several spellings; all that are present must agree. There are no defaults, because the class defaults
    of model libraries differ from the checkpoints. Every method raises DataError that names file and key, and
    `refuse_unknown` for keys that nobody read.
    """

    def __init__(self, values: Mapping[str, Any], generation: Mapping[str, Any], *, origin: str) -> None:
        self.origin = origin
        self._values = values
        self._generation = generation
        self._read: set[str] = set()

    def integer(self, *spellings: str) -> int:
        """The integer under any of `spellings`."""
        value = self._required(spellings)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"{spellings[0]} is {value!r}, not an integer")
        return value

    def number(self, *spellings: str) -> float:
        """The number under any of `spellings`."""
        value = self._required(spellings)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(f"{spellings[0]} is {value!r}, not a number")
        return self._float(spellings[0], value)

    def text(self, key: str) -> str:
        """The text under `key`."""
        value = self._required((key,))
        if not isinstance(value, str):
            raise self.error(f"{key} is {value!r}, not a text")
        return value

    def flag(self, *spellings: str) -> bool:
        """The truth value under any of `spellings`."""
        value = self._required(spellings)
        if not isinstance(value, bool):
            raise self.error(f"{spellings[0]} is {value!r}, not true or false")
        return value

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self._get(key) is not None

    def option(self, key: str, *, absent: bool = False) -> bool:
        """The truth value under `key`; `absent` for checkpoints older than the option."""
        return self.flag(key) if self.has(key) else absent

    def constant(self, key: str, *, absent: float) -> float:
        """The number under `key`; `absent`, the family's constant, if the key is missing."""
        return self.number(key) if self.has(key) else absent

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of integers under `key`; empty when null or absent."""
        value = self._get(key)
        return self._integers(key, [] if value is None else value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """The list of numbers under `key`."""
        values = self._required((key,))
        if not isinstance(values, list) or any(not isinstance(v, int | float) or isinstance(v, bool) for v in values):
            raise self.error(f"{key} is {values!r}, not numbers")
        return tuple(self._float(key, value) for value in values)

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of texts under `key`."""
        values = self._required((key,))
        if not isinstance(values, list) or any(not isinstance(value, str) for value in values):
            raise self.error(f"{key} is {values!r}, not texts")
        return tuple(values)

    def tokens(self, key: str) -> tuple[int, ...]:
        """The token or tokens under `key`; generation_config.json has precedence."""
        own, value = self._get(key), self._generation.get(key)
        if value is None:
            value = own
        if value is None:
            return ()
        return tuple(dict.fromkeys(self._integers(key, value if isinstance(value, list) else [value])))

    def require(self, key: str, *supported: Any) -> None:
        """Raise unless `key` has one of the values `supported`."""
        value = self._get(key)
        if value not in supported:
            known = " or ".join(repr(choice) for choice in supported)
            raise self.error(f"{key} = {value!r} is not supported, only {known}")

    def refuse(self, *keys: str) -> None:
        """Raise if one of `keys` has a value other than null, false, 0 or empty."""
        for key in keys:
            if self._get(key):
                raise self.error(f"{key} = {self._values[key]!r} is not supported")

    def ignore(self, *keys: str) -> None:
        """Say that `keys` change nothing beside the values that were read."""
        self._read.update(keys)

    def refuse_unknown(self, harmless: Collection[str]) -> None:
        """Raise if a key that was not read, and is not `harmless`, has a value other than null or empty."""
        for key, value in self._values.items():
            if key not in self._read and key not in harmless and value not in _SAYS_NOTHING:
                raise self.error(
                    f"{key:.60} = {value!r:.60} is not known: it may change the arithmetic; remove it if it does not"
                )

    def section(self, key: str) -> "CheckpointConfig | None":
        """The object under `key`, None when null or absent."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{key} is {value!r}, not an object")
        return CheckpointConfig(value, {}, origin=f"{self.origin}: {key}")

    def only(self, *known: str) -> None:
        """Raise if this object has keys other than `known`."""
        for key in self._values:
            if key not in known and self.has(key):
                raise self.error(f"{key} = {self._values[key]!r} is not supported")

    def others(self, *known: str) -> dict[str, Any]:
        """The values of this object under keys other than `known`, without nulls."""
        return {key: value for key, value in self._values.items() if key not in known and value is not None}

    def error(self, message: str) -> DataError:
        """A DataError about this file."""
        return DataError(f"{self.origin}: {message[:MAX_MESSAGE_LENGTH]}")

    def _get(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _float(self, key: str, value: float) -> float:
        try:
            return float(value)
        except OverflowError as error:
            raise self.error(f"{key}: {error}") from error

    def _required(self, spellings: tuple[str, ...]) -> Any:
        found = [self._values[key] for key in spellings if self.has(key)]
        if not found:
            raise self.error(f"{' or '.join(spellings)} is missing")
        if any(value != found[0] for value in found):
            raise self.error(f"{' and '.join(spellings)} differ")
        return found[0]

    def _integers(self, key: str, values: Any) -> tuple[int, ...]:
        if not isinstance(values, list) or any(not isinstance(v, int) or isinstance(v, bool) for v in values):
            raise self.error(f"{key} is {values!r}, not integers")
        return tuple(values)


def num_layers(config: CheckpointConfig) -> int:
    """The number of layers, at most MAX_LAYERS."""
    number = config.integer("num_hidden_layers")
    if not 1 <= number <= MAX_LAYERS:
        raise config.error(f"num_hidden_layers is {number}, not 1 to {MAX_LAYERS}")
    return number


def num_predicting_layers(config: CheckpointConfig) -> int:
    """How many layers after the model's predict further tokens, at most MAX_LAYERS: the larger of two keys."""
    numbers = {key: config.integer(key) for key in ("num_nextn_predict_layers", "num_mtp_modules") if config.has(key)}
    for key, number in numbers.items():
        if not 0 <= number <= MAX_LAYERS:
            raise config.error(f"{key} is {number}, not 0 to {MAX_LAYERS}")
    return max(numbers.values(), default=0)


def head_dim(config: CheckpointConfig) -> int:
    """Size of a head: `head_dim`, or width / heads for checkpoints without the key."""
    if config.has("head_dim"):
        return config.integer("head_dim")
    return config.integer("hidden_size") // max(1, config.integer("num_attention_heads"))


def dense_layers(config: CheckpointConfig) -> tuple[int, ...]:
    """The layers without experts: `mlp_only_layers`, and the layers that `decoder_sparse_step` skips."""
    layers = range(num_layers(config))
    step, listed = config.integer("decoder_sparse_step"), config.integers("mlp_only_layers")
    if step < 1:
        raise config.error(f"decoder_sparse_step is {step}, not a positive number")
    if any(layer not in layers for layer in listed):
        raise config.error(f"mlp_only_layers {list(listed)} names a layer that is not there")
    return tuple(layer for layer in layers if layer in listed or (layer + 1) % step)


def leading_dense_layers(config: CheckpointConfig) -> tuple[int, ...]:
    """The layers without experts: those that `mlp_layer_types` calls dense, or the first `first_k_dense_replace`."""
    config.require("moe_layer_freq", 1, None)
    if not config.has("mlp_layer_types"):
        return _leading_layers(config)
    types = config.texts("mlp_layer_types")
    if len(types) != num_layers(config) or not set(types) <= {"dense", "sparse"}:
        raise config.error(f"mlp_layer_types is not dense or sparse for each layer: {list(types)}")
    dense = tuple(layer for layer, kind in enumerate(types) if kind == "dense")
    if config.has("first_k_dense_replace") and dense != _leading_layers(config):
        raise config.error("mlp_layer_types and first_k_dense_replace differ")
    return dense


def _leading_layers(config: CheckpointConfig) -> tuple[int, ...]:
    return tuple(range(min(config.integer("first_k_dense_replace"), num_layers(config))))


def windowed_layers(config: CheckpointConfig) -> tuple[int, ...]:
    """The layers of type sliding_attention in `layer_types`."""
    return layers_of_kind(config, "sliding_attention")


def layers_of_kind(config: CheckpointConfig, kind: str) -> tuple[int, ...]:
    """The layers of this type in `layer_types`; all others must be of type full_attention."""
    types = config.texts("layer_types")
    if len(types) != num_layers(config) or not set(types) <= {kind, "full_attention"}:
        raise config.error(f"layer_types is not {kind} or full_attention for each layer: {list(types)}")
    return tuple(layer for layer, of_layer in enumerate(types) if of_layer == kind)
