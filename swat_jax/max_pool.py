"""Max pooling and its gradient from which value won: the specification of the kernel.

What is kept for the backward pass is one byte per result, not the values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Pool:
    """A max pooling over inputs of one shape.

    Attributes:
      window: one number per spatial axis, at most 255 positions in all.
      strides: likewise.
      padding: (low, high) per spatial axis; it never wins.
      shape: of the input, (N, *spatial, channels).
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]

    def pool(self, x: jax.Array) -> jax.Array:
        """The largest value of every window."""
        return functools.reduce(jnp.maximum, self._positions(x))

    def winner(self, x: jax.Array) -> jax.Array:
        """uint8: at which position of its window each result lies; of equal ones the first."""
        best, *others = self._positions(x)
        winner = jnp.zeros(best.shape, jnp.uint8)
        for index, value in enumerate(others, start=1):
            wins = ~(best >= value)
            best, winner = jnp.where(wins, value, best), jnp.where(wins, jnp.uint8(index), winner)
        return winner

    def gradient(self, winner: jax.Array, dy: jax.Array) -> jax.Array:
        """The gradient of the input: ``dy`` goes to whoever won.

        Values of the input that lie a whole number of strides apart belong to the same positions
        of their windows. So each value adds up few parts only, in the order of the positions, and
        the groups are put together afterwards.
        """
        axes = range(len(self.window))
        zero = jnp.zeros((), dy.dtype)
        lows = [low for low, _ in self.padding]
        highs = [low + size for low, size in zip(lows, self.shape[1:-1], strict=True)]
        blocks = [-(-high // step) for high, step in zip(highs, self.strides, strict=True)]

        def part(index: int, start: tuple[int, ...]) -> jax.Array:
            config = [(0, 0, 0)]
            for axis in axes:
                first = start[axis] // self.strides[axis]
                config.append((first, blocks[axis] - first - dy.shape[axis + 1], 0))
            won = jnp.where(winner == index, dy, zero)
            return lax.pad(won, zero, [*config, (0, 0, 0)])

        groups = []
        for group in np.ndindex(*self.strides):
            members = [
                part(index, start)
                for index, start in enumerate(np.ndindex(*self.window))
                if all(start[axis] % self.strides[axis] == group[axis] for axis in axes)
            ]
            nothing = jnp.zeros((self.shape[0], *blocks, self.shape[-1]), dy.dtype)
            groups.append(functools.reduce(jnp.add, members) if members else nothing)
        # (group by axis..., N, block by axis..., channels): groups go behind their blocks.
        dx = jnp.stack(groups).reshape(*self.strides, *groups[0].shape)
        rank = len(axes)
        order = [rank]
        for axis in axes:
            order += [rank + 1 + axis, axis]
        sizes = [count * step for count, step in zip(blocks, self.strides, strict=True)]
        dx = dx.transpose(*order, 2 * rank + 1).reshape(self.shape[0], *sizes, self.shape[-1])
        return lax.slice(dx, (0, *lows, 0), (self.shape[0], *highs, self.shape[-1]))

    def _positions(self, x: jax.Array) -> Iterator[jax.Array]:
        """For every position in the window what is there, of the shape of the result."""
        padded = jnp.pad(x, ((0, 0), *self.padding, (0, 0)), constant_values=-jnp.inf)
        # As many windows as fit.
        counts = [
            (size - width) // step + 1
            for size, width, step in zip(padded.shape[1:-1], self.window, self.strides, strict=True)
        ]
        for start in np.ndindex(*self.window):
            stops = [
                first + (count - 1) * step + 1
                for first, count, step in zip(start, counts, self.strides, strict=True)
            ]
            yield lax.slice(
                padded, (0, *start, 0), (x.shape[0], *stops, x.shape[-1]), (1, *self.strides, 1)
            )
