"""The gradient of max pooling."""

from __future__ import annotations

import jax
import numpy as np

from swat_jax.kernels import choice, custom_call
from swat_jax.max_pool import Pool


def max_pool_gradient(pool: Pool, winner: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of the input of a max pooling; see `swat_jax.max_pool.Pool.gradient`."""
    if not choice.has_kernel("max_pool", dy.dtype) or len(pool.window) != 2 or dy.size == 0:
        return pool.gradient(winner, dy)

    def kernel(winner: jax.Array, dy: jax.Array) -> jax.Array:
        (low_y, _), (low_x, _) = pool.padding
        (dx,) = custom_call.call(
            "max_pool_gradient",
            (jax.ShapeDtypeStruct(pool.shape, dy.dtype),),
            *(winner, dy),
            window=np.array(pool.window, np.int64),
            strides=np.array(pool.strides, np.int64),
            lows=np.array((low_y, low_x), np.int64),
        )
        return dx

    return custom_call.choose(kernel, pool.gradient, winner, dy)
