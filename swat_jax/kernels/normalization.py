"""Batch norm with ReLU, residual, dropout and packing, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax import batch_norm
from swat_jax.batch_norm import Vectors
from swat_jax.kernels import choice, custom_call
from swat_jax.kernels import selection as selecting
from swat_jax.kernels.selection import Selection
from swat_jax.sparsity import packing
from swat_jax.sparsity.packing import Packed

# A size that handlers check: `Cut::words` in ops/.
_MOST_CHUNKS, _LEAST_ROWS = 396, 128


class Normalized(NamedTuple):
    """Results of `batch_norm_relu`.

    Attributes:
      y: shape and type of the input.
      positive: bitmap that says where ``y`` is positive, or None.
      packed: ``y`` as selected, or None.
      thresholds: float32 (readers,), or None.
    """

    y: jax.Array
    positive: jax.Array | None
    packed: Packed | None
    thresholds: jax.Array | None


def batch_norm_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of every channel; see `swat_jax.batch_norm.statistics`."""
    if not choice.has_kernel("batch_norm", x.dtype) or x.size == 0:
        return batch_norm.statistics(x)

    def kernel(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = _rows(x)
        vector = jax.ShapeDtypeStruct(rows.shape[1:], jnp.float32)
        mean, variance, _ = custom_call.call(
            "batch_norm_statistics",
            (vector, vector, custom_call.words(_cut_words(rows.shape))),
            rows,
        )
        return mean, variance

    return custom_call.choose(kernel, batch_norm.statistics, x)


def batch_norm_relu(
    x: jax.Array,
    vectors: Vectors,
    residual: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool,
    keeps_signs: bool = False,
    kept: jax.Array | None = None,
    kept_factor: float = 1.0,
    selection: Selection | None = None,
) -> Normalized:
    """Normalises, adds, applies ReLU, drops and packs; see `swat_jax.batch_norm.normalize`.

    Args:
      x: (..., channels).
      vectors: of the channels.
      residual: shape and type of ``x``, or None.
      epsilon: keeps the root away from 0.
      relu: whether negative values become 0.
      keeps_signs: whether `Normalized.positive` is wanted.
      kept: bitmap of what dropout keeps, where there is no residual; or None.
      kept_factor: what that is multiplied by.
      selection: what is packed, if anything.
    """

    def twin(
        x: jax.Array,
        vectors: Vectors,
        residual: jax.Array | None,
        kept: jax.Array | None,
        selection: Selection | None,
    ) -> tuple[Any, ...]:
        drops = {"kept": kept, "kept_factor": kept_factor}
        y = batch_norm.normalize(x, vectors, residual, epsilon=epsilon, relu=relu, **drops)
        signs = batch_norm.positive(y) if keeps_signs else None
        packed, limits = (None, None) if selection is None else selecting.select(y, selection)
        return y, signs, packed, limits

    def kernel(
        x: jax.Array,
        vectors: Vectors,
        residual: jax.Array | None,
        kept: jax.Array | None,
        selection: Selection | None,
    ) -> tuple[Any, ...]:
        rows = _rows(x)
        words = 0 if _is_fixed(rows.shape[1]) else -(-2 * rows.shape[1] // 64) * 64
        readers, mode, packed_results = 0, 0, [custom_call.words(0)] * 4
        keep: Any = custom_call.absent(jnp.float32)
        is_refresh: Any = keep
        stored: Any = keep
        if selection is not None:
            keep, readers, mode = selection.counts(), selection.keep.shape[0], 1
            words += selecting.selection_words(x.size)
            packed_results = list(selecting.packed_results(x.dtype, x.size, selection.capacity))
            if selection.is_refresh is not None:
                mode, is_refresh, stored = 2, selection.is_refresh, selection.stored
        results = (
            jax.ShapeDtypeStruct(rows.shape, x.dtype),
            custom_call.words(packing.bitmap_words(x.size) if keeps_signs else 0),
            *packed_results,
            jax.ShapeDtypeStruct((readers,), jnp.float32),
            custom_call.words(words),
        )
        y, signs, *parts, limits, _ = custom_call.call(
            "batch_norm_relu",
            results,
            rows,
            *(vector.astype(jnp.float32) for vector in vectors),
            custom_call.absent(x.dtype) if residual is None else _rows(residual),
            custom_call.absent(jnp.uint32) if kept is None else kept,
            *(keep, is_refresh, stored),
            epsilon=np.float32(epsilon),
            relu=relu,
            kept_factor=np.float32(kept_factor),
            mode=np.int64(mode),
        )
        y = y.reshape(x.shape)
        signs = signs if keeps_signs else None
        if selection is None:
            return y, signs, None, None
        return y, signs, selecting.as_packed(parts, x.shape), limits

    operands = (x, vectors, residual, kept, selection)
    if choice.has_kernel("batch_norm", x.dtype) and x.size:
        return Normalized(*custom_call.choose(kernel, twin, *operands))
    return Normalized(*twin(*operands))


def batch_norm_gradient_sums(
    x: jax.Array,
    dys: Sequence[jax.Array],
    positive: jax.Array | None,
    vectors: Vectors,
    *,
    epsilon: float,
    relu: bool,
    keeps_dz: bool = False,
    factor: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The gradients of bias and scale; see `swat_jax.batch_norm.gradient_sums`."""
    twin = functools.partial(
        batch_norm.gradient_sums, epsilon=epsilon, relu=relu, keeps_dz=keeps_dz, factor=factor
    )
    dys = _at_most_two(dys)
    if not choice.has_kernel("batch_norm", x.dtype) or x.size == 0:
        return twin(x, dys, positive, vectors)

    def kernel(
        x: jax.Array, dys: Sequence[jax.Array], positive: jax.Array | None, vectors: Vectors
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        rows = _rows(x)
        vector = jax.ShapeDtypeStruct(rows.shape[1:], jnp.float32)
        kept = jax.ShapeDtypeStruct(rows.shape if keeps_dz else (0,), x.dtype)
        total, moment, dz, _ = custom_call.call(
            "batch_norm_gradient_sums",
            (vector, vector, kept, custom_call.words(_cut_words(rows.shape))),
            *(rows, _rows(dys[0]), _rows(dys[1]) if len(dys) > 1 else custom_call.absent(x.dtype)),
            custom_call.absent(jnp.uint32) if positive is None else positive,
            *(vector.astype(jnp.float32) for vector in vectors),
            epsilon=np.float32(epsilon),
            relu=relu,
            factor=np.float32(factor),
        )
        return total, moment, dz.reshape(x.shape) if keeps_dz else None

    return custom_call.choose(kernel, twin, x, dys, positive, vectors)


def batch_norm_gradient(
    x: jax.Array,
    dy: jax.Array,
    vectors: Vectors,
    sums: tuple[jax.Array, jax.Array],
    through: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool,
    count: int,
) -> jax.Array:
    """The gradient of the input; see `swat_jax.batch_norm.gradient`."""
    twin = functools.partial(batch_norm.gradient, epsilon=epsilon, relu=relu, count=count)

    def kernel(
        x: jax.Array, dy: jax.Array, vectors: Vectors, sums: Any, through: jax.Array | None
    ) -> jax.Array:
        rows = _rows(x)
        words = 0 if _is_fixed(rows.shape[1]) else -(-4 * rows.shape[1] // 64) * 64
        dx, _ = custom_call.call(
            "batch_norm_gradient",
            (jax.ShapeDtypeStruct(rows.shape, x.dtype), custom_call.words(words)),
            *(rows, _rows(dy)),
            *(vector.astype(jnp.float32) for vector in (*vectors, *sums)),
            custom_call.absent(x.dtype) if through is None else _rows(through),
            epsilon=np.float32(epsilon),
            relu=relu,
            inverse_count=np.float32(1 / count),
        )
        return dx.reshape(x.shape)

    operands = (x, dy, vectors, sums, through)
    if not choice.has_kernel("batch_norm", x.dtype) or x.size == 0:
        return twin(*operands)
    return custom_call.choose(kernel, twin, *operands)


def _at_most_two(dys: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    first, *rest = dys
    return (first, functools.reduce(jnp.add, rest)) if rest else (first,)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _is_fixed(channels: int) -> bool:
    return channels <= packing.TILE and packing.TILE % channels == 0


def _cut_words(shape: tuple[int, ...]) -> int:
    rows, channels = shape
    chunks = min(_MOST_CHUNKS, -(-rows // _LEAST_ROWS))
    return 2 * channels * chunks
