"""Which of the two an op uses, its kernel or its twin, and what else follows from that."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax import native
from swat_jax.errors import UsageError, warn_once

OPS = (
    "threshold",
    "pack",
    "unpack",
    "batch_norm",
    "max_pool",
    "dropout_bits",
    "fold",
    "sparse_conv",
    "compact",
    "sparse_conv_direct",
    "sparse_conv_vector",
)
_BACKENDS = ("cuda", "xla")
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def backend() -> str:
    """The backend in use, "cuda" or "xla".

    Raises:
      UsageError: if `SWAT_JAX_BACKEND` names none, or "cuda" without the library.
    """
    name = os.environ.get("SWAT_JAX_BACKEND", "")
    if name and name not in _BACKENDS:
        raise UsageError(f"SWAT_JAX_BACKEND must be one of {', '.join(_BACKENDS)}; got {name!r}")
    if name == "xla" or (not name and jax.default_backend() != "gpu"):
        return "xla"
    status = native.load()
    if status.available:
        return "cuda"
    if name == "cuda":
        raise UsageError(f"SWAT_JAX_BACKEND is cuda, but {status.reason}")
    warn_once(f"swat_jax trains without its CUDA kernels, slower and larger: {status.reason}")
    return "xla"


def packs() -> bool:
    """Whether saved activations are packed by default: where there are kernels for it."""
    return backend() == "cuda"


def folds(dtype: Any) -> bool:
    """Whether convs of few channels are computed as `swat_jax.convolution.Convolution.folded`.

    It is another order of the same sums, written for cuDNN. The backend decides, whatever device
    the program is compiled for.
    """
    return has_kernel("fold", dtype)


def settled_gradient(dw: jax.Array) -> jax.Array:
    """The gradient of weights as it is, but on a GPU laid out as they are before anyone reads it.

    cuDNN returns it in another layout. An update that reads it across its layout is slow, and is
    not made in place: XLA copies new weights and momentum. Flat, it has one layout only.
    """
    if backend() != "cuda":
        return dw
    return lax.optimization_barrier(dw.ravel()).reshape(dw.shape)


def has_kernel(op: str, dtype: Any) -> bool:
    """Whether an op of `OPS` uses its kernel for floats of a type.

    Raises:
      UsageError: if `SWAT_JAX_XLA_OPS` names what is no op, and as `backend` does.
    """
    disabled = [name for name in os.environ.get("SWAT_JAX_XLA_OPS", "").split(",") if name]
    for name in disabled:
        if name not in OPS:
            raise UsageError(f"SWAT_JAX_XLA_OPS must hold names of {', '.join(OPS)}; got {name!r}")
    return backend() == "cuda" and op not in disabled and dtype in _DTYPES


def gpu_refusal(op: str, dtype: Any) -> str:
    """Why the GPU lacks the tensor cores that an op's kernel needs; empty if it has them.

    Empty too where the twin is used, and on other devices.
    """
    if not has_kernel(op, dtype) or jax.default_backend() != "gpu":
        return ""
    if float(getattr(jax.devices()[0], "compute_capability", "8.0")) >= 8:
        return ""
    return "the GPU is older than compute capability 8.0"
