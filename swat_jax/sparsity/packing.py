"""Sparse tensors in a fixed amount of memory: a bitmap, the kept values, and offsets.

This is the specification of the packed form in which activations wait for their backward pass.
Its size does not depend on the values, as XLA requires: room for ``capacity`` values is made,
and what happens if more survive is defined too, and deterministic.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.errors import UsageError
from swat_jax.sparsity import top_k
from swat_jax.sparsity.varying import varying_like

# Flattened values per entry of `Packed.offsets`: where a reader can start in the middle.
TILE = 2048
_WORD = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor of which only the largest values are kept.

    Attributes:
      values: (capacity,) the kept values in the order of the flattened tensor, then zeros.
      bitmap: (ceil(size / 32),) uint32; bit ``i % 32`` of word ``i // 32`` says that value ``i``
        is kept.
      offsets: (ceil(size / TILE),) uint32; how many values are kept before each tile.
      overflow: uint32 scalar; how many values the threshold asked to keep, but were dropped
        for want of room.
      shape: the shape of the tensor.
    """

    values: jax.Array
    bitmap: jax.Array
    offsets: jax.Array
    overflow: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the values."""
        return self.values.dtype


def capacity(keep: int, size: int, slack: float = 0.05) -> int:
    """Room for ``keep`` values and a little more, since a reused threshold drifts.

    Example:
      >>> capacity(100, 1000)
      105
    """
    if slack < 0:
        raise UsageError(f"slack must be a fraction >= 0, got {slack}")
    return min(math.ceil((1 + slack) * keep), size)


def pack(x: jax.Array, threshold: jax.Array | float, capacity: int) -> Packed:
    """Keeps the values of ``x`` whose magnitude is at least ``threshold``.

    If more survive than fit, the threshold is raised to the exact ``capacity``-th magnitude; of
    the ties that still do not fit the last, in index order, are dropped.

    Args:
      x: floats of any shape, below 2**31 values.
      threshold: scalar.
      capacity: how many values there is room for, at least 1.

    Example:
      >>> packed = pack(jnp.array([3.0, -1.0, 2.0]), 1.5, 2)
      >>> unpack(packed).tolist()
      [3.0, 0.0, 2.0]
    """
    if capacity < 1 or x.size >= 2**31:
        raise UsageError(
            f"capacity must be at least 1 and x below 2**31 values; got {capacity}, {x.size}"
        )
    limit = jnp.asarray(threshold)
    wide = jnp.promote_types(x.dtype, limit.dtype)
    limit = varying_like(limit.astype(wide), x)
    wanted = jnp.sum(top_k.mask(x, limit), dtype=jnp.uint32)
    limit = lax.cond(
        wanted > capacity, lambda: top_k.threshold(x, capacity).astype(wide), lambda: limit
    )
    flags = top_k.mask(x, limit).ravel()
    # What is larger than the threshold always fits; ties take what room there is, in order.
    ties = flags & (top_k.magnitude_in(x, wide) == top_k.magnitude_in(limit, wide)).ravel()
    room = capacity - jnp.sum(flags & ~ties, dtype=jnp.uint32)
    flags &= ~ties | (jnp.cumsum(ties, dtype=jnp.uint32) <= room)
    position = jnp.cumsum(flags, dtype=jnp.uint32) - flags
    # What is not kept is sent out of bounds, where a scatter drops it.
    target = jnp.where(flags, position, capacity)
    values = varying_like(jnp.zeros(capacity, x.dtype), x).at[target].set(x.ravel(), mode="drop")
    tiles = jnp.sum(_blocks(flags, TILE), axis=1, dtype=jnp.uint32)
    return Packed(
        values=values,
        bitmap=to_bitmap(flags),
        offsets=jnp.cumsum(tiles, dtype=jnp.uint32) - tiles,
        overflow=wanted - jnp.sum(flags, dtype=jnp.uint32),
        shape=x.shape,
    )


def unpack(packed: Packed, least: jax.Array | float | None = None) -> jax.Array:
    """The tensor that was packed, 0 where nothing was kept.

    Args:
      packed: from `pack`.
      least: if given, packed values whose magnitude is smaller are left out too: one packed tensor
        serves readers of different sparsities, and may hold more than any of them keeps where
        exact thresholds were found after it was packed (`swat_jax.kernels.Selection`).
    """
    flags = from_bitmap(packed.bitmap, math.prod(packed.shape))
    position = jnp.cumsum(flags, dtype=jnp.uint32) - flags
    kept = packed.values.at[position].get(mode="clip")
    x = jnp.where(flags, kept, jnp.zeros((), packed.dtype)).reshape(packed.shape)
    return x if least is None else top_k.sparsify(x, least)


def to_bitmap(flags: jax.Array) -> jax.Array:
    """Booleans, flattened, as (ceil(size / 32),) uint32: flag ``i`` is bit ``i % 32``."""
    words = _blocks(flags.ravel(), _WORD).astype(jnp.uint32)
    bits = jnp.arange(_WORD, dtype=jnp.uint32)
    return jnp.sum(words << bits, axis=1, dtype=jnp.uint32)


def from_bitmap(bitmap: jax.Array, size: int) -> jax.Array:
    """The first ``size`` flags of a bitmap, (size,) booleans."""
    bits = jnp.arange(_WORD, dtype=jnp.uint32)
    return ((bitmap[:, None] >> bits) & 1).astype(bool).ravel()[:size]


def bitmap_words(size: int) -> int:
    """32-bit words of a bitmap of ``size`` flags."""
    return -(-size // _WORD)


def _blocks(flags: jax.Array, width: int) -> jax.Array:
    """Flags in rows of ``width``, the last one padded with False."""
    return jnp.pad(flags, (0, -flags.size % width)).reshape(-1, width)
