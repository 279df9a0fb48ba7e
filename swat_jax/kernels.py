"""The ops that have a hand-written GPU kernel; the only door to them.

Each op is defined by its jax.numpy twin (`swat_jax.sparsity.top_k`, `swat_jax.sparsity.packing`,
`swat_jax.sparsity.compact`, `swat_jax.batch_norm`, `swat_jax.max_pool`,
`swat_jax.sparse_convolution`, `swat_jax.sparse_conv_direct`, `swat_jax.vector_convolution`). The
backend "xla" is the twin itself, compiled by XLA, and runs everywhere. The backend "cuda" calls
the kernels of `ops/` on NVIDIA GPUs, and the twin on other devices and for float64. With it goes
"fold", which is no kernel but another way to ask cuDNN for one of its own
(`swat_jax.convolution`).

Environment:
  SWAT_JAX_BACKEND: ``cuda`` or ``xla``; by default ``cuda`` where there is a GPU and the library.
  SWAT_JAX_XLA_OPS: names of ops, separated by commas, that use their twin nevertheless.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swat_jax import (
    batch_norm,
    dropout_bits,
    native,
    sparse_conv_direct,
    sparse_convolution,
    vector_convolution,
)
from swat_jax.batch_norm import Vectors
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError, warn_once
from swat_jax.max_pool import Pool
from swat_jax.sparse_convolution import Cut
from swat_jax.sparsity import compact as compaction
from swat_jax.sparsity import packing, thresholds, top_k
from swat_jax.sparsity.compact import Compact
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.varying import varying_axes, varying_like

OPS = (
    "threshold",
    "pack",
    "unpack",
    "batch_norm",
    "max_pool",
    "dropout_bits",
    "fold",
    "sparse_conv",
    "compact",
    "sparse_conv_direct",
    "sparse_conv_vector",
)
_BACKENDS = ("cuda", "xla")
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Sizes that handlers check: `Counts`, `selection_words`, `kCountsOfOne`, `Cut::words` in ops/.
_SEARCH_WORDS, _GUESS_WORDS, _SPAN = 2 * 2**12 + 3 * 2 * 256, 2**12, 4096
_COUNTS_OF_ONE = 3 * 2**12
_MOST_CHUNKS, _LEAST_ROWS = 396, 128
# From this many values on the twins would need 64-bit integers.
_TWIN_LIMIT = 2**31


def backend() -> str:
    """The backend in use, "cuda" or "xla".

    Raises:
      UsageError: if `SWAT_JAX_BACKEND` names none, or "cuda" without the library.
    """
    name = os.environ.get("SWAT_JAX_BACKEND", "")
    if name and name not in _BACKENDS:
        raise UsageError(f"SWAT_JAX_BACKEND must be one of {', '.join(_BACKENDS)}; got {name!r}")
    if name == "xla" or (not name and jax.default_backend() != "gpu"):
        return "xla"
    status = native.load()
    if status.available:
        return "cuda"
    if name == "cuda":
        raise UsageError(f"SWAT_JAX_BACKEND is cuda, but {status.reason}")
    warn_once(f"swat_jax trains without its CUDA kernels, slower and larger: {status.reason}")
    return "xla"


def packs() -> bool:
    """Whether saved activations are packed by default: where there are kernels for it."""
    return backend() == "cuda"


def folds(dtype: Any) -> bool:
    """Whether convs of few channels are computed as `swat_jax.convolution.Convolution.folded`.

    It is another order of the same sums, written for cuDNN. The backend decides, whatever device
    the program is compiled for.
    """
    return _has_kernel("fold", dtype)


def settled_gradient(dw: jax.Array) -> jax.Array:
    """The gradient of weights as it is, but on a GPU laid out as they are before anyone reads it.

    cuDNN returns it in another layout. An update that reads it across its layout is slow, and is
    not made in place: XLA copies new weights and momentum. Flat, it has one layout only.
    """
    if backend() != "cuda":
        return dw
    return lax.optimization_barrier(dw.ravel()).reshape(dw.shape)


def threshold(x: jax.Array, keep: top_k.Count) -> jax.Array:
    """The ``keep``-th largest magnitude; see `swat_jax.sparsity.top_k.threshold`.

    No gradient flows to ``x``.
    """
    x = lax.stop_gradient(x)
    if not _has_kernel("threshold", x.dtype):
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
    if not _has_kernel("threshold", x.dtype) or stored.dtype != jnp.float32:
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
    has_kernel = all(_has_kernel("threshold", dtype) for dtype in dtypes)
    if not has_kernel or len(dtypes) != 1 or any(one.dtype != jnp.float32 for one in stored):
        return list(map(refreshed_threshold, is_refresh, xs, keeps, stored))
    count = len(xs)

    def kernel(
        keep: jax.Array, refresh: jax.Array, xs: Sequence[jax.Array], stored: Sequence[jax.Array]
    ) -> list[jax.Array]:
        limit = jax.ShapeDtypeStruct((), jnp.float32)
        _, *limits = _call(
            "thresholds",
            (_words(count * _COUNTS_OF_ONE), *[limit] * count),
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
    return _choose(kernel, twin, words, flags, xs, list(stored))


def sparsify(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """``x`` on its mask, 0 elsewhere; see `swat_jax.sparsity.top_k.sparsify`.

    XLA fuses it into what stands before or after, so it needs no kernel.
    """
    return top_k.sparsify(x, threshold)


def pack(x: jax.Array, threshold: jax.Array | float, capacity: int) -> Packed:
    """The values on the mask in compact form; see `swat_jax.sparsity.packing.pack`."""
    limit = jnp.asarray(threshold)
    wide = jnp.promote_types(limit.dtype, jnp.float32)
    if not _has_kernel("pack", x.dtype) or wide != jnp.float32:
        return packing.pack(x, threshold, capacity)

    def kernel(x: jax.Array, limit: jax.Array) -> Packed:
        *parts, _ = _call(
            "pack",
            (*_packed_results(x.dtype, x.size, capacity), _words(_selection_words(x.size))),
            x.ravel(),
            limit.astype(jnp.float32),
        )
        return _packed(parts, x.shape)

    return _choose(kernel, lambda x, limit: packing.pack(x, limit, capacity), x, limit)


def unpack(packed: Packed, least: jax.Array | float | None = None) -> jax.Array:
    """The dense form of ``packed``; see `swat_jax.sparsity.packing.unpack`."""
    if not _has_kernel("unpack", packed.dtype):
        return packing.unpack(packed, least)
    size = math.prod(packed.shape)

    def kernel(packed: Packed, least: jax.Array | None) -> jax.Array:
        limit = jnp.zeros((), jnp.float32) if least is None else least.astype(jnp.float32)
        (x,) = _call(
            "unpack",
            (jax.ShapeDtypeStruct((size,), packed.dtype),),
            *(packed.values, packed.bitmap, packed.offsets, limit),
        )
        return x.reshape(packed.shape)

    limit = None if least is None else jnp.asarray(least)
    return _choose(kernel, packing.unpack, packed, limit)


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
    if not _has_kernel("batch_norm", x.dtype) or x.size == 0:
        return batch_norm.statistics(x)

    def kernel(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = _rows(x)
        vector = jax.ShapeDtypeStruct(rows.shape[1:], jnp.float32)
        mean, variance, _ = _call(
            "batch_norm_statistics", (vector, vector, _words(_cut_words(rows.shape))), rows
        )
        return mean, variance

    return _choose(kernel, batch_norm.statistics, x)


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
        packed, limits = (None, None) if selection is None else select(y, selection)
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
        readers, mode, packed_results = 0, 0, [_words(0)] * 4
        keep: Any = _absent(jnp.float32)
        is_refresh: Any = keep
        stored: Any = keep
        if selection is not None:
            keep, readers, mode = selection.counts(), selection.keep.shape[0], 1
            words += _selection_words(x.size)
            packed_results = list(_packed_results(x.dtype, x.size, selection.capacity))
            if selection.is_refresh is not None:
                mode, is_refresh, stored = 2, selection.is_refresh, selection.stored
        results = (
            jax.ShapeDtypeStruct(rows.shape, x.dtype),
            _words(packing.bitmap_words(x.size) if keeps_signs else 0),
            *packed_results,
            jax.ShapeDtypeStruct((readers,), jnp.float32),
            _words(words),
        )
        y, signs, *parts, limits, _ = _call(
            "batch_norm_relu",
            results,
            rows,
            *(vector.astype(jnp.float32) for vector in vectors),
            _absent(x.dtype) if residual is None else _rows(residual),
            _absent(jnp.uint32) if kept is None else kept,
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
        return y, signs, _packed(parts, x.shape), limits

    operands = (x, vectors, residual, kept, selection)
    if _has_kernel("batch_norm", x.dtype) and x.size:
        return Normalized(*_choose(kernel, twin, *operands))
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
    if not _has_kernel("batch_norm", x.dtype) or x.size == 0:
        return twin(x, dys, positive, vectors)

    def kernel(
        x: jax.Array, dys: Sequence[jax.Array], positive: jax.Array | None, vectors: Vectors
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        rows = _rows(x)
        vector = jax.ShapeDtypeStruct(rows.shape[1:], jnp.float32)
        kept = jax.ShapeDtypeStruct(rows.shape if keeps_dz else (0,), x.dtype)
        total, moment, dz, _ = _call(
            "batch_norm_gradient_sums",
            (vector, vector, kept, _words(_cut_words(rows.shape))),
            *(rows, _rows(dys[0]), _rows(dys[1]) if len(dys) > 1 else _absent(x.dtype)),
            _absent(jnp.uint32) if positive is None else positive,
            *(vector.astype(jnp.float32) for vector in vectors),
            epsilon=np.float32(epsilon),
            relu=relu,
            factor=np.float32(factor),
        )
        return total, moment, dz.reshape(x.shape) if keeps_dz else None

    return _choose(kernel, twin, x, dys, positive, vectors)


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
        dx, _ = _call(
            "batch_norm_gradient",
            (jax.ShapeDtypeStruct(rows.shape, x.dtype), _words(words)),
            *(rows, _rows(dy)),
            *(vector.astype(jnp.float32) for vector in (*vectors, *sums)),
            _absent(x.dtype) if through is None else _rows(through),
            epsilon=np.float32(epsilon),
            relu=relu,
            inverse_count=np.float32(1 / count),
        )
        return dx.reshape(x.shape)

    operands = (x, dy, vectors, sums, through)
    if not _has_kernel("batch_norm", x.dtype) or x.size == 0:
        return twin(*operands)
    return _choose(kernel, twin, *operands)


def max_pool_gradient(pool: Pool, winner: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of the input of a max pooling; see `swat_jax.max_pool.Pool.gradient`."""
    if not _has_kernel("max_pool", dy.dtype) or len(pool.window) != 2 or dy.size == 0:
        return pool.gradient(winner, dy)

    def kernel(winner: jax.Array, dy: jax.Array) -> jax.Array:
        (low_y, _), (low_x, _) = pool.padding
        (dx,) = _call(
            "max_pool_gradient",
            (jax.ShapeDtypeStruct(pool.shape, dy.dtype),),
            *(winner, dy),
            window=np.array(pool.window, np.int64),
            strides=np.array(pool.strides, np.int64),
            lows=np.array((low_y, low_x), np.int64),
        )
        return dx

    return _choose(kernel, pool.gradient, winner, dy)


