"""What a weight mask selects: single weights, kernel slices of channel pairs, filters, vectors.

A granularity is a *score* over the units that are kept or dropped together. The K units with
the largest score survive; ties survive too (see `swat_jax.sparsity.top_k`). To add one, write
its score function and enter it in ``_SCORES``; units that share an axis are told apart in
``_VECTORS``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from swat_jax.errors import UsageError
from swat_jax.sparsity import top_k

Shape = tuple[int, ...]


def _weight(kernel: jax.Array) -> jax.Array:
    """One unit per weight, which is its own score: only magnitudes of scores count."""
    return kernel


def _channel_norm(kernel: jax.Array) -> jax.Array:
    """One unit per (input, output) channel pair; the L1 norm of its spatial slice.

    The paper's "structured" sparsity. For a 1x1 kernel it equals ``unstructured``.
    """
    return _l1(kernel, range(kernel.ndim - 2))


def _filter_norm(kernel: jax.Array) -> jax.Array:
    """One unit per output channel; the L1 norm of its whole filter."""
    return _l1(kernel, range(kernel.ndim - 1))


def _l1(kernel: jax.Array, axes: range) -> jax.Array:
    # Half types lose low bits in a sum, which would make ties of what differs.
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    return jnp.sum(jnp.abs(kernel.astype(wide)), axis=tuple(axes), keepdims=True)


def _vector_norm(kernel: jax.Array, length: int) -> jax.Array:
    """One unit per tap, input channel and ``length`` output channels; the L1 norm of these.

    Beyond the paper: what a tensor core can multiply as a whole. The last one may be shorter.
    """
    *front, outputs = kernel.shape
    vectors = -(-outputs // length)
    lacking = [(0, 0)] * len(front) + [(0, vectors * length - outputs)]
    parts = jnp.pad(kernel, lacking).reshape(*front, vectors, length)
    return jnp.squeeze(_l1(parts, range(kernel.ndim, kernel.ndim + 1)), axis=-1)


# Output channels of a vector.
_VECTORS = {"vector8": 8, "vector16": 16, "vector32": 32}
_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "unstructured": _weight,
    "channel": _channel_norm,
    "filter": _filter_norm,
    **{name: functools.partial(_vector_norm, length=length) for name, length in _VECTORS.items()},
}


def names() -> tuple[str, ...]:
    """The granularities there are."""
    return tuple(_SCORES)


def check(granularity: str) -> str:
    """``granularity`` itself, or a `UsageError` that lists what is allowed."""
    if granularity not in _SCORES:
        raise UsageError(f"granularity must be one of {', '.join(_SCORES)}; got {granularity!r}")
    return granularity


def score(kernel: jax.Array, granularity: str) -> jax.Array:
    """Score of every unit; the larger its magnitude, the sooner the unit survives.

    Args:
      kernel: weights, output channels last, input channels before them (HWIO for 2-D).
      granularity: a name from `names`.

    Returns:
      Array of the rank of ``kernel``, one value per unit. It broadcasts to the kernel, but that of
      vectors has their number as its last axis.
    """
    return _SCORES[check(granularity)](kernel)


def units(shape: Shape, granularity: str) -> int:
    """How many units a kernel of this shape has: what K counts.

    Example:
      >>> units((3, 3, 16, 32), "channel"), units((3, 3, 16, 32), "vector8")
      (512, 576)
    """
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return math.prod(jax.eval_shape(lambda k: score(k, granularity), kernel).shape)


def weight_threshold(kernel: jax.Array, granularity: str, keep: top_k.Count) -> jax.Array:
    """The ``keep``-th largest score: scalar, of the kernel's type or wider for norms."""
    return top_k.threshold(score(kernel, granularity), keep)


def weight_mask(kernel: jax.Array, granularity: str, threshold: jax.Array | float) -> jax.Array:
    """Booleans in the shape of ``kernel``: which weights belong to a unit that is kept."""
    keep = top_k.mask(score(kernel, granularity), threshold)
    if granularity in _VECTORS:
        return jnp.repeat(keep, _VECTORS[granularity], axis=-1)[..., : kernel.shape[-1]]
    return jnp.broadcast_to(keep, kernel.shape)


def masked_weights(kernel: jax.Array, granularity: str, threshold: jax.Array | float) -> jax.Array:
    """``kernel`` on its mask, 0 elsewhere."""
    keep = weight_mask(kernel, granularity, threshold)
    return jnp.where(keep, kernel, jnp.zeros((), kernel.dtype))


def pruned(kernel: jax.Array, shape: Shape, granularity: str, keep: top_k.Count) -> jax.Array:
    """``kernel`` with zeros off its exact mask.

    Args:
      kernel: of one layer, or of a stack of them along leading axes; each has a mask of its own.
      shape: of the kernel of one layer.
      granularity: a name from `names`.
      keep: how many units of one layer are kept.

    Raises:
      UsageError: the kernels of a stack lie along other axes.
    """
    stack = kernel.ndim - len(shape)
    if kernel.shape[stack:] != tuple(shape):
        raise UsageError(
            f"a stack of kernels {tuple(shape)} must have its axes first to be pruned, got "
            f"{kernel.shape}"
        )

    def one(kernel: jax.Array) -> jax.Array:
        return masked_weights(kernel, granularity, weight_threshold(kernel, granularity, keep))

    for _ in range(stack):
        one = jax.vmap(one)
    return one(kernel)
