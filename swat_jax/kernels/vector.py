"""Convs that skip dropped vectors of weights, on tensor cores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax import sparse_convolution, vector_convolution
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.kernels import choice, custom_call
from swat_jax.sparsity.varying import varying_like


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
    reason = vector_convolution.refusal(conv, shape, dtype, kernel, vector, shared_room())
    return reason or choice.gpu_refusal("sparse_conv_vector", dtype)


def vector_cuts(
    conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...]
) -> list[vector_convolution.Cut]:
    """How its work may be cut here, beginning with what is chosen without a measurement.

    Args:
      conv: a convolution that is not refused.
      shape: of its input.
      kernel: shape of its kernel.
    """
    room = shared_room()
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
    room = shared_room()
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
        options = vector_options(conv, x.shape, kernel.shape, vector, cut)
        lists = vector_lists(kernel, vector, cut, options)
        result = jax.ShapeDtypeStruct(output.shape, x.dtype)
        return custom_call.call("sparse_conv_vector_forward", (result,), x, *lists, **options)[0]

    twin = functools.partial(vector_convolution.forward, conv=conv)
    if not choice.has_kernel("sparse_conv_vector", x.dtype):
        return twin(x, kernel)
    return custom_call.choose(call, twin, x, kernel)


def vector_lists(
    kernel: jax.Array, vector: int, cut: vector_convolution.Cut, options: dict[str, Any]
) -> list[jax.Array]:
    """What `sparse_conv_vector_forward` reads of the weights: offsets, values, lengths."""
    segments, entries = vector_convolution.segments(kernel.shape, vector, cut)
    sizes = (entries, entries * vector // 2, 1)
    results = tuple(custom_call.words(segments * size) for size in sizes)
    return custom_call.call("sparse_conv_vector_lists", results, kernel, **options)


def vector_options(
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


def shared_room() -> int:
    """Bytes of shared memory that a block of the GPU may have; another device is not asked."""
    if jax.default_backend() != "gpu":
        return vector_convolution.LARGE_ROOM
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    kilobytes = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
    return kilobytes.get(capability, 99) * 1024
