"""The ops that have, or will have, a hand-written GPU kernel; the only door to them.

Each op is defined by its jax.numpy twin in `swat_jax.sparsity`. The backend "xla" is the twin
itself, compiled by XLA, and runs everywhere.
"""

from __future__ import annotations

import os

import jax

from swat_jax.errors import UsageError
from swat_jax.sparsity import packing, top_k
from swat_jax.sparsity.packing import Packed

_BACKENDS = ("xla",)


def backend() -> str:
    """The backend in use, chosen by the environment variable ``SWAT_JAX_BACKEND``.

    Raises:
      UsageError: if the variable names none.
    """
    name = os.environ.get("SWAT_JAX_BACKEND", "xla")
    if name not in _BACKENDS:
        raise UsageError(f"SWAT_JAX_BACKEND must be one of {', '.join(_BACKENDS)}; got {name!r}")
    return name


def threshold(x: jax.Array, keep: top_k.Count) -> jax.Array:
    """The ``keep``-th largest magnitude; see `swat_jax.sparsity.top_k.threshold`."""
    backend()
    return top_k.threshold(x, keep)


def sparsify(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """``x`` on its mask, 0 elsewhere; see `swat_jax.sparsity.top_k.sparsify`."""
    backend()
    return top_k.sparsify(x, threshold)


def pack(x: jax.Array, threshold: jax.Array | float, capacity: int) -> Packed:
    """The values on the mask in compact form; see `swat_jax.sparsity.packing.pack`."""
    backend()
    return packing.pack(x, threshold, capacity)


def unpack(packed: Packed) -> jax.Array:
    """The dense form of ``packed``; see `swat_jax.sparsity.packing.unpack`."""
    backend()
    return packing.unpack(packed)
