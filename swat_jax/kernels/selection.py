"""Thresholds, and values packed by them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.errors import UsageError
from swat_jax.kernels import choice, custom_call
from swat_jax.sparsity import packing, thresholds, top_k
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.varying import varying_like

# Sizes that handlers check: `Counts`, `selection_words` and `kCountsOfOne` in ops/.
_SEARCH_WORDS, _GUESS_WORDS, _SPAN = 2 * 2**12 + 3 * 2 * 256, 2**12, 4096
COUNTS_OF_ONE = 3 * 2**12


def threshold(x: jax.Array, keep: top_k.Count) -> jax.Array:
    """The ``keep``-th largest magnitude; see `swat_jax.sparsity.top_k.threshold`.

    No gradient flows to ``x``.
    """
    x = lax.stop_gradient(x)
    if not choice.has_kernel("threshold", x.dtype):
        return top_k.threshold(x, keep)
    always = jnp.ones((), bool)
    return _threshold(x, keep, always, jnp.zeros((), jnp.float32)).astype(x.dtype)


def refreshed_threshold(
    is_refresh: jax.Array | bool, x: jax.Array, keep: top_k.Count, stored: jax.Array
) -> jax.Array:
    """``threshold(x, keep)`` at a refresh step, else ``stored``, of the type of ``stored``.

    Args:
      is_refresh: scalar boolean, possibly traced.
      x: floats of any shape; no gradient flows to it.
      keep: how many values are kept.
      stored: the threshold in use, of float32 at least.
    """
    x = lax.stop_gradient(x)
    if not choice.has_kernel("threshold", x.dtype) or stored.dtype != jnp.float32:
        return thresholds.refresh(is_refresh, stored, lambda: threshold(x, keep))
    return _threshold(x, keep, jnp.asarray(is_refresh), stored)


def refreshed_thresholds(
    is_refresh: Sequence[jax.Array | bool],
    xs: Sequence[jax.Array],
    keeps: Sequence[top_k.Count],
    stored: Sequence[jax.Array],
) -> list[jax.Array]:
    """`refreshed_threshold` of many tensors, in one launch where there is a kernel for it.

    Args:
      is_refresh: of each tensor, whether its threshold is recomputed.
      xs: floats of any shape and one type; no gradient flows to them.
      keeps: how many values of each are kept.
      stored: the thresholds in use, of float32 at least.

    Returns:
      A threshold for each, of the type of its ``stored``.
    """
    dtypes = {x.dtype for x in xs}
    has_kernel = all(choice.has_kernel("threshold", dtype) for dtype in dtypes)
    if not has_kernel or len(dtypes) != 1 or any(one.dtype != jnp.float32 for one in stored):
        return list(map(refreshed_threshold, is_refresh, xs, keeps, stored))
    count = len(xs)

    def kernel(
        keep: jax.Array, refresh: jax.Array, xs: Sequence[jax.Array], stored: Sequence[jax.Array]
    ) -> list[jax.Array]:
        limit = jax.ShapeDtypeStruct((), jnp.float32)
        _, *limits = custom_call.call(
            "thresholds",
            (custom_call.words(count * COUNTS_OF_ONE), *[limit] * count),
            *(keep, refresh, *(x.ravel() for x in xs), *stored),
        )
        return limits

    def twin(
        keep: jax.Array, refresh: jax.Array, xs: Sequence[jax.Array], stored: Sequence[jax.Array]
    ) -> list[jax.Array]:
        return list(map(_refreshed, xs, keep, refresh, stored))

    words = jnp.stack([jnp.stack(top_k.words(keep)) for keep in keeps])
    flags = jnp.stack([jnp.asarray(flag) for flag in is_refresh])
    xs = [lax.stop_gradient(x) for x in xs]
    return custom_call.choose(kernel, twin, words, flags, xs, list(stored))


def sparsify(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """``x`` on its mask, 0 elsewhere; see `swat_jax.sparsity.top_k.sparsify`.

    XLA fuses it into what stands before or after, so it needs no kernel.
    """
    return top_k.sparsify(x, threshold)


def pack(x: jax.Array, threshold: jax.Array | float, capacity: int) -> Packed:
    """The values on the mask in compact form; see `swat_jax.sparsity.packing.pack`."""
    limit = jnp.asarray(threshold)
    wide = jnp.promote_types(limit.dtype, jnp.float32)
    if not choice.has_kernel("pack", x.dtype) or wide != jnp.float32:
        return packing.pack(x, threshold, capacity)

    def kernel(x: jax.Array, limit: jax.Array) -> Packed:
        *parts, _ = custom_call.call(
            "pack",
            (
                *packed_results(x.dtype, x.size, capacity),
                custom_call.words(selection_words(x.size)),
            ),
            x.ravel(),
            limit.astype(jnp.float32),
        )
        return as_packed(parts, x.shape)

    return custom_call.choose(kernel, lambda x, limit: packing.pack(x, limit, capacity), x, limit)


def unpack(packed: Packed, least: jax.Array | float | None = None) -> jax.Array:
    """The dense form of ``packed``; see `swat_jax.sparsity.packing.unpack`."""
    if not choice.has_kernel("unpack", packed.dtype):
        return packing.unpack(packed, least)
    size = math.prod(packed.shape)

    def kernel(packed: Packed, least: jax.Array | None) -> jax.Array:
        limit = jnp.zeros((), jnp.float32) if least is None else least.astype(jnp.float32)
        (x,) = custom_call.call(
            "unpack",
            (jax.ShapeDtypeStruct((size,), packed.dtype),),
            *(packed.values, packed.bitmap, packed.offsets, limit),
        )
        return x.reshape(packed.shape)

    limit = None if least is None else jnp.asarray(least)
    return custom_call.choose(kernel, packing.unpack, packed, limit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """What is packed of the output of `batch_norm_relu`, for one or two readers.

    Attributes:
      keep: uint32 (readers, 2): how many values each of them keeps, in two words; what is more
        than ``capacity`` counts as ``capacity``.
      capacity: room for packed values, at least 1. What is packed is what any reader keeps, and
        maybe more, for want of exact thresholds when it was packed: who unpacks it gives the
        threshold, so that what is smaller is left out.
      is_refresh: scalar boolean; where it is False ``stored`` is used, unless that would keep more
        than fits: then thresholds are refreshed early. None: exact always.
      stored: float32 (readers,) thresholds, or None.
    """

    keep: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    is_refresh: jax.Array | None = None
    stored: jax.Array | None = None

    def counts(self) -> jax.Array:
        """``keep``, at most ``capacity``."""
        room = jnp.array([0, self.capacity], jnp.uint32)
        fits = (self.keep[:, :1] == 0) & (self.keep[:, 1:] <= room[1])
        return jnp.where(fits, self.keep, room)


def select(x: jax.Array, selection: Selection) -> tuple[Packed, jax.Array]:
    """The packed form of ``x`` as selected, and the thresholds, one per reader.

    No gradient flows to ``x``.
    """
    x = lax.stop_gradient(x)
    counts = selection.counts()
    is_refresh = selection.is_refresh
    if is_refresh is not None:
        assert selection.stored is not None
        least = functools.reduce(jnp.fmin, selection.stored)
        kept = jnp.sum(top_k.mask(x, least), dtype=jnp.uint32)
        is_refresh |= kept > jnp.uint32(selection.capacity)

    def limit(reader: int) -> jax.Array:
        keep = counts[reader]
        if is_refresh is None:
            return threshold(x, keep).astype(jnp.promote_types(x.dtype, jnp.float32))
        assert selection.stored is not None
        return refreshed_threshold(is_refresh, x, keep, selection.stored[reader])

    limits = [limit(reader) for reader in range(selection.keep.shape[0])]
    # NaN is larger than every number here.
    least = functools.reduce(jnp.fmin, limits)
    return pack(x, least, selection.capacity), jnp.stack(limits)


def _threshold(
    x: jax.Array,
    keep: top_k.Count,
    is_refresh: jax.Array,
    stored: jax.Array,
) -> jax.Array:
    def kernel(x: jax.Array, keep: jax.Array, refresh: jax.Array, stored: jax.Array) -> jax.Array:
        limit, _ = custom_call.call(
            "threshold",
            (jax.ShapeDtypeStruct((), jnp.float32), custom_call.words(_SEARCH_WORDS)),
            *(x.ravel(), keep, refresh, stored),
        )
        return limit

    words = varying_like(jnp.stack(top_k.words(keep)), x)
    return custom_call.choose(kernel, _refreshed, x, words, is_refresh, stored)


def _refreshed(x: jax.Array, keep: jax.Array, refresh: jax.Array, stored: jax.Array) -> jax.Array:
    """The definition of a threshold that is recomputed, or not."""
    return thresholds.refresh(refresh, stored, lambda: top_k.threshold(x, keep))


def selection_words(size: int) -> int:
    """Room that a selection of ``size`` values works in."""
    return _GUESS_WORDS + 2 * _SEARCH_WORDS + 4 * -(-size // _SPAN)


def packed_results(dtype: Any, size: int, capacity: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Results that hold ``size`` values packed, of which `as_packed` makes one.

    Raises:
      UsageError: for sizes that no kernel takes.
    """
    if not 1 <= capacity < 2**32 or size >= 2**32:
        raise UsageError(
            f"capacity must be at least 1 and x below 2**32 values; got {capacity}, {size}"
        )
    return (
        jax.ShapeDtypeStruct((capacity,), dtype),
        custom_call.words(packing.bitmap_words(size)),
        custom_call.words(-(-size // packing.TILE)),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )


def as_packed(parts: Sequence[jax.Array], shape: tuple[int, ...]) -> Packed:
    """What a kernel returned for `packed_results`, of a tensor of that shape."""
    values, bitmap, offsets, overflow = parts
    return Packed(values, bitmap, offsets, overflow, shape)
