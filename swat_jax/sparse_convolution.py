"""The weight gradient of a convolution from packed activations.

Here it is defined, and here stands for what it has a kernel (`refusal`) and how that cuts its work
(`Cut`). The kernel never makes the dense activations: tiles of them are unpacked into shared memory
and multiplied on tensor cores.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax.convolution import Convolution
from swat_jax.sparsity import packing
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.varying import varying_like

# Sums that a block makes, of input and output channels: `launch_weight_gradient` in ops/ has these.
TILES = ((64, 64), (64, 256), (128, 128), (128, 256), (256, 64), (256, 128))
GATHERED_TILES = ((64, 64), (128, 128), (128, 256), (256, 128))
# Pixels that a group of warps multiplies at a time, sums up to which a block has two such groups
# with sums of their own, and input channels up to which pixels need not be gathered: `pixels_of`,
# `groups_of` and `kMostRun` there.
_PIXELS, _TWO_GROUPS, _MOST_RUN = 32, 2**14, 512
# Blocks that a large GPU holds at once; of those with few sums that do not gather, twice as many
# (Hopper's own kernel then makes two rounds).
_BLOCKS, _FEW_SUMS = 132, 2**12
# What `cuts` tries: one and two blocks for every multiprocessor of a large GPU.
_TRIED_BLOCKS = (132, 264)
# Chunks of pixels that a block takes at least, so that it is worth its start.
_LEAST_CHUNKS = 8


def weight_gradient(
    packed: Packed,
    least: jax.Array | float | None,
    dy: jax.Array,
    conv: Convolution,
    window: tuple[int, ...],
) -> jax.Array:
    """The gradient of the kernel, with products and sums in float32.

    Args:
      packed: the input (N, *spatial, in).
      least: if given, packed values whose magnitude is smaller are left out.
      dy: (N, *spatial, out), the gradient of the output.
      conv: the convolution.
      window: shape of the kernel without its channels.

    Returns:
      (*window, in / groups, out), float32 (float64 for float64).
    """
    wide = jnp.promote_types(packed.dtype, jnp.float32)
    x = packing.unpack(packed, least).astype(wide)
    plain = dataclasses.replace(
        conv, folds=False, precision=lax.Precision.HIGHEST, preferred_element_type=None
    )
    shape = (*window, x.shape[-1] // conv.feature_group_count, dy.shape[-1])
    kernel = varying_like(jnp.zeros(shape, wide), x, dy)
    (dw,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(dy.astype(wide))
    return dw


def pads(
    conv: Convolution, size: tuple[int, ...], window: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The zeros before and after every spatial axis of an input of this size."""
    found = conv.padding
    if isinstance(found, str):
        found = lax.padtype_to_pads(size, window, conv.strides, found)
    return tuple((int(low), int(high)) for low, high in found)


def refusal(conv: Convolution, shape: tuple[int, ...], dtype: Any, kernel: tuple[int, ...]) -> str:
    """Why there is no kernel for this gradient; empty if there is one.

    Args:
      conv: the convolution.
      shape: of its input, (N, *spatial, in).
      dtype: of its input.
      kernel: shape of its kernel, (*window, in / groups, out).

    Example:
      >>> conv = Convolution((1, 1), "SAME", (1, 1), (1, 1))
      >>> refusal(conv, (8, 4, 4, 16), jnp.float32, (1, 1, 16, 8))
      'x is float32, not bfloat16 or float16'
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if conv.preferred_element_type not in (None, dtype):
        return "the output has another type than x"
    if len(shape) != 4:
        return f"x has {len(shape) - 2} spatial axes, not 2"
    if conv.feature_group_count != 1:
        return f"feature_group_count is {conv.feature_group_count}, not 1"
    if math.prod(conv.input_dilation + conv.kernel_dilation) != 1:
        return "input or kernel are dilated"
    if shape[-1] % 8 or kernel[-1] % 8:
        return f"{shape[-1]} input and {kernel[-1]} output channels are not both multiples of 8"
    if max(*kernel, *conv.strides) > 2**16:
        return f"channels, window or strides are above {2**16}"
    if min(low for low, _ in pads(conv, shape[1:-1], kernel[:-2])) < 0:
        return "padding cuts off the beginning"
    if math.prod(shape) >= 2**32:
        return f"x has {math.prod(shape)} values, not fewer than 2**32"
    return ""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the kernel's work is cut into blocks.

    Attributes:
      tile: input and output channels of a block.
      splits: into how many parts the pixels are cut, whose sums are then added in their order.
      gathers: whether the input pixels of a block are anywhere, or follow one another.
    """

    tile: tuple[int, int]
    splits: int
    gathers: bool

    @property
    def name(self) -> str:
        """Input and output channels of a block, and splits."""
        return f"{self.tile[0]}x{self.tile[1]}/{self.splits}"


