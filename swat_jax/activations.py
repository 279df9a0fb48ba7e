"""What goes from layer to layer: a dense value, and what the backward pass has in its place."""

from __future__ import annotations

import dataclasses

import jax

from swat_jax.sparsity.packing import Packed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """The input of one layer.

    Attributes:
      x: the dense value.
      packed: what the layer keeps of it for its backward pass and maybe more, or None if that is
        yet to be made.
      threshold: float32 (float64 for float64), the smallest magnitude that the layer keeps; None
        if nothing was packed.
    """

    x: jax.Array
    packed: Packed | None = None
    threshold: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """One value on its way to all that read it, each with a copy of its own.

    Their gradients then meet inside the backward pass of what made the value.

    Attributes:
      readers: for the layers that were announced as readers, in their order.
      dense: for anything else (a skip connection, a pooling), or None if nobody asked for it.
      before: the input of the norm that made the value, or None if nobody asked for it.
    """

    readers: tuple[Activation, ...] = ()
    dense: jax.Array | None = None
    before: jax.Array | None = None