def draw_kept(key: jax.Array, rate: float, size: int) -> jax.Array:
    """A bitmap of what dropout keeps of ``size`` values; see `swat_jax.dropout_bits`.

    The same key gives the same bits on every backend.

    Args:
      key: of `jax.random`.
      rate: the fraction that is dropped, rounded to a multiple of 2**-16.
      size: how many values there are.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    dropped = dropout_bits.dropped(rate)
    twin = functools.partial(dropout_bits.draw, size=size, dropped=dropped)
    if not _has_kernel("dropout_bits", jnp.float32) or size == 0:
        return twin(words)

    def kernel(words: jax.Array) -> jax.Array:
        (bitmap,) = _call(
            "dropout_bits",
            (_words(packing.bitmap_words(size)),),
            words,
            n=np.int64(size),
            dropped=np.int64(dropped),
        )
        return bitmap

    return kernel(words) if size >= _TWIN_LIMIT else _choose(kernel, twin, words)


def compact(kernel: jax.Array, vector: int, chunk: int, multiple: int) -> Compact:
    """What is kept of a sparse kernel; see `swat_jax.sparsity.compact.compact`."""
    twin = functools.partial(compaction.compact, vector=vector, chunk=chunk, multiple=multiple)
    groups, chunks, _, room = compaction.sizes(kernel.shape, vector, chunk, multiple)
    if not _has_kernel("compact", kernel.dtype) or kernel.size == 0:
        return twin(kernel)

    def call(kernel: jax.Array) -> Compact:
        starts = jax.ShapeDtypeStruct((groups, chunks + 1), jnp.int32)
        values, positions, starts, _ = _call(
            "compact",
            (
                jax.ShapeDtypeStruct((groups, chunks * room, vector), kernel.dtype),
                jax.ShapeDtypeStruct((groups, chunks * room), jnp.int32),
                *(starts, starts),
            ),
            kernel,
            vector=np.int64(vector),
            chunk=np.int64(chunk),
            multiple=np.int64(multiple),
        )
        return Compact(values, positions, starts)

    return _choose(call, twin, kernel)


def weight_gradient_refusal(
    conv: Convolution, shape: tuple[int, ...], dtype: Any, kernel: tuple[int, ...]
) -> str:
    """Why `sparse_conv_weight_gradient` does not take a gradient here; empty if it does.

    Args:
      conv: the convolution.
      shape: of its input.
      dtype: of its input.
      kernel: shape of its kernel.
    """
    reason = sparse_convolution.refusal(conv, shape, dtype, kernel)
    if not reason and _has_kernel("sparse_conv", dtype) and not _has_matrix_units():
        reason = "the GPU is older than compute capability 8.0"
    return reason


def sparse_conv_weight_gradient(
    packed: Packed,
    least: jax.Array | float | None,
    dy: jax.Array,
    conv: Convolution,
    window: tuple[int, int],
    cut: Cut | None = None,
) -> jax.Array:
    """The gradient of a kernel; see `swat_jax.sparse_convolution.weight_gradient`.

    Args:
      packed: the input (N, height, width, in), of bfloat16 or float16.
      least: if given, packed values whose magnitude is smaller are left out.
      dy: (N, rows, columns, out), the gradient of the output, of the same type.
      conv: the convolution.
      window: height and width of the kernel.
      cut: how the CUDA kernel's work is cut; None: as `swat_jax.sparse_convolution.cut` does.
        The bits of the result depend on it, and on nothing else.

    Returns:
      (*window, in, out), float32.

    Raises:
      UsageError: for what `swat_jax.sparse_convolution.refusal` refuses, shapes or types that do
        not fit, or a cut that there is not.
    """
    kernel = (*window, packed.shape[-1], dy.shape[-1])
    if reason := sparse_convolution.refusal(conv, packed.shape, packed.dtype, kernel):
        raise UsageError(f"packed has no weight gradient of its own: {reason}")
    plain = dataclasses.replace(conv, folds=False)
    x, weights = (jax.ShapeDtypeStruct(shape, packed.dtype) for shape in (packed.shape, kernel))
    output = jax.eval_shape(plain, x, weights)
    if dy.shape != output.shape or dy.dtype != packed.dtype:
        raise UsageError(
            f"dy must be like the output, {packed.dtype}{list(output.shape)}; "
            f"got {dy.dtype}{list(dy.shape)}"
        )
    if 0 in (*packed.shape, *dy.shape):
        return jnp.zeros(kernel, jnp.float32)
    if cut is None:
        cut = sparse_convolution.cut(conv, packed.shape, dy.shape, window)
    allowed = sparse_convolution.tiles(cut.gathers)
    if cut.tile not in allowed:
        raise UsageError(f"cut.tile must be one of {allowed}, got {cut.tile}")
    most = sparse_convolution.chunks(dy.shape, cut.tile)
    if not 1 <= cut.splits <= most:
        raise UsageError(f"cut.splits must be in [1, {most}], got {cut.splits}")
    if not cut.gathers and sparse_convolution.must_gather(conv, packed.shape, window):
        raise UsageError("cut.gathers must be True for this convolution, got False")

    def twin(packed: Packed, least: jax.Array | None, dy: jax.Array) -> jax.Array:
        return sparse_convolution.weight_gradient(packed, least, dy, conv, window)

    def call(packed: Packed, least: jax.Array | None, dy: jax.Array) -> jax.Array:
        (low_y, _), (low_x, _) = sparse_convolution.pads(conv, packed.shape[1:-1], window)
        limit = jnp.zeros((), jnp.float32) if least is None else least.astype(jnp.float32)
        dw, _ = _call(
            "sparse_conv_weight_gradient",
            (
                jax.ShapeDtypeStruct(kernel, jnp.float32),
                jax.ShapeDtypeStruct((cut.splits * math.prod(kernel),), jnp.float32),
            ),
            *(packed.values, packed.bitmap, packed.offsets, limit, dy),
            input=np.array(packed.shape[1:-1], np.int64),
            strides=np.array(conv.strides, np.int64),
            lows=np.array((low_y, low_x), np.int64),
            tile=np.array(cut.tile, np.int64),
            splits=np.int64(cut.splits),
            gathers=cut.gathers,
        )
        return dw

    limit = None if least is None else jnp.asarray(least)
    if not _has_kernel("sparse_conv", packed.dtype):
        return twin(packed, limit, dy)
    return _choose(call, twin, packed, limit, dy)


def sparse_conv_forward(
    x: jax.Array,
    kernel: jax.Array,
    conv: Convolution,
    cut: sparse_conv_direct.Cut | None = None,
    windows: bool = False,
) -> jax.Array:
    """A convolution with sparse weights; see `swat_jax.sparse_conv_direct.forward`.

    Zeros of ``kernel`` are not multiplied. What is not finite in ``x`` may reach, as in a dense
    product, output channels whose weight for it is zero.

    Args:
      x: (N, height, width, in), of float32, bfloat16 or float16.
      kernel: (rows, columns, in, out), of the same type, zeros where nothing is kept.
      conv: the convolution.
      cut: how the CUDA kernel's work is cut; None: as `swat_jax.sparse_conv_direct.cut` does. The
        bits of the result depend on its ``chunk`` and ``windows``, and on nothing else.
      windows: whether the kernel keeps and drops whole windows, for that choice.

    Returns:
      (N, rows, columns, out), of the same type.

    Raises:
      UsageError: for what `swat_jax.sparse_conv_direct.refusal` refuses, types that differ, or a
        cut that there is not.
    """
    if reason := sparse_conv_direct.refusal(conv, x.shape, x.dtype, kernel.shape):
        raise UsageError(f"x and kernel have no sparse convolution: {reason}")
    if kernel.dtype != x.dtype or kernel.shape[-2] != x.shape[-1]:
        raise UsageError(
            f"kernel must have the type and channels of x, {x.dtype} and {x.shape[-1]}; got "
            f"{kernel.dtype}{list(kernel.shape)}"
        )
    return _sparse_conv_direct(
        x, kernel, conv, cut, windows, lambda x, kernel: sparse_conv_direct.forward(x, kernel, conv)
    )


def sparse_conv_input_gradient(
    dy: jax.Array,
    kernel: jax.Array,
    conv: Convolution,
    size: tuple[int, int],
    cut: sparse_conv_direct.Cut | None = None,
    windows: bool = False,
) -> jax.Array:
    """The gradient of its input; see `swat_jax.sparse_conv_direct.input_gradient`.

    Args:
      dy: (N, rows, columns, out), the gradient of the output, of float32, bfloat16 or float16.
      kernel: (rows, columns, in, out), of the same type, zeros where nothing is kept.
      conv: the convolution, at stride 1.
      size: height and width of the input.
      cut: as in `sparse_conv_forward`, of ``dy`` and the transposed kernel.
      windows: as there.

    Returns:
      (N, *size, in), of the same type.

    Raises:
      UsageError: for what `swat_jax.sparse_conv_direct.gradient_refusal` refuses, shapes or types
        that do not fit, or a cut that there is not.
    """
    shape = (dy.shape[0], *size, kernel.shape[-2])
    if reason := sparse_conv_direct.gradient_refusal(conv, shape, dy.dtype, kernel.shape):
        raise UsageError(f"dy and kernel have no sparse input gradient: {reason}")
    output = (dy.shape[0], *sparse_conv_direct.results(conv, size, kernel.shape[:-2]))
    if kernel.dtype != dy.dtype or dy.shape != (*output, kernel.shape[-1]):
        raise UsageError(
            f"dy must be like the output, {kernel.dtype}{[*output, kernel.shape[-1]]}; got "
            f"{dy.dtype}{list(dy.shape)}"
        )

    def twin(dy: jax.Array, turned: jax.Array) -> jax.Array:
        # Turned twice it is what it was.
        return sparse_conv_direct.input_gradient(dy, compaction.transposed(turned), conv, size)

    turned = sparse_conv_direct.transposed(conv, size, kernel.shape[:-2])
    return _sparse_conv_direct(dy, compaction.transposed(kernel), turned, cut, windows, twin)


def _sparse_conv_direct(
    x: jax.Array,
    kernel: jax.Array,
    conv: Convolution,
    cut: sparse_conv_direct.Cut | None,
    windows: bool,
    twin: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """A convolution that is not refused, by its CUDA kernel."""
    window = kernel.shape[:-2]
    result = (*sparse_conv_direct.results(conv, x.shape[1:-1], window), kernel.shape[-1])
    y = jax.ShapeDtypeStruct((x.shape[0], *result), x.dtype)
    if 0 in (*x.shape, *y.shape):
        return varying_like(jnp.zeros(y.shape, y.dtype), x, kernel)
    chosen = cut or sparse_conv_direct.cut(conv, x.shape, kernel.shape, windows)
    direct = sparse_conv_direct
    tiles = direct.WINDOW_TILES if chosen.windows else direct.TILES
    if chosen.tile not in tiles:
        raise UsageError(f"cut.tile must be one of {tiles}, got {chosen.tile}")
    if chosen.windows and not direct.has_windows(conv, x.shape, kernel.shape):
        raise UsageError(f"cut.windows must be False for a kernel {kernel.shape} and this conv")
    if chosen.chunk not in (4, 8, 16, 32, 64, 128, 256):
        raise UsageError(f"cut.chunk must be a power of two from 4 to 256, got {chosen.chunk}")
    if not 1 <= chosen.columns <= result[1]:
        raise UsageError(f"cut.columns must be in [1, {result[1]}], got {chosen.columns}")
    if not _has_kernel("sparse_conv_direct", x.dtype):
        return twin(x, kernel)

    def call(x: jax.Array, kernel: jax.Array) -> jax.Array:
        lows = [low for low, _ in sparse_convolution.pads(conv, x.shape[1:-1], window)]
        if chosen.windows:
            kept = compact(direct.by_windows(kernel), direct.WINDOW, chosen.chunk, 1)
        else:
            kept = compact(kernel, 1, chosen.chunk, direct.MULTIPLE)
        (found,) = _call(
            "sparse_conv_direct",
            (y,),
            *(x, *kept),
            window=np.array(window, np.int64),
            strides=np.array(conv.strides, np.int64),
            lows=np.array(lows, np.int64),
            tile=np.array(chosen.tile, np.int64),
            chunk=np.int64(chosen.chunk),
            columns=np.int64(chosen.columns),
            windows=chosen.windows,
        )
        return found

    return _choose(call, twin, x, kernel)


def vector_refusal(
    conv: Convolution, shape: tuple[int, ...], dtype: Any, kernel: tuple[int, ...], vector: int
) -> str:
    """Why `sparse_conv_vector_forward` does not take a convolution here; empty if it does.

    Args:
      conv: the convolution.
      shape: of its input.
      dtype: of its input.
      kernel: shape of its kernel.
      vector: output channels that are kept or dropped together.
    """
    reason = vector_convolution.refusal(conv, shape, dtype, kernel, vector, _shared_room())
    if not reason and _has_kernel("sparse_conv_vector", dtype) and not _has_matrix_units():
        reason = "the GPU is older than compute capability 8.0"
    return reason


def vector_cuts(
    conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...]
) -> list[vector_convolution.Cut]:
    """How its work may be cut here, beginning with what is chosen without a measurement.

    Args:
      conv: a convolution that is not refused.
      shape: of its input.
      kernel: shape of its kernel.
    """
    room = _shared_room()
    first = vector_convolution.cut(conv, shape, kernel, room)
    return list(dict.fromkeys((first, *vector_convolution.cuts(conv, shape, kernel, room))))


def sparse_conv_vector_forward(
    x: jax.Array,
    kernel: jax.Array,
    conv: Convolution,
    vector: int,
    cut: vector_convolution.Cut | None = None,
) -> jax.Array:
    """A convolution that skips dropped weights; see `swat_jax.vector_convolution.forward`.

    It has no gradient of its own: who calls it defines one.

    Args:
      x: (N, height, width, in), of bfloat16 or float16.
      kernel: (*window, in, out) of the same type, zero where it is dropped. What it skips are
        vectors of zeros: ``vector`` output channels, from a multiple of it on, of one input channel
        and place in the window.
      conv: the convolution.
      vector: 8, 16 or 32, and a divisor of ``out``.
      cut: how the CUDA kernel's work is cut; None: as `swat_jax.vector_convolution.cut` does. The
        bits of the result depend on it, and on nothing else.

    Returns:
      (N, rows, columns, out), of the type of ``x``: sums in float32, rounded once.

    Raises:
      UsageError: for what `swat_jax.vector_convolution.refusal` refuses, types that do not fit, or
        a cut that there is not.
    """
    if kernel.dtype != x.dtype:
        raise UsageError(f"kernel must be {x.dtype} like x, got {kernel.dtype}")
    room = _shared_room()
    if reason := vector_refusal(conv, x.shape, x.dtype, kernel.shape, vector):
        raise UsageError(f"there is no product that skips vectors: {reason}")
    output = jax.eval_shape(dataclasses.replace(conv, folds=False), x, kernel)
    if 0 in (*x.shape, *kernel.shape, *output.shape):
        return varying_like(jnp.zeros(output.shape, x.dtype), x, kernel)
    if cut is None:
        cut = vector_convolution.cut(conv, x.shape, kernel.shape, room)
    if cut.tile not in vector_convolution.TILES:
        raise UsageError(f"cut.tile must be one of {vector_convolution.TILES}, got {cut.tile}")
    if not 1 <= cut.height <= cut.tile[0] or cut.tile[0] % cut.height:
        raise UsageError(f"cut.height must divide {cut.tile[0]}, got {cut.height}")
    if cut.chunk not in (32, 64, 128, 256, 512, 1024):
        raise UsageError(f"cut.chunk must be a power of 2 from 32 to 1024, got {cut.chunk}")
    if (needed := vector_convolution.shared_bytes(conv, kernel.shape, cut)) > room:
        raise UsageError(f"cut must fit in {room} bytes of shared memory, got one of {needed}")

    def call(x: jax.Array, kernel: jax.Array) -> jax.Array:
        options = _vector_options(conv, x.shape, kernel.shape, vector, cut)
        lists = _vector_lists(kernel, vector, cut, options)
        result = jax.ShapeDtypeStruct(output.shape, x.dtype)
        return _call("sparse_conv_vector_forward", (result,), x, *lists, **options)[0]

    twin = functools.partial(vector_convolution.forward, conv=conv)
    if not _has_kernel("sparse_conv_vector", x.dtype):
        return twin(x, kernel)
    return _choose(call, twin, x, kernel)


def _vector_lists(
    kernel: jax.Array, vector: int, cut: vector_convolution.Cut, options: dict[str, Any]
) -> list[jax.Array]:
    """What `sparse_conv_vector_forward` reads of the weights: offsets, values, lengths."""
    segments, entries = vector_convolution.segments(kernel.shape, vector, cut)
    sizes = (entries, entries * vector // 2, 1)
    results = tuple(_words(segments * size) for size in sizes)
    return _call("sparse_conv_vector_lists", results, kernel, **options)


def _vector_options(
    conv: Convolution,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    vector: int,
    cut: vector_convolution.Cut,
) -> dict[str, Any]:
    """What both kernels of `sparse_conv_vector_forward` are told."""
    lows = [low for low, _ in sparse_convolution.pads(conv, shape[1:-1], kernel[:-2])]
    pairs = {"window": kernel[:-2], "strides": conv.strides, "lows": lows, "tile": cut.tile}
    numbers = {"vector": vector, "height": cut.height, "chunk": cut.chunk}
    return {
        **{name: np.array(value, np.int64) for name, value in pairs.items()},
        **{name: np.int64(value) for name, value in numbers.items()},
    }


def _shared_room() -> int:
    """Bytes of shared memory that a block of the GPU may have; another device is not asked."""
    if jax.default_backend() != "gpu":
        return vector_convolution.LARGE_ROOM
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    kilobytes = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
    return kilobytes.get(capability, 99) * 1024


def _has_matrix_units() -> bool:
    """Whether the GPU has the tensor cores that kernels use; another device is not asked."""
    if jax.default_backend() != "gpu":
        return True
    return float(getattr(jax.devices()[0], "compute_capability", "8.0")) >= 8


def _threshold(
    x: jax.Array,
    keep: top_k.Count,
    is_refresh: jax.Array,
    stored: jax.Array,
) -> jax.Array:
    def kernel(x: jax.Array, keep: jax.Array, refresh: jax.Array, stored: jax.Array) -> jax.Array:
        limit, _ = _call(
            "threshold",
            (jax.ShapeDtypeStruct((), jnp.float32), _words(_SEARCH_WORDS)),
            *(x.ravel(), keep, refresh, stored),
        )
        return limit

    words = varying_like(jnp.stack(top_k.words(keep)), x)
    return _choose(kernel, _refreshed, x, words, is_refresh, stored)


def _refreshed(x: jax.Array, keep: jax.Array, refresh: jax.Array, stored: jax.Array) -> jax.Array:
    """The definition of a threshold that is recomputed, or not."""
    return thresholds.refresh(refresh, stored, lambda: top_k.threshold(x, keep))


def _has_kernel(op: str, dtype: Any) -> bool:
    disabled = [name for name in os.environ.get("SWAT_JAX_XLA_OPS", "").split(",") if name]
    for name in disabled:
        if name not in OPS:
            raise UsageError(f"SWAT_JAX_XLA_OPS must hold names of {', '.join(OPS)}; got {name!r}")
    return backend() == "cuda" and op not in disabled and dtype in _DTYPES


def _choose(kernel: Callable[..., Any], twin: Callable[..., Any], *operands: Any) -> Any:
    """The kernel where the program is compiled for a CUDA device, the twin elsewhere."""
    operands = jax.tree.map(lambda leaf: varying_like(leaf, operands), operands)
    if max(leaf.size for leaf in jax.tree.leaves(operands)) >= _TWIN_LIMIT:
        return kernel(*operands)  # larger than the twins take
    return lax.platform_dependent(*operands, cuda=kernel, default=twin)


def _call(
    name: str,
    results: Sequence[Any],
    *operands: jax.Array,
    **attributes: Any,
) -> list[Any]:
    """The custom call; under `jax.vmap` a leading axis of independent problems."""
    axes = varying_axes(operands)
    call = jax.ffi.ffi_call(
        f"swat_jax_{name}",
        tuple(results),
        vmap_method="broadcast_all",
    )
    outputs = call(*operands, **attributes)
    # The call loses the information over which mesh axes its results vary.
    if axes:
        outputs = [lax.pcast(value, axes, to="varying") for value in outputs]
    return list(outputs)


def _at_most_two(dys: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    first, *rest = dys
    return (first, functools.reduce(jnp.add, rest)) if rest else (first,)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _is_fixed(channels: int) -> bool:
    return channels <= packing.TILE and packing.TILE % channels == 0


def _absent(dtype: Any) -> jax.Array:
    return jnp.zeros((0,), dtype)


def _words(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.uint32)


def _selection_words(size: int) -> int:
    return _GUESS_WORDS + 2 * _SEARCH_WORDS + 4 * -(-size // _SPAN)


def _cut_words(shape: tuple[int, ...]) -> int:
    rows, channels = shape
    chunks = min(_MOST_CHUNKS, -(-rows // _LEAST_ROWS))
    return 2 * channels * chunks


def _packed_results(dtype: Any, size: int, capacity: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    if not 1 <= capacity < 2**32 or size >= 2**32:
        raise UsageError(
            f"capacity must be at least 1 and x below 2**32 values; got {capacity}, {size}"
        )
    return (
        jax.ShapeDtypeStruct((capacity,), dtype),
        _words(packing.bitmap_words(size)),
        _words(-(-size // packing.TILE)),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )


def _packed(parts: Sequence[jax.Array], shape: tuple[int, ...]) -> Packed:
    values, bitmap, offsets, overflow = parts
    return Packed(values, bitmap, offsets, overflow, shape)
