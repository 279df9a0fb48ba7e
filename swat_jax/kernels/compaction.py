"""The compact form of a sparse kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax.kernels import choice, custom_call
from swat_jax.sparsity import compact as compaction
from swat_jax.sparsity.compact import Compact


def compact(kernel: jax.Array, vector: int, chunk: int, multiple: int) -> Compact:
    """What is kept of a sparse kernel; see `swat_jax.sparsity.compact.compact`."""
    twin = functools.partial(compaction.compact, vector=vector, chunk=chunk, multiple=multiple)
    groups, chunks, _, room = compaction.sizes(kernel.shape, vector, chunk, multiple)
    if not choice.has_kernel("compact", kernel.dtype) or kernel.size == 0:
        return twin(kernel)

    def call(kernel: jax.Array) -> Compact:
        starts = jax.ShapeDtypeStruct((groups, chunks + 1), jnp.int32)
        values, positions, starts, _ = custom_call.call(
            "compact",
            (
                jax.ShapeDtypeStruct((groups, chunks * room, vector), kernel.dtype),
                jax.ShapeDtypeStruct((groups, chunks * room), jnp.int32),
                *(starts, starts),
            ),
            kernel,
            vector=np.int64(vector),
            chunk=np.int64(chunk),
            multiple=np.int64(multiple),
        )
        return Compact(values, positions, starts)

    return custom_call.choose(call, twin, kernel)
