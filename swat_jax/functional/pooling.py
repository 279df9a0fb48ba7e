"""Max pooling that keeps which value won, not its input."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
from jax import lax

from swat_jax import kernels
from swat_jax.errors import UsageError
from swat_jax.functional.arguments import Padding, as_padding, check_floats, per_axis
from swat_jax.max_pool import Pool


def max_pool(
    x: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Max pooling that keeps for its backward pass which value won, not the values.

    Args:
      x: (N, *spatial, channels) floats.
      window_shape: one number per spatial axis, at most 255 positions in all.
      strides: likewise; None: 1.
      padding: as `jax.lax.reduce_window` takes it, without batch and channels. It never wins.

    Returns:
      (N, *spatial, channels). Of equal values the first gets the gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), (2, 2)).item()
      3.0
    """
    check_floats("x", x)
    window = tuple(window_shape)
    if len(window) != x.ndim - 2 or not 1 <= math.prod(window) <= 255:
        raise UsageError(
            f"window_shape must have one number per spatial axis of x {x.shape}, and at most 255 "
            f"positions; got {window}"
        )
    steps = per_axis(1 if strides is None else strides, len(window), "strides")
    pairs = as_padding(padding, len(window))
    if isinstance(pairs, str):
        pairs = lax.padtype_to_pads(x.shape[1:-1], window, steps, pairs)
    return _max_pool(Pool(window, steps, tuple((int(a), int(b)) for a, b in pairs), x.shape), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(pool: Pool, x: jax.Array) -> jax.Array:
    return pool.pool(x)


def _max_pool_forward(pool: Pool, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pool.pool(x), pool.winner(x)


def _max_pool_backward(pool: Pool, winner: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (kernels.max_pool_gradient(pool, *lax.optimization_barrier((winner, dy))),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
