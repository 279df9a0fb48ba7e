"""Dropout as a layer that keeps one bit per value for its backward pass."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from swat_jax import functional


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout` of floats, with the same results, for reverse-mode differentiation."""

    def __call__(
        self, inputs: jax.Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> jax.Array:
        """As `flax.nnx.Dropout`."""
        rests = self.deterministic if deterministic is None else deterministic
        if rests or self.broadcast_dims or not 0 < self.rate < 1:
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
        source = self.rngs if rngs is None else rngs
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        if source is None:
            return super().__call__(inputs, deterministic=deterministic)  # which says what lacks
        key = source if isinstance(source, jax.Array) else source()
        return functional.dropout(inputs, key, self.rate)
