"""Random bits for dropout: the definition of what `ops/dropout.cu` computes.

`jax.random` hashes a counter for every value and keeps 32 of the 64 bits that come out; one bit is
needed, and sixteen are enough to decide on it. Here one hash decides on eight values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from swat_jax.sparsity import packing
from swat_jax.sparsity.top_k import wide_product

# Probabilities are multiples of 1 / LEVELS.
LEVELS = 2**16
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_Words = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def philox(counter: _Words, key: tuple[jax.Array, jax.Array]) -> _Words:
    """Four random uint32 of a counter of four and a key of two, elementwise.

    Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    a, b, c, d = counter
    one, two = key
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_c, low_c) = map(wide_product, (a, c), _FACTORS)
        a, b, c, d = high_c ^ b ^ one, low_c, high_a ^ d ^ two, low_a
        one, two = one + jnp.uint32(_STEPS[0]), two + jnp.uint32(_STEPS[1])
    return a, b, c, d


def dropped(rate: float) -> int:
    """How many of `LEVELS` come nearest to a rate."""
    return round(rate * LEVELS)


def draw(key: jax.Array, size: int, dropped: int) -> jax.Array:
    """A bitmap of ``size`` flags, each of which is 0 with probability ``dropped / LEVELS``.

    Args:
      key: uint32 (2,).
      size: below 2**31.
      dropped: of `LEVELS`.

    Returns:
      As `swat_jax.sparsity.packing.to_bitmap` makes it.
    """
    counter = jnp.arange(4 * packing.bitmap_words(size), dtype=jnp.uint32)
    zero = jnp.zeros_like(counter)
    words = jnp.stack(philox((counter, zero, zero, zero), (key[0], key[1])), axis=-1)
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=-1)
    return packing.to_bitmap((halves >= dropped).ravel()[:size])
