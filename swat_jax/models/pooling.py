"""Pooling that the networks share, and the check that an image is large enough for it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax.errors import UsageError


def global_average(x: jax.Array) -> jax.Array:
    """Mean over the two spatial axes: (N, H, W, C) -> (N, C)."""
    return jnp.mean(x, axis=(1, 2))


def average_by_two(x: jax.Array) -> jax.Array:
    """2x2 average pooling at stride 2."""
    return nnx.avg_pool(x, (2, 2), strides=(2, 2))


def max_by_two(x: jax.Array, max_pool: Callable[..., Any] = nnx.max_pool) -> jax.Array:
    """2x2 max pooling at stride 2."""
    return max_pool(x, (2, 2), strides=(2, 2))


def max_three_by_two(x: jax.Array, max_pool: Callable[..., Any] = nnx.max_pool) -> jax.Array:
    """3x3 max pooling at stride 2, padded by one pixel on every side."""
    padding: Any = ((1, 1), (1, 1))  # Flax takes pairs, its annotation says str
    return max_pool(x, (3, 3), strides=(2, 2), padding=padding)


def check_image(x: jax.Array, *, network: str, smallest: int) -> None:
    """Refuses an input that the network's pooling would shrink to nothing.

    Args:
      x: the network's input.
      network: its name, for the message.
      smallest: least height and width that it takes.

    Raises:
      UsageError: `x` is not (N, H, W, C), or H or W is below `smallest`.
    """
    if x.ndim != 4:
        raise UsageError(f"{network}: input must be (N, H, W, C), got shape {tuple(x.shape)}")
    if min(x.shape[1:3]) < smallest:
        raise UsageError(
            f"{network}: images must be at least {smallest}x{smallest}, got"
            f" {x.shape[1]}x{x.shape[2]}; set config.data.image_size or choose resnet8"
        )
