"""How a kernel of `ops/` is called, beside the twin for whatever else a program is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.sparsity.varying import varying_axes, varying_like

# From this many values on the twins would need 64-bit integers.
TWIN_LIMIT = 2**31


def choose(kernel: Callable[..., Any], twin: Callable[..., Any], *operands: Any) -> Any:
    """The kernel where the program is compiled for a CUDA device, the twin elsewhere."""
    operands = jax.tree.map(lambda leaf: varying_like(leaf, operands), operands)
    if max(leaf.size for leaf in jax.tree.leaves(operands)) >= TWIN_LIMIT:
        return kernel(*operands)  # larger than the twins take
    return lax.platform_dependent(*operands, cuda=kernel, default=twin)


def call(
    name: str,
    results: Sequence[Any],
    *operands: jax.Array,
    **attributes: Any,
) -> list[Any]:
    """The custom call; under `jax.vmap` a leading axis of independent problems."""
    axes = varying_axes(operands)
    handler = jax.ffi.ffi_call(
        f"swat_jax_{name}",
        tuple(results),
        vmap_method="broadcast_all",
    )
    outputs = handler(*operands, **attributes)
    # The call loses the information over which mesh axes its results vary.
    if axes:
        outputs = [lax.pcast(value, axes, to="varying") for value in outputs]
    return list(outputs)


def words(count: int) -> jax.ShapeDtypeStruct:
    """A result of that many words: a bitmap, or room to work in."""
    return jax.ShapeDtypeStruct((count,), jnp.uint32)


def absent(dtype: Any) -> jax.Array:
    """Stands for an operand that there is not."""
    return jnp.zeros((0,), dtype)
