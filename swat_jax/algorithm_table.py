"""Which algorithms were measured to be the fastest: a table per kind of device, as a JSON file.

`swat_jax.tune` writes tables to the user's cache directory, training looks there first, and then
among those that come with the package. A table is used on devices of its kind, with the version of
swat_jax and the backend that it was made with, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from swat_jax import files, sparse_convolution
from swat_jax.candidates import OPS, Problem
from swat_jax.errors import UsageError

# Those that were measured for everybody.
SHIPPED = Path(__file__).parent / "tables"


@dataclasses.dataclass(frozen=True)
class Times:
    """What was measured of one op of a layer.

    Attributes:
      chosen: the algorithm that is used.
      milliseconds: algorithm -> time, of all that computed the right result.
      refused: candidate -> why it does not take the layer.
      wrong: algorithm -> what was wrong with its result, or how it failed.
    """

    chosen: str
    milliseconds: Mapping[str, float]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured on one kind of device.

    Attributes:
      device: its kind, as `jax.Device.device_kind` has it.
      version: of swat_jax.
      backend: "cuda" or "xla", see `swat_jax.kernels.backend`.
      layers: `name_of` a layer -> op -> its times; of ops that were timed.
      made_with: versions of other things and the date, for people.
    """

    device: str
    version: str
    backend: str
    layers: Mapping[str, Mapping[str, Times]] = dataclasses.field(default_factory=dict)
    made_with: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def with_layers(self, layers: Mapping[str, Mapping[str, Times]]) -> Table:
        """This table with more layers and ops, or other times of the same ones."""
        merged = {name: {**self.layers.get(name, {}), **ops} for name, ops in layers.items()}
        return dataclasses.replace(self, layers={**self.layers, **merged})


def package_version() -> str:
    """That of swat_jax, "unknown" where it is not installed."""
    try:
        return importlib.metadata.version("swat-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def name_of(problem: Problem, weight_sparsity: float, activation_sparsity: float) -> str:
    """What tells a layer from others whose times may differ.

    Args:
      problem: what it computes.
      weight_sparsity: fraction of zeros in its weights.
      activation_sparsity: fraction of zeros in its saved input.

    Example:
      >>> import numpy as np
      >>> name_of(Problem.linear((8, 64), (64, 10), np.dtype("float32")), 0.9, 0.8)
      'linear 8x1x1x64 1x1x64x10, float32, unstructured 0.9, input 0.8'
    """
    conv = problem.conv
    kind = "linear" if problem.is_linear else "conv"
    pads = sparse_convolution.pads(conv, problem.x[1:-1], problem.kernel[:-2])
    unusual = {
        "strides": _shape(conv.strides) if max(conv.strides) > 1 else "",
        "padding": " ".join(f"{a}+{b}" for a, b in pads) if any(map(any, pads)) else "",
        "input dilation": _shape(conv.input_dilation) if max(conv.input_dilation) > 1 else "",
        "kernel dilation": _shape(conv.kernel_dilation) if max(conv.kernel_dilation) > 1 else "",
        "groups": str(conv.feature_group_count) if conv.feature_group_count > 1 else "",
        "precision": _precision(problem),
        "result": "" if conv.preferred_element_type is None else str(conv.preferred_element_type),
    }
    parts = [f"{kind} {_shape(problem.x)} {_shape(problem.kernel)}"]
    parts += [f"{name} {value}" for name, value in unusual.items() if value]
    parts += [str(problem.dtype), f"{problem.granularity} {weight_sparsity:.6g}"]
    parts += [f"input {activation_sparsity:.6g}{' packed' if problem.is_packed else ''}"]
    return ", ".join(parts)


def _precision(problem: Problem) -> str:
    """That of its products, where it is not what XLA takes by itself.

    `jax.default_matmul_precision` matters to float32 alone: on a GPU it says whether the plain way
    uses TensorFloat-32, which is several times as fast.
    """
    if problem.conv.precision is not None:
        return str(problem.conv.precision).lower()
    default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return str(default) if default is not None and str(problem.dtype) == "float32" else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def path_of(device: str) -> Path:
    """The file of a kind of device, and of this version, in the user's cache directory.

    That is ``swat_jax`` in ``XDG_CACHE_HOME``, by default ``~/.cache``.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "swat_jax", f"{_slug(device)}-{package_version()}.json")


def shipped_path(device: str) -> Path:
    """The file of a kind of device that comes with the package, if one does."""
    return SHIPPED / f"{_slug(device)}.json"


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def find(device: str, backend: str) -> tuple[Table, list[str]]:
    """The table that holds for devices of a kind.

    What the user measured stands before what comes with the package, op by op.

    Args:
      device: the kind.
      backend: that is in use.

    Returns:
      The table, empty where nothing was measured; and what was found but does not hold, told.

    Raises:
      UsageError: a file that is not a table.
    """
    table = Table(device, package_version(), backend)
    left = []
    for path in (shipped_path(device), path_of(device)):
        if not path.is_file():
            continue
        found = read(path)
        if why := _differs(found, table):
            left.append(f"{path} is not used: {why}")
        else:
            table = table.with_layers(found.layers)
    return table, left


def _differs(found: Table, here: Table) -> str:
    for name in ("device", "version", "backend"):
        given, wanted = getattr(found, name), getattr(here, name)
        if given != wanted:
            return f"it is of {name} {given}, this is {wanted}"
    return ""


def read(path: Path) -> Table:
    """Reads a table.

    Raises:
      UsageError: there is no such file, or it is not a table.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the table {path}: {error.strerror}") from error
    except ValueError as error:
        raise _no_table(path) from error
    try:
        return Table(
            *(_text(found[name]) for name in ("device", "version", "backend")),
            layers={
                name: {_known(op): Times(**times) for op, times in ops.items()}
                for name, ops in found["layers"].items()
            },
            made_with=found["made_with"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_table(path) from error


def _known(op: str) -> str:
    if op not in OPS:
        raise KeyError(op)
    return op


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _no_table(path: Path) -> UsageError:
    return UsageError(
        f"{path} is not a table of algorithms; delete it, python -m swat_jax.tune makes another"
    )


def write(path: Path, table: Table) -> None:
    """Writes a table so that a reader never sees half of it; makes its folder.

    Raises:
      UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(path, json.dumps(dataclasses.asdict(table), indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write the table {path}: {error.strerror}") from error
