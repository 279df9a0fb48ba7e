"""Dropout that keeps one bit per value."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax import kernels
from swat_jax.functional.arguments import check_floats, check_rate
from swat_jax.sparsity import packing


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Dropout that keeps one bit per value for its backward pass.

    The key alone would be less to keep, but to draw again costs more than to read a bit.

    Args:
      x: floats of any shape.
      key: what the mask is drawn from; of the same key `flax.nnx.Dropout` draws the same mask.
      rate: the fraction that becomes 0, at least 0 and below 1; what is left is divided by
        ``1 - rate``.

    Example:
      >>> round(float(jnp.mean(dropout(jnp.ones(10_000), jax.random.key(0), 0.5) == 0)), 1)
      0.5

    Source: Srivastava et al., "Dropout", 2014.
    """
    check_floats("x", x)
    check_rate("rate", rate)
    return _dropout(1 - rate, x, jax.random.bernoulli(key, 1 - rate, x.shape))


def draw_kept(key: jax.Array, rate: float, size: int) -> jax.Array:
    """Which of ``size`` values dropout keeps, as the bitmap that `batch_norm_relu` takes.

    Other values than `dropout` keeps with this key: these take less time to draw (`dropout_bits`).

    Args:
      key: what it is drawn from.
      rate: the fraction that becomes 0, at least 0 and below 1, rounded to a multiple of 2**-16.
      size: how many values there are.
    """
    check_rate("rate", rate)
    return kernels.draw_kept(key, rate, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(share: float, x: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, x / share, jnp.zeros_like(x))


def _dropout_forward(share: float, x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _dropout(share, x, kept), packing.to_bitmap(kept)


def _dropout_backward(share: float, bitmap: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    bitmap, dy = lax.optimization_barrier((bitmap, dy))
    kept = packing.from_bitmap(bitmap, dy.size).reshape(dy.shape)
    return _dropout(share, dy, kept), None


_dropout.defvjp(_dropout_forward, _dropout_backward)
