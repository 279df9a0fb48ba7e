"""Sparse files: named arrays in one safetensors file, the sparse ones as bits and values.

A sparse array ``A`` is two tensors: ``A.bitmap`` (uint8, one bit for every value, the lowest of a
byte first) says which values are not zero, ``A.values`` holds those in order. Any other array is a
tensor under its own name. What the file's header holds besides, as safetensors' metadata, is
``format``, ``sparse`` (shape and type of every sparse array), ``facts`` (JSON of the writer's own)
and ``sha256`` of all that.

Files are read as data alone: nothing in one is executed, and no more memory is asked for than a
hundred times the file's size, however large an array it claims to hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from swat_jax.errors import UsageError
from swat_jax.files import replace_bytes

FORMAT = "swat_jax sparse 1"

_TYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(bool),
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
}
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_BITMAP, _VALUES = ".bitmap", ".values"
_MOST_AXES = 32


class SparseFile(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by name; sparse ones with their zeros, in the type that they were given in.
      sparse: the names of those.
      facts: what the writer had to say.
    """

    arrays: dict[str, np.ndarray]
    sparse: frozenset[str]
    facts: dict[str, Any]


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    sparse: Collection[str] = (),
    facts: Mapping[str, Any] | None = None,
    values: str | None = None,
) -> int:
    """Writes a file, in place of what was there.

    Args:
      path: the file.
      arrays: by name.
      sparse: names of floating-point arrays to write as bits and values. What is not zero is told
        by the bits of a value, so that -0 stays -0.
      facts: anything that JSON can hold.
      values: the type in which values of sparse arrays are written, such as "bfloat16": they are
        rounded. None: as they are.

    Returns:
      The size of the file in bytes.

    Raises:
      UsageError: see `encode`.
      OSError: it cannot be written; what was there stays.

    Example:
      >>> w = np.array([[0, 1.5], [0, 0]], np.float32)
      >>> size = write(Path("w.safetensors"), {"w": w}, sparse=["w"])
      >>> read(Path("w.safetensors")).arrays["w"][0, 1]
      np.float32(1.5)
    """
    data = encode(arrays, sparse=sparse, facts=facts, values=values)
    replace_bytes(path, data)
    return len(data)


def encode(
    arrays: Mapping[str, np.ndarray],
    *,
    sparse: Collection[str] = (),
    facts: Mapping[str, Any] | None = None,
    values: str | None = None,
) -> bytes:
    """The contents of the file that `write` writes; takes the same.

    Raises:
      UsageError: an array, a name or facts that a file cannot hold; or a number that is too large
        or too small for the type of values.

    Example:
      >>> len(encode({"w": np.zeros(800, np.float32)}, sparse=["w"])) < 600
      True
    """
    if values is not None and values not in _FLOATS:
        raise UsageError(f"values must be None or one of {', '.join(_FLOATS)}, got {values!r}")
    if unknown := sorted(set(sparse) - set(arrays)):
        raise UsageError(f"sparse names no array: {', '.join(unknown)}")
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, Any] = {}
    for name, array in arrays.items():
        _check_name(name)
        array = np.asarray(array)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.ndim > _MOST_AXES:
            raise UsageError(f"{name} has {array.ndim} axes, and a file holds at most {_MOST_AXES}")
        if array.dtype not in _TYPES.values():
            raise UsageError(f"{name} has the type {array.dtype}, which a file cannot hold")
        added = {name: np.ascontiguousarray(array).reshape(array.shape)}
        if name in sparse:
            if array.dtype.name not in _FLOATS:
                raise UsageError(
                    f"{name} is to be sparse, and is {array.dtype}, not floating point"
                )
            kept = _bits_of(array) != 0
            held = array.ravel()[kept]
            if values is not None:
                held = _rounded(name, held, values)
            added = {
                name + _BITMAP: np.packbits(kept, bitorder="little"),
                name + _VALUES: held,
            }
            shapes[name] = {"shape": list(array.shape), "dtype": array.dtype.name}
        if taken := sorted(added.keys() & tensors.keys()):
            raise UsageError(f"two arrays would be called {taken[0]} in the file")
        tensors |= added
    try:
        told = json.dumps(dict(facts or {}), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"facts must be what JSON can hold: {error}") from error
    metadata = {"format": FORMAT, "sparse": json.dumps(shapes, sort_keys=True), "facts": told}
    metadata["sha256"] = _digest(tensors, metadata)
    return safetensors.numpy.save(tensors, metadata)


