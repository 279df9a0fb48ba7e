"""What arguments of ops must be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax.errors import UsageError

Padding = str | Sequence[tuple[int, int]]
Precision = Any  # what `jax.lax` takes; it has no public name for it


def check_floats(name: str, value: jax.Array) -> None:
    """Raises `UsageError` for what is no array of floats."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UsageError(f"{name} must be an array of floats, got {value.dtype}")


def as_padding(padding: Padding, axes: int) -> str | tuple[tuple[int, int], ...]:
    """A padding as `jax.lax` wants it, of ``axes`` spatial axes.

    Raises:
      UsageError: for what is no padding, or one of another number of axes.
    """
    if isinstance(padding, str):
        if padding.upper() in ("SAME", "SAME_LOWER", "VALID"):
            return padding.upper()
    elif isinstance(padding, Sequence) and len(padding) == axes:
        pairs = [tuple(pair) for pair in padding if isinstance(pair, Sequence)]
        if len(pairs) == axes and all(len(pair) == 2 for pair in pairs):
            return tuple((int(low), int(high)) for low, high in pairs)
    raise UsageError(
        f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or {axes} pairs (low, high), one per "
        f"spatial axis; got {padding!r}"
    )


def per_axis(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """A whole number above 0 for each of ``count`` axes.

    Raises:
      UsageError: for anything else; it calls the argument by ``name``.
    """
    axes = value if isinstance(value, Sequence | np.ndarray) else (value,) * count
    try:
        whole = tuple(operator.index(axis) for axis in axes)
    except TypeError:
        whole = ()
    if len(whole) != count or min(whole, default=1) < 1:
        raise UsageError(
            f"{name} must be one whole number >= 1 or {count} of them (one per spatial axis), "
            f"got {value!r}"
        )
    return whole


def check_rate(name: str, rate: float) -> None:
    """Raises `UsageError` for what is no rate of dropout."""
    if not 0 <= rate < 1:
        raise UsageError(f"{name} must be at least 0 and below 1, got {rate}")