def cut(
    conv: Convolution,
    shape: tuple[int, ...],
    dy: tuple[int, ...],
    window: tuple[int, ...],
    tile: tuple[int, int] | None = None,
    blocks: int | None = None,
) -> Cut:
    """How the work of a gradient that is not refused is cut.

    Args:
      conv: the convolution.
      shape: of its input.
      dy: shape of its output.
      window: shape of its kernel without channels.
      tile: one of `tiles`; None: a choice by the numbers of channels.
      blocks: how many there may be; None: as many as a large GPU holds at once.
    """
    gathers = must_gather(conv, shape, window)
    chosen = tile or _tile(shape[-1], dy[-1], gathers)
    parts = math.prod(window)
    for channels, size in zip((shape[-1], dy[-1]), chosen, strict=True):
        parts *= -(-channels // size)
    shares = math.prod(chosen) <= _FEW_SUMS and not gathers
    at_once = blocks or (2 * _BLOCKS if shares else _BLOCKS)
    most = chunks(dy, chosen) // _LEAST_CHUNKS
    return Cut(chosen, max(1, min(at_once // parts, most)), gathers)


def cuts(
    conv: Convolution, shape: tuple[int, ...], dy: tuple[int, ...], window: tuple[int, ...]
) -> list[Cut]:
    """The cut of a gradient that is chosen without a measurement, then others worth a try.

    Args:
      conv: the convolution.
      shape: of its input.
      dy: shape of its output.
      window: shape of its kernel without channels.
    """
    first = cut(conv, shape, dy, window)
    others = [
        cut(conv, shape, dy, window, tile, blocks)
        for tile in tiles(first.gathers)
        if _is_worth_a_try(tile, shape[-1], dy[-1], first.tile)
        for blocks in _TRIED_BLOCKS
    ]
    return list(dict.fromkeys((first, *others)))


def _is_worth_a_try(
    tile: tuple[int, int], channels: int, outputs: int, chosen: tuple[int, int]
) -> bool:
    """Not a tile that is half empty, nor one that takes more than twice as many blocks for all."""
    sizes = channels, outputs
    if any(side >= 2 * size for side, size in zip(tile, sizes, strict=True)):
        return False
    parts, least = (
        math.prod(-(-size // side) for side, size in zip(one, sizes, strict=True))
        for one in (tile, chosen)
    )
    return parts <= 2 * least


def groups(tile: tuple[int, int]) -> int:
    """Of warps of a block, each with sums of its own."""
    return 2 if math.prod(tile) <= _TWO_GROUPS else 1


def chunks(dy: tuple[int, ...], tile: tuple[int, int]) -> int:
    """Into how many parts the pixels of an output can be cut at most."""
    return -(-math.prod(dy[:-1]) // (_PIXELS * groups(tile)))


def tiles(gathers: bool) -> tuple[tuple[int, int], ...]:
    """The tiles there are for pixels that are gathered, or follow one another."""
    return GATHERED_TILES if gathers else TILES


def must_gather(conv: Convolution, shape: tuple[int, ...], window: tuple[int, ...]) -> bool:
    """Whether the kernel has to gather the input's pixels."""
    padded = any(low or high for low, high in pads(conv, shape[1:-1], window))
    is_plain = math.prod(window) == 1 and math.prod(conv.strides) == 1 and not padded
    return not is_plain or shape[-1] > _MOST_RUN


def _tile(channels: int, outputs: int, gathers: bool) -> tuple[int, int]:
    if max(channels, outputs) <= 64:
        return 64, 64
    if channels <= 64 and not gathers:
        return 64, 256
    if outputs <= 64 and not gathers:
        return (256, 64) if channels > 128 else (64, 64)
    if channels <= 128 and outputs <= 128:
        return 128, 128
    # Every value is unpacked once for each tile of outputs, and dY is read once for each of inputs.
    return (256, 128) if channels > 128 and outputs <= 2 * channels else (128, 256)
