"""Convolutions whose weights are sparse one by one, or window by window: output, input gradient.

Here they are defined, and here stands for what they have a kernel (`refusal`, `gradient_refusal`)
and how that cuts its work (`Cut`). The kernel multiplies kept weights only, on CUDA cores and in
float32. The input's gradient at stride 1 is the output for the transposed kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.convolution import Convolution
from swat_jax.sparse_convolution import pads
from swat_jax.sparsity.varying import varying_like

# Output pixels and channels of a block: `launch_direct_tile` in ops/ has these. The first three
# leave room for a second block on a multiprocessor.
TILES = ((256, 64), (512, 32), (128, 64), (256, 128), (512, 64))
_USUAL_TILES = TILES[:3]
# The same where windows are kept as a whole, and rows of a lane: `kStrip` there.
WINDOW_TILES = ((512, 32), (512, 64))
_STRIP = 4
# Values that a window has room for: `kRoom` there. A vector of the compact kernel.
WINDOW = 16
# Of entries in a list: `kMultiple` there.
MULTIPLE = 2
# Shared memory of a block that every GPU has from compute capability 8.0 on.
_SHARED = 99 * 2**10
_IMAGES, _BANKS, _WARPS = 4, 8, 8
_MULTIPROCESSORS = 132


def forward(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
    """The output, with products and sums in float32.

    Args:
      x: (N, *spatial, in).
      kernel: (*window, in / groups, out), zeros where nothing is kept.
      conv: the convolution.

    Returns:
      (N, *spatial, out), of the type of ``x``.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _exact(conv)(x.astype(wide), kernel.astype(wide)).astype(x.dtype)


def input_gradient(
    dy: jax.Array, kernel: jax.Array, conv: Convolution, size: tuple[int, ...]
) -> jax.Array:
    """The gradient of the input, with products and sums in float32.

    Args:
      dy: (N, *spatial, out), the gradient of the output.
      kernel: (*window, in / groups, out), zeros where nothing is kept.
      conv: the convolution.
      size: of the input's spatial axes.

    Returns:
      (N, *size, in), of the type of ``dy``.
    """
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    channels = kernel.shape[-2] * conv.feature_group_count
    x = varying_like(jnp.zeros((dy.shape[0], *size, channels), wide), dy, kernel)
    exact, weights = _exact(conv), kernel.astype(wide)
    (dx,) = jax.linear_transpose(lambda x: exact(x, weights), x)(dy.astype(wide))
    return dx.astype(dy.dtype)


def transposed(conv: Convolution, size: tuple[int, ...], window: tuple[int, ...]) -> Convolution:
    """The convolution that makes the input's gradient out of the output's, at stride 1.

    Its kernel is `swat_jax.sparsity.compact.transposed`.

    Args:
      conv: the convolution, without strides and dilations.
      size: of the input's spatial axes.
      window: shape of the kernel without channels.
    """
    turned = tuple(
        (extent - 1 - low, extent - 1 - high)
        for extent, (low, high) in zip(window, pads(conv, size, window), strict=True)
    )
    return dataclasses.replace(conv, padding=turned, folds=False)


def refusal(conv: Convolution, shape: tuple[int, ...], dtype: Any, kernel: tuple[int, ...]) -> str:
    """Why there is no kernel for this convolution; empty if there is one.

    Args:
      conv: the convolution.
      shape: of its input, (N, *spatial, in).
      dtype: of its input.
      kernel: shape of its kernel, (*window, in / groups, out).

    Example:
      >>> conv = Convolution((1, 1), "SAME", (1, 1), (1, 1))
      >>> refusal(conv, (8, 4, 4, 3), jnp.float32, (3, 3, 3, 64))
      '3 input and 64 output channels are not both multiples of 4'
    """
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(dtype).name}, not float32, bfloat16 or float16"
    if conv.preferred_element_type not in (None, dtype):
        return "the output has another type than x"
    if len(shape) != 4:
        return f"x has {len(shape) - 2} spatial axes, not 2"
    if conv.feature_group_count != 1:
        return f"feature_group_count is {conv.feature_group_count}, not 1"
    if math.prod(conv.input_dilation + conv.kernel_dilation) != 1:
        return "input or kernel are dilated"
    if shape[-1] % 4 or kernel[-1] % 4:
        return f"{shape[-1]} input and {kernel[-1]} output channels are not both multiples of 4"
    if max(*kernel, *conv.strides) > 2**16 or math.prod(kernel[:-2]) > 2**12:
        return f"channels, window or strides are above {2**16}, or the window has {2**12} taps"
    lows = [low for low, _ in pads(conv, shape[1:-1], kernel[:-2])]
    if min(lows) < 0:
        return "padding cuts off the beginning"
    result = results(conv, shape[1:-1], kernel[:-2])
    extents = zip(shape[1:-1], result, kernel[:-2], lows, strict=True)
    pixels = (shape[0] + _IMAGES) * math.prod(sum(extent) for extent in extents)
    if pixels >= 2**31 or max(lows) > 2**16:
        return "x or the output have 2**31 pixels or more, zeros around them included"
    if 0 not in (*shape, *result, kernel[-1]) and not _cuts(conv, shape, kernel):
        return "no tile of it fits into shared memory"
    return ""


