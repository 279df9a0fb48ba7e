"""Every op of `swat_jax.kernels` against its jnp twin, in a few seconds, on the default device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from swat_jax import (
    batch_norm,
    dropout_bits,
    kernels,
    sparse_conv_direct,
    sparse_convolution,
    vector_convolution,
)
from swat_jax.convolution import Convolution
from swat_jax.max_pool import Pool
from swat_jax.sparsity import compact, packing, top_k

_SHAPE = (1234, 96)  # neither a multiple of a tile nor a power of two
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# Of what batch norm returns, relative to its largest value: a few roundings.
_BOUNDS = {jnp.bfloat16: 2**-7, jnp.float16: 2**-9, jnp.float32: 2e-6}
_KEEP = 12_345


def _inputs(dtype: Any) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, _SHAPE).astype(dtype) for key in keys]


def _differs(what: str, found: Any, expected: Any, bound: float = 0.0) -> str:
    """What differs, or nothing."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        error = float(jnp.max(jnp.abs(one - other), initial=0))
        if not error <= bound * max(1.0, float(jnp.max(jnp.abs(other), initial=0))):
            return f"{what} differs from its definition by {error:g}"
    return ""


def _for_each_type(test: Callable[[Any], str]) -> Callable[[], str]:
    def run() -> str:
        for dtype in _DTYPES:
            if found := test(dtype):
                return f"{jnp.dtype(dtype).name}: {found}"
        return ""

    return run


