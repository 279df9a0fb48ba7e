"""How a total sparsity is spread over the layers of a network.

``shapes`` maps a layer's name to the shape of its kernel, in network order: HWIO for a 2-D
convolution, (in, out) for a linear layer. The sparsity of a layer holds for its weights and for
its input activations.

* `uniform` (SWAT-U): every layer the same.
* `erdos_renyi_kernel` (SWAT-ERK): small layers stay denser than large ones.
* `momentum_budgets` (SWAT-M): layers whose weights move most get more, anew at every step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swat_jax.errors import UsageError
from swat_jax.sparsity import top_k

Shape = tuple[int, ...]


def names() -> tuple[str, ...]:
    """The distributions there are; ``dense`` is training without SWAT."""
    return ("dense", "uniform", "erk", "momentum")


def uniform(
    shapes: Mapping[str, Shape], sparsity: float, *, dense: Collection[str] = ()
) -> dict[str, float]:
    """The same sparsity for every layer but those named in ``dense``, which get 0.

    Raises:
      UsageError: if the sparsity is not in ``[0, 1)`` or a name in ``dense`` is no layer.

    Example:
      >>> uniform({"stem": (3, 3, 3, 16), "classifier": (16, 10)}, 0.9, dense=["stem"])
      {'stem': 0.0, 'classifier': 0.9}
    """
    top_k.check_sparsity(sparsity)
    unknown = sorted(set(dense) - set(shapes))
    if unknown:
        raise UsageError(f"dense names no layer: {', '.join(unknown)}; layers: {', '.join(shapes)}")
    return {name: 0.0 if name in dense else sparsity for name in shapes}


def erdos_renyi_kernel(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """Sparsity per layer with density proportional to ``sum(shape) / prod(shape)``.

    The factor is such that the kept weights of all layers add up to ``(1 - sparsity)`` of all
    weights. A layer whose density would be above 1 becomes dense, and the factor is solved again
    for the others.

    Returns:
      Sparsity of each layer, in ``[0, 1)``.

    Raises:
      UsageError: if ``sparsity`` is not in ``[0, 1)``.

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), the Erdos-Renyi-Kernel distribution,
    as used by SWAT-ERK.

    Example:
      >>> erdos_renyi_kernel({"conv": (3, 3, 8, 8), "linear": (8, 10)}, 0.5)["linear"]
      0.0
    """
    density = 1 - top_k.check_sparsity(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: Fraction(sum(shape), sizes[name]) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = wanted / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and scale * raw[name] > 1}
        if not over:
            return {n: 0.0 if n in dense else float(1 - scale * raw[n]) for n in shapes}
        dense |= over
    return dict.fromkeys(shapes, 0.0)


def momentum_total(sizes: Mapping[str, int], sparsity: float) -> int:
    """Non-zero weights of the whole network under SWAT-M: what its start, uniform, keeps."""
    return sum(top_k.keep_count(sparsity, size) for size in sizes.values())


# A layer that would keep a larger part of its weights than this becomes dense.
_DENSE_ABOVE = 0.99


def momentum_budgets(mean_momentum: jax.Array, sizes: np.ndarray, total: int) -> jax.Array:
    """New number of weights to keep in each layer: SWAT-M's redistribution.

    A layer's share of ``total`` is proportional to its mean absolute momentum. A layer that
    would exceed 99 % of its size becomes dense, and what is left over, or missing, is spread
    evenly over the others, until the layers add up to ``total``.

    Args:
      mean_momentum: (L,) floats: mean of |momentum| over the weights that the layer's mask kept.
        If none is positive and finite, all layers get the same share of their size.
      sizes: (L,) integers, known on the host: weights of each layer.
      total: weights to keep in all layers together, below 2**31.

    Returns:
      (L,) int32, each at least 1 and at most the layer's size, adding up to ``total``.

    Raises:
      UsageError: if ``total`` cannot be spread: fewer than one weight a layer, more than there
        are, or 2**31 and more.

    Source: SWAT (Raihan & Aamodt, NeurIPS 2020), SWAT-M; the rule is that of Dettmers &
    Zettlemoyer, "Sparse Networks from Scratch" (2019).
    """
    sizes = np.asarray(sizes)
    count = len(sizes)
    if not count <= total <= sizes.sum() or sizes.sum() >= 2**31:
        raise UsageError(
            f"total must be at least one weight for each of {count} layers and at most all "
            f"{sizes.sum()} of them, below 2**31; got {total}"
        )
    size = jnp.asarray(sizes, jnp.int32)
    usable = jnp.where(jnp.isfinite(mean_momentum) & (mean_momentum > 0), mean_momentum, 0.0)
    weight_sum = jnp.sum(usable)
    share = jnp.where(weight_sum > 0, usable / weight_sum, jnp.asarray(sizes / sizes.sum()))
    first = jnp.floor(share * total)
    # Above a layer's size the exact number does not matter, but int32 must hold it.
    keep = jnp.clip(first, 1, 2 * size.astype(first.dtype)).astype(jnp.int32)
    ceiling = jnp.asarray(np.floor(_DENSE_ABOVE * sizes), jnp.int32)

    def settle(keep: jax.Array, dense: jax.Array, turn: jax.Array) -> _Balance:
        # Layers that turn dense can push others over the edge or leave too little for the rest;
        # after every layer had its turn the 99 % rule no longer applies, so that this ends.
        dense = dense | (keep > jnp.where(turn < 2 * count, ceiling, size - 1))
        keep = jnp.where(dense, size, jnp.maximum(keep, 1))
        return _Balance(keep, dense, turn + 1, total - jnp.sum(keep))

    def spread(state: _Balance) -> _Balance:
        sparse = ~state.dense & ((state.left > 0) | (state.keep > 1))
        # Dense layers give way only where no sparse one can.
        free = jnp.where(jnp.any(sparse), sparse, state.keep > 1)
        parts = jnp.sum(free)
        each, extra = jnp.divmod(jnp.abs(state.left), parts)
        change = jnp.sign(state.left) * (each + (jnp.cumsum(free) - 1 < extra))
        keep = jnp.where(free, state.keep + change, state.keep)
        return settle(keep, state.dense & ~free, state.turn)

    start = settle(keep, jnp.zeros(count, bool), jnp.int32(0))
    return lax.while_loop(lambda state: state.left != 0, spread, start).keep


class _Balance(NamedTuple):
    keep: jax.Array  # (L,) int32
    dense: jax.Array  # (L,) bool: keeps everything
    turn: jax.Array  # int32: how often leftovers were spread
    left: jax.Array  # int32: total minus what the layers keep