def gradient_refusal(
    conv: Convolution, shape: tuple[int, ...], dtype: Any, kernel: tuple[int, ...]
) -> str:
    """Why there is no kernel for the gradient of the input; empty if there is one.

    Args:
      conv: the convolution.
      shape: of its input, (N, *spatial, in).
      dtype: of the output's gradient.
      kernel: shape of its kernel, (*window, in / groups, out).

    Example:
      >>> conv = Convolution((2, 2), "SAME", (1, 1), (1, 1))
      >>> gradient_refusal(conv, (8, 4, 4, 16), jnp.float32, (3, 3, 16, 16))
      'strides are (2, 2), not 1'
    """
    if set(conv.strides) != {1}:
        return f"strides are {conv.strides}, not 1"
    if len(shape) != 4 or math.prod(conv.input_dilation + conv.kernel_dilation) != 1:
        return refusal(conv, shape, dtype, kernel)
    window = kernel[:-2]
    if min(min(both) for both in pads(conv, shape[1:-1], window)) < 0:
        return "padding cuts off the input"
    turned = transposed(conv, shape[1:-1], window)
    if min(min(both) for both in pads(turned, (), ())) < 0:
        return "padding is wider than the window"
    result = (shape[0], *results(conv, shape[1:-1], window), kernel[-1])
    return refusal(turned, result, dtype, (*window, kernel[-1], kernel[-2]))


def results(conv: Convolution, size: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """The output's spatial axes, for a convolution without dilations.

    Args:
      conv: the convolution.
      size: of the input's spatial axes.
      window: shape of the kernel without channels.
    """
    return tuple(
        max(0, (extent + low + high - taps) // stride + 1)
        for extent, (low, high), taps, stride in zip(
            size, pads(conv, size, window), window, conv.strides, strict=True
        )
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the kernel's work is cut into blocks.

    Attributes:
      tile: output pixels and channels of a block, one of `TILES`.
      chunk: input channels that are in shared memory together, a power of two from 4 to 256.
      columns: of the output that are computed side by side, at most all.
      windows: whether windows of 3x3 weights are taken as a whole, at stride 1. It is half the work
        for masks of granularity `channel`, and for others too much.
    """

    tile: tuple[int, int]
    chunk: int
    columns: int
    windows: bool = False


def cut(
    conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...], windows: bool = False
) -> Cut:
    """How the work of a convolution that is not refused is cut: the least of all estimated times.

    Args:
      conv: the convolution.
      shape: of its input.
      kernel: shape of its kernel.
      windows: whether the kernel keeps and drops whole windows (granularity `channel`); they are
        then taken as such if `has_windows`.
    """
    windows = windows and has_windows(conv, shape, kernel)
    tiles = WINDOW_TILES[:1] if windows else _USUAL_TILES
    found = _cuts(conv, shape, kernel, tiles, windows=windows)
    return min(found, key=lambda one: (_time(conv, shape, kernel, one), -one.chunk))


def cuts(
    conv: Convolution,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    windows: bool = False,
    shared: int = _SHARED,
) -> list[Cut]:
    """All cuts that are worth a try, the one that is estimated to be the fastest first.

    Args:
      conv: a convolution that is not refused.
      shape: of its input.
      kernel: shape of its kernel.
      windows: as in `cut`.
      shared: bytes of shared memory that a block may have.
    """
    windows = windows and has_windows(conv, shape, kernel)
    found = _cuts(conv, shape, kernel, WINDOW_TILES if windows else TILES, shared, windows)
    return sorted(found, key=lambda one: (_time(conv, shape, kernel, one), -one.chunk))


def has_windows(conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether windows can be taken as a whole.

    Args:
      conv: a convolution that is not refused.
      shape: of its input.
      kernel: shape of its kernel.
    """
    fits = tuple(kernel[:-2]) == (3, 3) and set(conv.strides) == {1}
    return fits and bool(_cuts(conv, shape, kernel, WINDOW_TILES[:1], windows=True))


def by_windows(kernel: jax.Array) -> jax.Array:
    """A kernel (3, 3, in, out) as (1, 1, in, out * `WINDOW`): vectors are windows, then zeros."""
    taps = kernel.shape[0] * kernel.shape[1]
    flat = kernel.reshape(taps, *kernel.shape[2:]).transpose(1, 2, 0)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, WINDOW - taps)))
    return flat.reshape(1, 1, kernel.shape[2], -1)