def _threshold(dtype: Any) -> str:
    x = _inputs(dtype)[0]
    found = jax.jit(kernels.threshold)(x, jnp.uint32(_KEEP))
    if message := _differs("threshold", found, top_k.threshold(x, _KEEP)):
        return message
    xs, keeps = [x, x[:7], x[5:]], [_KEEP, 2, _KEEP // 2]
    stored = [jnp.zeros(())] * 3
    run = jax.jit(lambda xs: kernels.refreshed_thresholds([True] * 3, xs, keeps, stored))
    limits = [top_k.threshold(*one).astype(jnp.float32) for one in zip(xs, keeps, strict=True)]
    return _differs("thresholds", run(xs), limits)


def _pack(dtype: Any) -> str:
    x = _inputs(dtype)[0]
    limit = top_k.threshold(x, _KEEP)
    for capacity in (_KEEP + 500, _KEEP - 500):
        found = jax.jit(lambda x, t, c=capacity: kernels.pack(x, t, c))(x, limit)
        if message := _differs("pack", found, packing.pack(x, limit, capacity)):
            return message
    return ""


def _unpack(dtype: Any) -> str:
    x = _inputs(dtype)[0]
    packed = packing.pack(x, top_k.threshold(x, _KEEP), _KEEP)
    return _differs("unpack", jax.jit(kernels.unpack)(packed), packing.unpack(packed))


def _batch_norm(dtype: Any) -> str:
    x, residual, dy = _inputs(dtype)
    scale, bias = jnp.linspace(0.5, 2, _SHAPE[1]), jnp.linspace(-1, 1, _SHAPE[1])
    options: dict[str, Any] = {"epsilon": 1e-5, "relu": True}
    bound = _BOUNDS[dtype]
    mean, variance = jax.jit(kernels.batch_norm_statistics)(x)
    if found := _differs("statistics", (mean, variance), batch_norm.statistics(x), 1e-5):
        return found
    vectors = batch_norm.Vectors(mean, variance, scale, bias)
    keep = jnp.asarray([[0, _KEEP]], jnp.uint32)
    selection = kernels.Selection(keep, packing.capacity(_KEEP, x.size))
    result = jax.jit(
        lambda x, residual: kernels.batch_norm_relu(
            x, vectors, residual, keeps_signs=True, selection=selection, **options
        )
    )(x, residual)
    expected = batch_norm.normalize(x, vectors, residual, **options)
    if found := _differs("normalize", result.y, expected, bound):
        return found
    limit = top_k.threshold(result.y, _KEEP)
    packed = packing.pack(result.y, limit, selection.capacity)
    if found := _differs("selection", (result.packed, result.thresholds), (packed, limit[None])):
        return found
    arguments = (x, [dy], result.positive, vectors)
    keeping: dict[str, Any] = {**options, "keeps_dz": True}
    *sums, dz = jax.jit(lambda *a: kernels.batch_norm_gradient_sums(*a, **keeping))(*arguments)
    *expected_sums, expected_dz = batch_norm.gradient_sums(*arguments, **keeping)
    if found := _differs("gradient sums", sums, expected_sums, 1e-5):
        return found
    if found := _differs("dz", dz, expected_dz):
        return found
    more: dict[str, Any] = {"epsilon": 1e-5, "relu": False, "count": _SHAPE[0]}
    arguments = (x, dz, vectors, tuple(sums))
    dx = jax.jit(lambda *a: kernels.batch_norm_gradient(*a, **more))(*arguments)
    return _differs("gradient", dx, batch_norm.gradient(*arguments, **more), bound)


def _max_pool(dtype: Any) -> str:
    x = jax.random.normal(jax.random.key(1), (3, 13, 14, 24)).astype(dtype)
    for window, strides, padding in (
        ((3, 3), (2, 2), ((1, 1),) * 2),
        ((2, 2), (2, 2), ((0, 0),) * 2),
    ):
        pool = Pool(window, strides, padding, x.shape)
        winner = pool.winner(x)
        dy = pool.pool(x)
        found = jax.jit(lambda w, dy, p=pool: kernels.max_pool_gradient(p, w, dy))(winner, dy)
        if message := _differs("gradient", found, pool.gradient(winner, dy), _BOUNDS[dtype]):
            return message
    return ""


def _dropout_bits() -> str:
    words = jax.random.bits(jax.random.key(2), (2,), jnp.uint32)
    found = jax.jit(lambda: kernels.draw_kept(jax.random.key(2), 0.25, 10_001))()
    return _differs("dropout", found, dropout_bits.draw(words, 10_001, 2**14))


def _sparse_conv() -> str:
    ones = (1, 1)
    for dtype in (jnp.bfloat16, jnp.float16):
        for window, strides, channels in (((1, 1), ones, 96), ((3, 3), (2, 2), 40)):
            keys = jax.random.split(jax.random.key(3), 2)
            x = jax.random.normal(keys[0], (3, 13, 14, channels)).astype(dtype)
            limit = top_k.threshold(x, x.size // 10).astype(jnp.float32)
            packed = packing.pack(x, limit / 2, x.size)
            conv = Convolution(strides, "SAME", ones, ones)
            size = tuple(-(-s // stride) for s, stride in zip((13, 14), strides, strict=True))
            dy = jax.random.normal(keys[1], (3, *size, 72)).astype(dtype)
            found = jax.jit(
                lambda p, t, dy, c=conv, w=window: kernels.sparse_conv_weight_gradient(
                    p, t, dy, c, w
                )
            )(packed, limit, dy)
            expected = sparse_convolution.weight_gradient(packed, limit, dy, conv, window)
            if message := _differs(f"{window}", found, expected, 1e-5):
                return f"{jnp.dtype(dtype).name}: {message}"
    return ""


def _sparse_conv_vector() -> str:
    # Whole numbers: exact in any order of sums, and rounded once.
    conv = Convolution((1, 1), "SAME", (1, 1), (1, 1))
    for vector in vector_convolution.VECTORS:
        keys = jax.random.split(jax.random.key(vector), 3)
        x = jax.random.randint(keys[0], (9, 7, 10, 72), -4, 5).astype(jnp.bfloat16)
        kept = jax.random.bernoulli(keys[1], 0.2, (3, 3, 72, 96 // vector))
        kernel = jax.random.randint(keys[2], (3, 3, 72, 96), -4, 5) * jnp.repeat(kept, vector, -1)
        kernel = kernel.astype(jnp.bfloat16)
        found = jax.jit(
            lambda x, kernel, v=vector: kernels.sparse_conv_vector_forward(x, kernel, conv, v)
        )(x, kernel)
        expected = vector_convolution.forward(x, kernel, conv)
        if message := _differs(f"vectors of {vector}", found, expected):
            return message
    return ""


def _compact(dtype: Any) -> str:
    kernel = jax.random.normal(jax.random.key(4), (3, 3, 40, 96)).astype(dtype)
    kernel = top_k.sparsify(kernel, 1.3)
    for vector in compact.VECTORS:
        numbers = (vector, 16, 2)
        found = jax.jit(lambda kernel, n=numbers: kernels.compact(kernel, *n))(kernel)
        values, positions, starts = compact.compact(kernel, *numbers)
        if message := _differs(f"starts of vectors of {vector}", found.starts, starts):
            return message
        is_there = jnp.arange(positions.shape[1]) < starts[:, -1:]
        expected = (jnp.where(is_there[..., None], values, 0), jnp.where(is_there, positions, 0))
        parts = (
            jnp.where(is_there[..., None], found.values, 0),
            jnp.where(is_there, found.positions, 0),
        )
        if message := _differs(f"vectors of {vector}", parts, expected):
            return message
    return ""


def _sparse_conv_direct(dtype: Any) -> str:
    ones, keys = (1, 1), jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (3, 13, 14, 40)).astype(dtype)
    for window, strides in (((1, 1), ones), ((3, 3), ones), ((3, 3), (2, 2))):
        conv = Convolution(strides, "SAME", ones, ones)
        kernel = top_k.sparsify(jax.random.normal(keys[1], (*window, 40, 72)).astype(dtype), 1.3)
        y = jax.jit(lambda x, k, c=conv: kernels.sparse_conv_forward(x, k, c))(x, kernel)
        expected = sparse_conv_direct.forward(x, kernel, conv)
        if message := _differs(f"output of {window}", y, expected, _BOUNDS[dtype]):
            return message
        if strides != ones:
            continue
        dy, size = jax.random.normal(keys[2], y.shape).astype(dtype), (13, 14)
        dx = jax.jit(lambda dy, k, c=conv: kernels.sparse_conv_input_gradient(dy, k, c, (13, 14)))(
            dy, kernel
        )
        expected = sparse_conv_direct.input_gradient(dy, kernel, conv, size)
        if message := _differs(f"gradient of {window}", dx, expected, _BOUNDS[dtype]):
            return message
    return ""


SELF_TESTS: dict[str, Callable[[], str]] = {
    "threshold": _for_each_type(_threshold),
    "pack": _for_each_type(_pack),
    "unpack": _for_each_type(_unpack),
    "batch_norm": _for_each_type(_batch_norm),
    "max_pool": _for_each_type(_max_pool),
    "dropout_bits": _dropout_bits,
    "sparse_conv": _sparse_conv,
    "compact": _for_each_type(_compact),
    "sparse_conv_direct": _for_each_type(_sparse_conv_direct),
    "sparse_conv_vector": _sparse_conv_vector,
}
