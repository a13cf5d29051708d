"""`moempi inspect`: what a weight file, a results file or any HDF5 file holds."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table

from moempi.observe.console import console
from moempi.storage.inspect import (
    FileContents,
    WeightContents,
    inspect,
    num_active_parameters,
    num_parameters,
)


def add_flags(parser: ArgumentParser) -> None:
    """The file."""
    parser.add_argument("file", type=Path, metavar="FILE.h5")


def run(chosen: Namespace) -> int:
    """Print the model and its bytes for a weight file, the datasets for any other."""
    match inspect(chosen.file):
        case WeightContents() as weights:
            console().print(_model_table(weights), _part_table(weights))
        case FileContents() as file:
            console().print(_attribute_table(file), _dataset_table(file))
            if file.num_left_out:
                console().print(f"and {file.num_left_out} more")
    return 0


def _model_table(weights: WeightContents) -> Table:
    architecture = weights.architecture
    table = Table("field", "value", title=str(weights.path))
    table.add_row("fingerprint", weights.fingerprint)
    table.add_row("parameters", f"{num_parameters(architecture):,}")
    table.add_row("active per token", f"{num_active_parameters(architecture):,}")
    table.add_row("MoE layers", f"{len(architecture.moe_layers)} of {architecture.num_layers}")
    table.add_row("tokenizer", f"{weights.tokenizer_length:,} characters" if weights.tokenizer_length else "none")
    table.add_row("chat templates", ", ".join(weights.chat_templates) or "none")
    for key, value in _fields(msgspec.to_builtins(architecture)):
        table.add_row(key, str(value))
    return table


def _fields(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _part_table(weights: WeightContents) -> Table:
    table = Table("part", "tensors", "parameters", "bytes", title="parts")
    for part in weights.parts:
        table.add_row(part.name, str(part.num_tensors), f"{part.num_parameters:,}", f"{part.num_bytes:,}")
    return table


def _attribute_table(file: FileContents) -> Table:
    table = Table("attribute", "value", title=str(file.path))
    for name, value in file.attributes.items():
        table.add_row(name, Group(*value.split("\n")))
    return table


def _dataset_table(file: FileContents) -> Table:
    table = Table("dataset", "shape", "type", "units", title="datasets")
    for dataset in file.datasets:
        table.add_row(dataset.name, str(dataset.shape), dataset.dtype, dataset.units)
    return table