def shared_bytes(
    conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...], cut: Cut
) -> int:
    """Shared memory that a block needs; `Plan` in ops/ says why.

    Args:
      conv: the convolution.
      shape: of its input.
      kernel: shape of its kernel.
      cut: how its work is cut.
    """
    _, plane, _, phases = _layout(conv, shape, kernel, cut)
    taps, channel = math.prod(kernel[:-2]), phases * plane
    entries, quads = _WARPS * 2 * (8 * 48 if cut.windows else (32 + MULTIPLE) * 8), cut.chunk // 4
    quad = -(-4 * channel // _BANKS) * _BANKS + max(1, _BANKS // quads)
    return quads * quad * 16 + entries + 4 * taps + 4 * channel


def _exact(conv: Convolution) -> Convolution:
    return dataclasses.replace(
        conv, folds=False, precision=lax.Precision.HIGHEST, preferred_element_type=None
    )


def _cuts(
    conv: Convolution,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    tiles: tuple[tuple[int, int], ...] = _USUAL_TILES,
    shared: int = _SHARED,
    windows: bool = False,
) -> list[Cut]:
    columns = results(conv, shape[1:-1], kernel[:-2])[1]
    # Rows of eight units lie in eight banks.
    widths = [columns, *(width for width in (8, 16, 32) if width < columns)]
    most = 2 ** max(2, (shape[-1] - 1).bit_length())
    chunks = [size for size in (64, 32, 16, 8, 4) if size <= most]
    found = (Cut(*one, windows) for one in itertools.product(tiles, chunks, widths))
    return [one for one in found if shared_bytes(conv, shape, kernel, one) <= shared]


def _layout(
    conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...], cut: Cut
) -> tuple[int, int, float, int]:
    """`Plan` in ops/: slots of a row, units of a phase, those that are used on average, phases."""
    size, window = shape[1:-1], kernel[:-2]
    result = results(conv, size, window)
    lows = [low for low, _ in pads(conv, size, window)]
    strip = _STRIP if cut.windows else 1
    parts, run = -(-result[1] // cut.columns), cut.tile[0] // _IMAGES // strip
    taps = [-(-extent // stride) for extent, stride in zip(window, conv.strides, strict=True)]
    extents = []
    for a, output in enumerate((result[0], cut.columns)):
        if conv.strides[a] == 1 and (a == 0 or parts == 1):
            high = max(0, output + window[a] - 1 - lows[a] - size[a])
            extents.append(max(size[a] + max(lows[a], high), output))
        else:
            extents.append(output + taps[a] - 1)
    tall, pitch = extents
    lanes = cut.columns if cut.columns % _BANKS == 0 else pitch
    strips = -(-result[0] // strip)
    image = strips * lanes
    lines = run // lanes if run % lanes == 0 else (run - 2) // lanes + 2
    usual = run / lanes if run % lanes == 0 else (run + lanes - 1) / lanes
    ends, usual_ends = (lines + strips - 2) // strips, (usual - 1) / strips
    if run % image == 0:
        ends = usual_ends = run // image - 1
    if image % run == 0:
        ends = usual_ends = 0
    between = max(tall, strips * strip) - strips * strip
    plane, used = (
        (rows + taps[0] - 1) * pitch + taps[1] - 1
        for rows in (lines * strip + ends * between, usual * strip + usual_ends * between)
    )
    phases = math.prod(min(pair) for pair in zip(window, conv.strides, strict=True))
    return lanes, int(plane), used, phases


def _time(conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...], cut: Cut) -> float:
    """About how many cycles shared memory is busy, with one weight in ten."""
    lanes, _, used, phases = _layout(conv, shape, kernel, cut)
    rows, columns = results(conv, shape[1:-1], kernel[:-2])
    (pixels, outputs), strip = cut.tile, _STRIP if cut.windows else 1
    units = -(-shape[0] // _IMAGES) * -(-rows // strip) * strip * lanes
    tiles = -(-columns // cut.columns) * -(-units * _IMAGES // pixels)
    lists = min(outputs, kernel[-1])
    chunks = -(-shape[-1] // cut.chunk)
    # 32 lanes load 16 bytes in four cycles; a pair of entries, and a third of a window, is a load
    # more. A window of a lane's rows is seen by half the loads.
    loads = pixels / 64 + 1 / 3 if cut.windows else pixels / 32 + 0.75
    if cut.windows and lanes % _BANKS and 3 * lanes % _BANKS:
        loads *= 1.4  # lanes on either side of a row's end meet in banks
    products = 0.1 * math.prod(kernel[:-1]) * lists * loads
    staging = chunks * cut.chunk * phases * used * 3 / _BANKS
    block = products + staging + chunks * (8 * lists + 500)
    return -(-tiles * -(-kernel[-1] // outputs) // _MULTIPROCESSORS) * block
