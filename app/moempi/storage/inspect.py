"""What a weight file, a results file or any HDF5 file holds, without reading its arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from h5py import h5a, h5d, h5g, h5t

from moempi.config.architecture import Architecture
from moempi.config.tensors import Tensor, catalogue
from moempi.errors import DataError
from moempi.storage import hdf5
from moempi.storage.weights import FORMAT, WeightFile

MAX_DATASETS = 2000


@dataclass(frozen=True, slots=True)
class PartSize:
    """The size of all tensors of one part of a model, for example of its experts."""

    name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightContents:
    """A weight file's model, the number of characters of its tokenizer, 0 without one, and its templates' names."""

    path: Path
    fingerprint: str
    architecture: Architecture
    tokenizer_length: int
    chat_templates: Sequence[str]
    parts: Sequence[PartSize]


@dataclass(frozen=True, slots=True)
class DatasetContents:
    """Name, shape and type of a dataset, and its attribute `units`, "" without one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    units: str


@dataclass(frozen=True, slots=True)
class FileContents:
    """The attributes of an HDF5 file's root, and its first MAX_DATASETS datasets; `num_left_out` counts the rest."""

    path: Path
    attributes: Mapping[str, str]
    datasets: Sequence[DatasetContents]
    num_left_out: int


def inspect(path: str | Path) -> WeightContents | FileContents:
    """The model and its size for a weight file, the datasets for any other HDF5 file.

    Raises NoInputError if the file cannot be read, DataError if it is damaged, not HDF5, or contains links.
    """
    with hdf5.open_file(path) as file:
        if hdf5.read_attribute(file, "format") != FORMAT:
            return _file_contents(file)
    with WeightFile.open(path) as weights:
        return WeightContents(
            path=Path(weights.path),
            fingerprint=weights.fingerprint,
            architecture=weights.architecture,
            tokenizer_length=len(weights.tokenizer or ""),
            chat_templates=list(weights.chat.templates) if weights.chat else [],
            parts=_part_sizes(weights.architecture),
        )


def num_parameters(architecture: Architecture) -> int:
    """Number of weights of the model."""
    return sum(prod(tensor.shape) for tensor in catalogue(architecture))


def num_active_parameters(architecture: Architecture) -> int:
    """Number of weights that one token uses: of each MoE layer's experts only `top_k`."""
    chosen, num = architecture.experts.router.top_k, architecture.experts.num
    return sum(
        prod(tensor.shape) // num * chosen if _part(tensor) == "experts" else prod(tensor.shape)
        for tensor in catalogue(architecture)
    )


def _part_sizes(architecture: Architecture) -> list[PartSize]:
    parts: dict[str, list[Tensor]] = {}
    for tensor in catalogue(architecture):
        parts.setdefault(_part(tensor), []).append(tensor)
    return [
        PartSize(
            name,
            num_tensors=len(tensors),
            num_parameters=sum(prod(tensor.shape) for tensor in tensors),
            num_bytes=sum(tensor.num_bytes for tensor in tensors),
        )
        for name, tensors in parts.items()
    ]


def _part(tensor: Tensor) -> str:
    """The part of the model that has a tensor: "experts" for `layers/003/experts/gate`, "norms" for every vector."""
    if len(tensor.shape) == 1:
        return "norms"
    return tensor.name.split("/")[2] if tensor.name.startswith("layers/") else tensor.name


def _file_contents(file: Any) -> FileContents:
    names = [name for name, is_group in hdf5.walk(file) if not is_group]
    attributes = {name: _attribute(file, name) for name in _attribute_names(file["/"].id)}
    datasets = [_dataset_contents(file, name) for name in names[:MAX_DATASETS]]
    return FileContents(Path(file.filename), attributes, datasets, num_left_out=max(0, len(names) - MAX_DATASETS))


def _dataset_contents(file: Any, name: str) -> DatasetContents:
    with hdf5.raising_data_errors(file.filename, name):
        dataset = _open(file, name)
        units = _attribute(file, "units", owner=dataset)
        return DatasetContents(name, tuple(dataset.shape), _type_name(dataset.get_type()), units)


def _open(file: Any, name: str) -> Any:
    """The dataset, opened over hard links only, as `walk` found it; its values are not read."""
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