def read(path: Path) -> SparseFile:
    """Reads a file that `write` has written.

    Raises:
      UsageError: there is none, or it is none: damaged, cut off, or made to look like one.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read: {why}") from error
    try:
        return _parse(data)
    except _RefusedError as refused:
        raise UsageError(f"{path} is not a sparse file of swat_jax: {refused}") from refused


class _RefusedError(Exception):
    """Why something is no such file."""


def _parse(data: bytes) -> SparseFile:
    try:
        tensors = {name: _tensor(name, found) for name, found in safetensors.deserialize(data)}
        # It has found the header to be one.
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except safetensors.SafetensorError as error:
        raise _RefusedError(f"no safetensors file ({error})") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise _RefusedError(f"its header cannot be read ({error})") from error
    if metadata.get("format") != FORMAT:
        raise _RefusedError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise _RefusedError("it is damaged, its contents do not have the hash that it names")
    shapes, facts = (_json_of(metadata, key) for key in ("sparse", "facts"))
    arrays: dict[str, np.ndarray] = {}
    for name, about in shapes.items():
        bitmap, values = (tensors.pop(name + end, None) for end in (_BITMAP, _VALUES))
        if bitmap is None or values is None:
            raise _RefusedError(
                f"{name} lacks its {_BITMAP[1:] if bitmap is None else _VALUES[1:]}"
            )
        arrays[name] = _dense(name, about, bitmap, values)
    if taken := sorted(arrays.keys() & tensors.keys()):
        raise _RefusedError(f"{taken[0]} is there twice")
    return SparseFile(arrays | tensors, frozenset(shapes), facts)


def _tensor(name: str, found: Mapping[str, Any]) -> np.ndarray:
    if found["dtype"] not in _TYPES:
        raise _RefusedError(f"{name} has the type {found['dtype']}")
    array = np.frombuffer(found["data"], _TYPES[found["dtype"]]).reshape(found["shape"])
    if array.dtype == bool and np.any(array.view(np.uint8) > 1):
        raise _RefusedError(f"{name} holds what is neither true nor false")
    return array


def _json_of(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"its {key} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise _RefusedError(f"its {key} are no table")
    return found


def _dense(name: str, about: Any, bitmap: np.ndarray, values: np.ndarray) -> np.ndarray:
    about = about if isinstance(about, dict) else {}
    shape, dtype = about.get("shape"), about.get("dtype")
    if not _is_shape(shape) or dtype not in _FLOATS:
        raise _RefusedError(f"{name} has no shape and type that an array can have")
    size = math.prod(shape)
    # Before anything of that size is made: the file has a bit for each of them.
    if bitmap.dtype != np.uint8 or bitmap.shape != (-(-size // 8),):
        raise _RefusedError(f"the bitmap of {name} is not one of {size} values")
    bits = np.unpackbits(bitmap, bitorder="little")
    kept = bits[:size].view(bool)
    if np.any(bits[size:]) or values.dtype.name not in _FLOATS or values.shape != (kept.sum(),):
        raise _RefusedError(f"the values of {name} are not those of its bitmap")
    array = np.zeros(size, dtype)
    array[kept] = values.astype(dtype)
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:  # of sides whose product is 0
        raise _RefusedError(f"{name} has no shape that an array can have ({error})") from error


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        return False
    return all(type(side) is int and 0 <= side < 2**48 for side in shape)


def _check_name(name: Any) -> None:
    try:
        good = isinstance(name, str) and name.encode() and name != "__metadata__"
    except UnicodeEncodeError:
        good = False
    if not good:
        raise UsageError(f"arrays: {name!r} is no name that a file can hold")


def _rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        found = values.astype(dtype)
    lost = (found == 0) & (values != 0) | ~np.isfinite(found) & np.isfinite(values)
    if np.any(lost):
        raise UsageError(f"{name} holds {values[lost][0]}, which {dtype} cannot; give other values")
    return found


def _bits_of(array: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(array).ravel()
    return flat.view(f"u{array.dtype.itemsize}")


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Hash of all that is in a file, but for itself; it tells damage, not who wrote it."""
    found = hashlib.sha256()
    about = {name: [array.dtype.name, list(array.shape)] for name, array in tensors.items()}
    told = {key: value for key, value in metadata.items() if key != "sha256"}
    found.update(json.dumps([about, told], sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()
