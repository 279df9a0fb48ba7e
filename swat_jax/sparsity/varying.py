"""Types of values inside `jax.shard_map`: over which mesh axes do they differ?"""

from __future__ import annotations

import jax
from jax import lax


def varying_axes(*values: object) -> tuple[str, ...]:
    """Names of the mesh axes that any of the values (arrays or trees of them) varies over."""
    return tuple(sorted(frozenset().union(*map(_varying, jax.tree.leaves(values)))))


def varying_like(value: jax.Array, *references: object) -> jax.Array:
    """``value`` marked as varying over all mesh axes that the references vary over.

    `jax.shard_map` gives every value a type that says over which mesh axes it differs. A loop
    carry, the branches of a condition and the cotangent of a `jax.custom_vjp` must have one such
    type; the transpose of this cast is the sum over the devices. Elsewhere nothing happens.
    """
    missing = tuple(axis for axis in varying_axes(references) if axis not in _varying(value))
    return lax.pcast(value, missing, to="varying") if missing else value


def _varying(leaf: object) -> frozenset[str]:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        kind = leaf.manual_axis_type
        return kind.varying if kind else frozenset()
    return jax.typeof(leaf).mat.varying
