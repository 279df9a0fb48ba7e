"""Batch norm, ReLU and residual addition in passes over the data: the specification of the kernels.

Arrays have channels last; every other axis is summed over. Arithmetic is in float32 (float64 for
float64), whatever the type of ``x``.

Source: Ioffe and Szegedy, "Batch normalization", 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.sparsity import packing


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance of every channel.

    Args:
      x: (..., channels) floats.

    Returns:
      Two arrays (channels,), float32 (float64 for float64).
    """
    wide = _wide(x)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(wide, axis=axes)
    return mean, jnp.mean(jnp.square(wide - mean), axis=axes)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool,
) -> jax.Array:
    """``relu((x - mean) / sqrt(variance + epsilon) * scale + bias + residual)``.

    Args:
      x: (..., channels) floats.
      mean: (channels,), like all that follow but ``residual``.
      variance: of every channel.
      scale: factor after the normalisation.
      bias: summand after the normalisation.
      residual: added before the ReLU; shape and type of ``x``.
      epsilon: keeps the root away from 0.
      relu: whether negative values become 0.

    Returns:
      The shape and the type of ``x``, rounded once.
    """
    wide = _wide(x)
    factor = lax.rsqrt(variance + epsilon) * scale
    y = (wide - mean) * factor + bias
    if residual is not None:
        y = y + _wide(residual)
    if relu:
        y = jnp.maximum(y, 0)
    return y.astype(x.dtype)


def positive(y: jax.Array) -> jax.Array:
    """Where ``y`` is positive, as a bitmap (see `swat_jax.sparsity.packing.to_bitmap`)."""
    return packing.to_bitmap(y > 0)


def gradient_sums(
    x: jax.Array,
    dys: Sequence[jax.Array],
    positive: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    relu: bool,
) -> tuple[jax.Array, jax.Array]:
    """What the backward pass adds up over the rows: the gradients of ``bias`` and ``scale``.

    Args:
      x: the input, (..., channels).
      dys: gradients of the output, one or more, which add up.
      positive: bitmap of the positive outputs; None: found again from ``x`` (which is right
        where nothing was added to it).
      mean: as in `normalize`, and so on.
      variance: of every channel.
      scale: factor after the normalisation.
      bias: summand after the normalisation.
      epsilon: as in `normalize`.
      relu: as in `normalize`.

    Returns:
      ``sum(dz)`` and ``sum(dz * (x - mean) / sqrt(variance + epsilon))``, each (channels,), where
      ``dz`` is the gradient before the ReLU.
    """
    dz = _before_relu(x, dys, positive, mean, variance, scale, bias, epsilon, relu)
    axes = tuple(range(x.ndim - 1))
    moment = jnp.sum(dz * (_wide(x) - mean), axis=axes) * lax.rsqrt(variance + epsilon)
    return jnp.sum(dz, axis=axes), moment


def gradient(
    x: jax.Array,
    dys: Sequence[jax.Array],
    positive: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    through: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool,
    count: int,
    with_residual: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of the input and of the residual.

    Args:
      x: as in `gradient_sums`, and so on.
      dys: gradients of the output.
      positive: bitmap or None.
      mean: of every channel.
      variance: of every channel.
      scale: factor after the normalisation.
      bias: summand after the normalisation.
      sums: from `gradient_sums`; zeros where mean and variance were constants.
      through: a gradient of ``x`` from elsewhere, which is added.
      epsilon: as in `normalize`.
      relu: as in `normalize`.
      count: how many rows the statistics were taken over.
      with_residual: whether there was a residual.

    Returns:
      The gradient of ``x``, and that of the residual or None.
    """
    dz = _before_relu(x, dys, positive, mean, variance, scale, bias, epsilon, relu)
    deviation = lax.rsqrt(variance + epsilon)
    factor = deviation * scale
    inverse = jnp.asarray(1 / count, factor.dtype)
    constant = factor * (sums[0] * inverse)
    slope = factor * deviation * (sums[1] * inverse)
    dx = factor * dz - constant - slope * (_wide(x) - mean)
    if through is not None:
        dx = dx + _wide(through)
    return dx.astype(x.dtype), dz.astype(x.dtype) if with_residual else None


def _before_relu(
    x: jax.Array,
    dys: Sequence[jax.Array],
    positive: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    relu: bool,
) -> jax.Array:
    dz = sum(map(_wide, dys[1:]), _wide(dys[0]))
    if not relu:
        return dz
    if positive is None:
        y = normalize(x, mean, variance, scale, bias, epsilon=epsilon, relu=False)
        passes = y > 0
    else:
        passes = packing.from_bitmap(positive, math.prod(x.shape)).reshape(x.shape)
    return jnp.where(passes, dz, 0)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
