"""Shuffling, augmentation and normalisation for use inside `jax.jit`.

Small data sets live on the device as uint8; a training step takes its rows by `epoch_order`,
augments them and normalises them, all without the host. The distributions are those of the host
path (`swat_jax.data.augment`, `swat_jax.data.order`), the random numbers are not.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from swat_jax.data.augment import AUGMENTATIONS
from swat_jax.errors import UsageError


def epoch_order(key: jax.Array, n: int, epoch: ArrayLike) -> jax.Array:
    """The order in which an epoch visits the training images.

    Args:
      key: the run's key for data; the same for every epoch.
      n: number of training images.
      epoch: int scalar, may be traced.

    Returns:
      int32 (n,), a permutation of 0 to n - 1.
    """
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


def augment(key: jax.Array, images: jax.Array, kind: str) -> jax.Array:
    """Shifts each image by a random number of pixels and mirrors it or not.

    Args:
      key: the key of this batch.
      images: uint8 (B, H, W, C).
      kind: "none", "shift" (by up to 1 pixel) or "crop_flip" (by up to 4 pixels, mirrored half of
        the time); what comes in at the border is black.

    Returns:
      uint8 (B, H, W, C).

    Raises:
      UsageError: unknown `kind`.
    """
    if kind not in AUGMENTATIONS:
        raise UsageError(
            f"config.data.augmentation: on the device must be one of {', '.join(AUGMENTATIONS)}, "
            f"got {kind!r}"
        )
    padding, flip = AUGMENTATIONS[kind]
    if not padding and not flip:
        return images
    batch, height, width, channels = images.shape
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (batch, 2), 0, 2 * padding + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def window(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    cropped = jax.vmap(window)(padded, offsets)
    if not flip:
        return cropped
    mirrored = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """(pixel / 255 - mean) / std per channel, computed in float32.

    Args:
      images: uint8 (..., C).
      mean: per channel, of pixel / 255.
      std: per channel, of pixel / 255.
      dtype: of the result.

    Returns:
      `dtype` (..., C).
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)
