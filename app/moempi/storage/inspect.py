"""What `moempi inspect` shows of a weight file, a results file, or any HDF5 file, without reading its arrays."""

from math import prod
from pathlib import Path
from typing import Any

import msgspec
from h5py import h5a, h5d, h5g, h5t
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from moempi.config.architecture import Architecture
from moempi.config.tensors import Tensor, catalogue
from moempi.errors import DataError
from moempi.storage import hdf5
from moempi.storage.weights import FORMAT, WeightFile

MAX_DATASETS_SHOWN = 2000


def describe(path: str | Path) -> RenderableType:
    """A description of a weight file (its model, parameters, bytes) or of any other HDF5 file (its datasets).

    Raises NoInputError when the file cannot be read, DataError when it is damaged or not HDF5.
    """
    with hdf5.open_file(path) as file:
        if hdf5.read_attribute(file, "format") != FORMAT:
            return _datasets_table(file)
    with WeightFile.open(path) as weights:
        return Group(_model_table(weights), _bytes_table(weights.architecture))


def num_parameters(architecture: Architecture) -> int:
    """Number of weights of the model."""
    return sum(prod(tensor.shape) for tensor in catalogue(architecture))


def num_active_parameters(architecture: Architecture) -> int:
    """Number of weights that one token meets: of each MoE layer's experts only the `top_k` chosen."""
    chosen, num = architecture.experts.router.top_k, architecture.experts.num
    return sum(
        prod(tensor.shape) // num * chosen if _part(tensor) == "experts" else prod(tensor.shape)
        for tensor in catalogue(architecture)
    )


def _model_table(weights: WeightFile) -> Table:
    architecture = weights.architecture
    table = Table("field", "value", title=escape(str(weights.path)))
    table.add_row("fingerprint", weights.fingerprint)
    table.add_row("parameters", f"{num_parameters(architecture):,}")
    table.add_row("active per token", f"{num_active_parameters(architecture):,}")
    table.add_row("MoE layers", f"{len(architecture.moe_layers)} of {architecture.num_layers}")
    table.add_row("tokenizer", f"{len(weights.tokenizer):,} characters" if weights.tokenizer else "none")
    for key, value in _flat(msgspec.to_builtins(architecture)):
        table.add_row(key, escape(str(value)))
    return table


def _bytes_table(architecture: Architecture) -> Table:
    table = Table("part", "tensors", "parameters", "bytes", title="parts")
    parts: dict[str, list[Tensor]] = {}
    for tensor in catalogue(architecture):
        parts.setdefault(_part(tensor), []).append(tensor)
    for part, tensors in parts.items():
        sizes = sum(prod(tensor.shape) for tensor in tensors), sum(tensor.num_bytes for tensor in tensors)
        table.add_row(part, str(len(tensors)), *(f"{size:,}" for size in sizes))
    return table


def _part(tensor: Tensor) -> str:
    """The part of the model a tensor belongs to: `layers/003/experts/gate` to `experts`, norms together."""
    if len(tensor.shape) == 1:
        return "norms"
    return tensor.name.split("/")[2] if tensor.name.startswith("layers/") else tensor.name


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _datasets_table(file: Any) -> RenderableType:
    attributes = Table("attribute", "value", title=escape(str(file.filename)))
    for name in _attribute_names(file["/"].id):
        attributes.add_row(escape(name), escape(_attribute(file, name)))
    table = Table("dataset", "shape", "type", "units", title="datasets")
    names = [name for name, is_group in hdf5.walk(file) if not is_group]
    for name in names[:MAX_DATASETS_SHOWN]:
        with hdf5.raising_data_errors(file.filename, name):
            dataset = _open(file, name)
            units = _attribute(file, "units", owner=dataset)
            table.add_row(escape(name), str(tuple(dataset.shape)), _type_name(dataset.get_type()), escape(units))
    more = len(names) - MAX_DATASETS_SHOWN
    return Group(attributes, table, *([f"and {more} more"] if more > 0 else []))


def _open(file: Any, name: str) -> Any:
    """A dataset that `walk` found, so behind hard links, of which only the description is read."""
    *parents, last = name.encode().split(b"/")
    group = file["/"].id
    for part in parents:
        group = h5g.open(group, part)
    return h5d.open(group, last)


def _attribute_names(owner: Any) -> list[str]:
    return [h5a.open(owner, index=index).name.decode(errors="replace") for index in range(h5a.get_num_attrs(owner))]


def _attribute(file: Any, name: str, *, owner: Any = None) -> str:
    try:
        value = hdf5.read_attribute(file, name, owner=owner)
    except DataError:
        return "(not shown: neither a number nor fixed-length text)"
    return "" if value is None else str(value)


def _type_name(kind: Any) -> str:
    if kind.equal(hdf5.FILE_TYPES["bfloat16"]):
        return "bfloat16"
    if isinstance(kind, h5t.TypeStringID):
        return "text"
    return str(kind.dtype) if isinstance(kind, (h5t.TypeIntegerID, h5t.TypeFloatID)) else type(kind).__name__
