"""Convs that multiply kept weights alone, on the GPU's ordinary cores, and their input gradient."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from swat_jax import sparse_conv_direct, sparse_convolution
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.kernels import choice, custom_call
from swat_jax.kernels.compaction import compact
from swat_jax.sparsity import compact as compaction
from swat_jax.sparsity.varying import varying_like


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
    if not choice.has_kernel("sparse_conv_direct", x.dtype):
        return twin(x, kernel)

    def call(x: jax.Array, kernel: jax.Array) -> jax.Array:
        lows = [low for low, _ in sparse_convolution.pads(conv, x.shape[1:-1], window)]
        if chosen.windows:
            kept = compact(direct.by_windows(kernel), direct.WINDOW, chosen.chunk, 1)
        else:
            kept = compact(kernel, 1, chosen.chunk, direct.MULTIPLE)
        (found,) = custom_call.call(
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

    return custom_call.choose(call, twin, x, kernel)
