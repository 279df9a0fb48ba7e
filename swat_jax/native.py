"""The compiled kernels of ``ops/``: finding the library, and making XLA know its handlers.

Nothing here decides whether they are used; that is `swat_jax.kernels`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import re
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from swat_jax.errors import UsageError

LIBRARY = "libswat_jax_ops.so"
VARIABLE = "SWAT_JAX_LIBRARY"
HOW_TO_GET_IT = "reinstall swat_jax from its sources with nvcc (CUDA 12 or newer) in PATH"

# Handlers are exported as swat_jax_<name>, and registered under the same name.
HANDLERS = (
    "threshold",
    "thresholds",
    "pack",
    "unpack",
    "batch_norm_statistics",
    "batch_norm_relu",
    "batch_norm_gradient_sums",
    "batch_norm_gradient",
    "max_pool_gradient",
    "dropout_bits",
    "sparse_conv_weight_gradient",
    "compact",
    "sparse_conv_direct",
    "sparse_conv_vector_lists",
    "sparse_conv_vector_forward",
)


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether the kernels can be called, and one line on why or why not."""

    available: bool
    reason: str
    path: Path | None = None
    # "version", "cuda" and "architectures" of the library, once that much could be read.
    build_info: Mapping[str, str] = dataclasses.field(default_factory=dict)


_lock = threading.RLock()
_registered: Status | None = None
_refused: dict[Path, Status] = {}


def load() -> Status:
    """Loads the library and registers its handlers, at the first call that finds it.

    It works without a GPU, so that programs can be lowered for one. The library is the one that
    the environment variable ``SWAT_JAX_LIBRARY`` names, else the one that was installed.

    Raises:
      UsageError: if the variable names no file. A library that is absent or cannot be used is a
        `Status`.
    """
    global _registered
    with _lock:
        if _registered is not None:
            return _registered
        path = _find()
        if path is None:
            return Status(False, f"the kernels were not built: {HOW_TO_GET_IT}")
        if path not in _refused:
            status = _load(path)
            if status.available:
                _registered = status
                return status
            _refused[path] = status
        return _refused[path]


def jaxlib_ffi_minor() -> int | None:
    """The minor version of XLA's FFI in the installed jaxlib, or None if its headers are gone."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        found = re.search(r"^#define XLA_FFI_API_MINOR (\d+)", header.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def _find() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).resolve()
        if not path.is_file():
            raise UsageError(f"{VARIABLE} must be the path of {LIBRARY}; got {named!r}, no file")
        return path
    return next((path for path in _places() if path.is_file()), None)


def _places() -> Iterator[Path]:
    """Where an installation may have put the library."""
    # A package installed in editable mode has two folders: its sources, and what was built.
    spec = importlib.util.find_spec("swat_jax")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield Path(folder, LIBRARY)
    # Python run in the folder of the sources imports those, not the package installed from them.
    yield Path(sysconfig.get_path("platlib"), "swat_jax", LIBRARY)


def _load(path: Path) -> Status:
    info: Mapping[str, str] = {}

    def refuse(why: str) -> Status:
        return Status(False, f"{path} cannot be used: {why}; {HOW_TO_GET_IT}", path, info)

    try:
        library = ctypes.CDLL(str(path))
        library.swat_jax_build_info.restype = ctypes.c_char_p
        info = json.loads(library.swat_jax_build_info())
        built_for = int(library.swat_jax_ffi_api_minor())
        handlers = {f"swat_jax_{name}": library[f"swat_jax_{name}"] for name in HANDLERS}
    except OSError as error:
        return refuse(str(error).removeprefix(f"{path}: "))
    except (AttributeError, TypeError, ValueError) as error:
        return refuse(f"it is not a swat_jax library of this version ({error})")
    # XLA checks this too, but a handler it refuses takes the whole backend down with it.
    offered = jaxlib_ffi_minor()
    if offered is None:
        return refuse("this jaxlib has no headers that tell which XLA FFI it speaks")
    if built_for > offered:
        return refuse(f"it needs XLA FFI 0.{built_for}, this jaxlib has 0.{offered}")
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="CUDA")
    return Status(True, f"{path} is loaded", path, info)
