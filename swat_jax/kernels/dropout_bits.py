"""The bitmap of dropout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax import dropout_bits
from swat_jax.kernels import choice, custom_call
from swat_jax.sparsity import packing


def draw_kept(key: jax.Array, rate: float, size: int) -> jax.Array:
    """A bitmap of what dropout keeps of ``size`` values; see `swat_jax.dropout_bits`.

    The same key gives the same bits on every backend.

    Args:
      key: of `jax.random`.
      rate: the fraction that is dropped, rounded to a multiple of 2**-16.
      size: how many values there are.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    dropped = dropout_bits.dropped(rate)
    twin = functools.partial(dropout_bits.draw, size=size, dropped=dropped)
    if not choice.has_kernel("dropout_bits", jnp.float32) or size == 0:
        return twin(words)

    def kernel(words: jax.Array) -> jax.Array:
        (bitmap,) = custom_call.call(
            "dropout_bits",
            (custom_call.words(packing.bitmap_words(size)),),
            words,
            n=np.int64(size),
            dropped=np.int64(dropped),
        )
        return bitmap

    if size >= custom_call.TWIN_LIMIT:
        return kernel(words)
    return custom_call.choose(kernel, twin, words)
