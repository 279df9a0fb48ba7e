"""Dropout as a layer that keeps one bit per value for its backward pass."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from swat_jax import dropout_bits, functional


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout` of floats, with the same results, for reverse-mode differentiation."""

    def __call__(
        self, inputs: jax.Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> jax.Array:
        """As `flax.nnx.Dropout`."""
        rests = self.deterministic if deterministic is None else deterministic
        source = self.rngs if rngs is None else rngs
        # The stock layer says what lacks if there is no source.
        if rests or self.broadcast_dims or not 0 < self.rate < 1 or source is None:
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
        return functional.dropout(inputs, self._key(source), self.rate)

    @property
    def draws(self) -> bool:
        """Whether `draw` can stand for a call: it drops, value by value, and has keys to do so."""
        active = not self.deterministic and 0 < self.drawn_rate < 1
        return active and not self.broadcast_dims and self.rngs is not None

    @property
    def drawn_rate(self) -> float:
        """The rate of what `draw` drops, the nearest that it can."""
        return dropout_bits.dropped(self.rate) / dropout_bits.LEVELS

    def draw(self, size: int) -> jax.Array:
        """Which of ``size`` values to keep, a bitmap, for whoever drops the others in its place.

        It takes a key as a call does, but draws from it in a faster way (`functional.draw_kept`).
        """
        return functional.draw_kept(self._key(self.rngs), self.rate, size)

    def _key(self, source: Any) -> jax.Array:
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        return source if isinstance(source, jax.Array) else source()
