"""Batch norm, ReLU and residual addition in passes over the data: the specification of the kernels.

Arrays have channels last; every other axis is summed over. Arithmetic is in float32 (float64 for
float64), whatever the type of ``x``.

Source: Ioffe and Szegedy, "Batch normalization", 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.sparsity import packing


class Vectors(NamedTuple):
    """What belongs to the channels; each is (channels,), float32 (float64 for float64).

    Attributes:
      mean: of the batch, or a running average.
      variance: likewise, biased.
      scale: factor after the normalisation.
      bias: summand after the normalisation.
    """

    mean: jax.Array
    variance: jax.Array
    scale: jax.Array
    bias: jax.Array


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
    vectors: Vectors,
    residual: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool,
    kept: jax.Array | None = None,
    kept_factor: float = 1.0,
) -> jax.Array:
    """``relu((x - mean) / sqrt(variance + epsilon) * scale + bias + residual)``, then dropout.

    Args:
      x: (..., channels) floats.
      vectors: of the channels.
      residual: added before the ReLU; shape and type of ``x``.
      epsilon: keeps the root away from 0.
      relu: whether negative values become 0.
      kept: bitmap of the values that dropout keeps; None: all.
      kept_factor: what they are multiplied by.

    Returns:
      The shape and the type of ``x``, rounded once.
    """
    wide = _wide(x)
    factor = lax.rsqrt(vectors.variance + epsilon) * vectors.scale
    y = (wide - vectors.mean) * factor + vectors.bias
    if residual is not None:
        y = y + _wide(residual)
    if relu:
        y = jnp.maximum(y, 0)
    if kept is not None:
        flags = packing.from_bitmap(kept, x.size).reshape(x.shape)
        y = jnp.where(flags, y * jnp.asarray(kept_factor, y.dtype), 0)
    return y.astype(x.dtype)


def positive(y: jax.Array) -> jax.Array:
    """Where ``y`` is positive, as a bitmap (see `swat_jax.sparsity.packing.to_bitmap`)."""
    return packing.to_bitmap(y > 0)


def gradient_sums(
    x: jax.Array,
    dys: Sequence[jax.Array],
    positive: jax.Array | None,
    vectors: Vectors,
    *,
    epsilon: float,
    relu: bool,
    keeps_dz: bool = False,
    factor: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What the backward pass adds up over the rows: the gradients of ``bias`` and ``scale``.

    Args:
      x: the input, (..., channels).
      dys: gradients of the output, one or more, which add up.
      positive: bitmap of the positive outputs; None: found again from ``x`` (which is right
        where nothing was added to it).
      vectors: as in `normalize`.
      epsilon: as in `normalize`.
      relu: as in `normalize`.
      keeps_dz: whether ``dz`` is returned, rounded to the type of ``x``; the sums are then of
        what was rounded.
      factor: of the gradients: what dropout multiplied the output by.

    Returns:
      ``sum(dz)`` and ``sum(dz * (x - mean) / sqrt(variance + epsilon))``, each (channels,), where
      ``dz`` is the gradient before the ReLU (and that of a residual); and ``dz`` or None.
    """
    dz = _before_relu(x, dys, positive, vectors, epsilon, relu)
    if factor != 1:
        dz = dz * jnp.asarray(factor, dz.dtype)
    kept = None
    if keeps_dz:
        kept = dz.astype(x.dtype)
        dz = _wide(kept)
    axes = tuple(range(x.ndim - 1))
    moment = jnp.sum(dz * (_wide(x) - vectors.mean), axis=axes)
    return jnp.sum(dz, axis=axes), moment * lax.rsqrt(vectors.variance + epsilon), kept


def gradient(
    x: jax.Array,
    dy: jax.Array,
    vectors: Vectors,
    sums: tuple[jax.Array, jax.Array],
    through: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool,
    count: int,
) -> jax.Array:
    """The gradient of the input.

    Args:
      x: the input, (..., channels).
      dy: gradient of the output; or, with ``relu`` False, what `gradient_sums` kept.
      vectors: as in `normalize`.
      sums: from `gradient_sums`; zeros where mean and variance were constants.
      through: a gradient of ``x`` from elsewhere, which is added.
      epsilon: as in `normalize`.
      relu: whether the sign of the output, found again from ``x``, decides where ``dy`` passes.
      count: how many rows the statistics were taken over.
    """
    dz = _before_relu(x, [dy], None, vectors, epsilon, relu)
    deviation = lax.rsqrt(vectors.variance + epsilon)
    factor = deviation * vectors.scale
    inverse = jnp.asarray(1 / count, factor.dtype)
    constant = factor * (sums[0] * inverse)
    slope = factor * deviation * (sums[1] * inverse)
    dx = factor * dz - constant - slope * (_wide(x) - vectors.mean)
    if through is not None:
        dx = dx + _wide(through)
    return dx.astype(x.dtype)


def _before_relu(
    x: jax.Array,
    dys: Sequence[jax.Array],
    positive: jax.Array | None,
    vectors: Vectors,
    epsilon: float,
    relu: bool,
) -> jax.Array:
    dz = sum(map(_wide, dys[1:]), _wide(dys[0]))
    if not relu:
        return dz
    if positive is None:
        y = normalize(x, vectors, epsilon=epsilon, relu=False)
        passes = y > 0
    else:
        passes = packing.from_bitmap(positive, math.prod(x.shape)).reshape(x.shape)
    return jnp.where(passes, dz, 0)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
