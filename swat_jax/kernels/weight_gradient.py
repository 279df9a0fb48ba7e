"""The gradient of a conv's weights from packed activations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax import sparse_convolution
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.kernels import choice, custom_call
from swat_jax.sparse_convolution import Cut
from swat_jax.sparsity.packing import Packed


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
    return reason or choice.gpu_refusal("sparse_conv", dtype)


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
        dw, _ = custom_call.call(
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
    if not choice.has_kernel("sparse_conv", packed.dtype):
        return twin(packed, limit, dy)
    return custom_call.choose(call, twin, packed, limit, dy)
