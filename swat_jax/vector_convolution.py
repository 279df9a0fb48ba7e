"""The product of a convolution whose weights are kept or dropped as vectors of output channels.

Here it is defined, and here stands for what it has a kernel (`refusal`) and how that cuts its work
(`Cut`). The kernel takes the masked weights, finds the positions that are kept, and multiplies the
activations of those alone, on tensor cores: V output channels that share their positions can, where
single weights cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax import sparse_convolution
from swat_jax.convolution import Convolution

VECTORS = (8, 16, 32)
# Lines, their pixels, and output channels of a block: `launch_tiles` in ops/ has these. A block of
# the last one leaves room for a second one on its multiprocessor.
TILES = ((4, 8, 128), (8, 4, 128), (8, 8, 64), (4, 8, 64))
_SHARING = ((4, 8, 64),)
# Of `ops/sparse_conv_vector.cuh`: bytes of a row, which is a value of 8 images; input channels that
# a warp brings together; entries of a step.
_ROW, _SLICE, _ENTRIES = 16, 32, 16
_MOST_WINDOW, _MOST_CHUNK = 16, 128
# Shared memory of a block, in bytes: what data centres' GPUs have since Hopper.
LARGE_ROOM = 227 * 1024
# What the hardware keeps for itself of every block.
_RESERVED = 1024


def forward(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
    """The product, with sums in float32 that are rounded once.

    Args:
      x: (N, *spatial, in).
      kernel: (*window, in / groups, out), zero where it is dropped.
      conv: the convolution.

    Returns:
      (N, *spatial, out), of the type of ``x``.

    Example:
      >>> conv = Convolution((1, 1), "SAME", (1, 1), (1, 1))
      >>> x, kernel = jnp.ones((1, 2, 2, 8), jnp.bfloat16), jnp.zeros((1, 1, 8, 8), jnp.bfloat16)
      >>> float(forward(x, kernel.at[0, 0, 3].set(2), conv).sum())
      64.0
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    plain = dataclasses.replace(
        conv, folds=False, precision=lax.Precision.HIGHEST, preferred_element_type=None
    )
    return plain(x.astype(wide), kernel.astype(wide)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the kernel's work is cut into blocks.

    Attributes:
      tile: lines, output pixels of a line, and output channels that a block makes of 8 images.
      height: lines in one image; the others are of further 8 images. It divides ``tile[0]``.
      chunk: input channels that lie in shared memory together, twice; a power of 2 from 32 on.
    """

    tile: tuple[int, int, int]
    height: int
    chunk: int


def refusal(
    conv: Convolution,
    shape: tuple[int, ...],
    dtype: Any,
    kernel: tuple[int, ...],
    vector: int,
    room: int = LARGE_ROOM,
) -> str:
    """Why there is no kernel for this product; empty if there is one.

    Args:
      conv: the convolution.
      shape: of its input, (N, *spatial, in).
      dtype: of its input.
      kernel: shape of its kernel, (*window, in / groups, out).
      vector: output channels that are kept or dropped together.
      room: bytes of shared memory that a block may have.

    Example:
      >>> conv = Convolution((1, 1), "SAME", (1, 1), (1, 1))
      >>> refusal(conv, (8, 4, 4, 16), jnp.bfloat16, (3, 3, 16, 24), 16)
      'vectors of 16 do not divide 24 output channels'
    """
    if reason := sparse_convolution.refusal(conv, shape, dtype, kernel):
        return reason
    if vector not in VECTORS:
        return f"vectors of {vector} are none of {VECTORS}"
    if kernel[-1] % vector:
        return f"vectors of {vector} do not divide {kernel[-1]} output channels"
    if max(*kernel[:-2], *conv.strides) > _MOST_WINDOW:
        return f"window or strides are above {_MOST_WINDOW}"
    if max(shape[1:-1]) >= 2**24:
        return "height or width is 2**24 or more"
    if next(cuts(conv, shape, kernel, room), None) is None:
        return f"a tile of the input does not fit in {room} bytes of shared memory"
    return ""


def cut(
    conv: Convolution,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    room: int = LARGE_ROOM,
) -> Cut:
    """How the work of a product that is not refused is cut.

    Args:
      conv: the convolution.
      shape: of its input.
      kernel: shape of its kernel.
      room: bytes of shared memory that a block may have.

    Example:
      >>> conv = Convolution((1, 1), "SAME", (1, 1), (1, 1))
      >>> cut(conv, (512, 32, 32, 128), (3, 3, 128, 128))
      Cut(tile=(4, 8, 128), height=4, chunk=64)
    """
    found = list(cuts(conv, shape, kernel, room))
    columns = _result(conv, shape, kernel)[1]
    wanted = (8, 8, 64) if kernel[-1] <= 64 and columns > 4 else (4, 8, 128)
    wanted = (8, 4, 128) if columns <= 4 else wanted
    return next((one for one in found if one.tile == wanted), found[0])


def cuts(
    conv: Convolution,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    room: int = LARGE_ROOM,
) -> Iterator[Cut]:
    """Every tile that fits, with as many input channels as there is room for."""
    rows = _result(conv, shape, kernel)[0]
    for tile in TILES:
        own = room if tile not in _SHARING else room // 2 - _RESERVED
        # Lines outside of a small image cost less room than those of further images.
        heights = _powers(min(tile[0], _power_from(rows)), tile[0])
        chunks = _powers(_SLICE, min(_MOST_CHUNK, _power_from(shape[-1])))
        every = (Cut(tile, height, chunk) for height in heights for chunk in reversed(chunks))
        fitting = (one for one in every if shared_bytes(conv, kernel, one) <= own)
        if (one := next(fitting, None)) is not None:
            yield one


def shared_bytes(conv: Convolution, kernel: tuple[int, ...], cut: Cut) -> int:
    """The shared memory of a block: `Plan` in ops/ makes the same numbers."""
    steps = [min(s, size) for s, size in zip(conv.strides, kernel[:-2], strict=True)]
    line = steps[1] * (cut.tile[1] + (kernel[1] - 1) // steps[1])
    image = ((cut.height - 1) * steps[0] + kernel[0]) * line
    positions = cut.tile[0] // cut.height * image
    return 2 * cut.chunk * (positions | 1) * _ROW + 4 * positions


def segments(kernel: tuple[int, ...], vector: int, cut: Cut) -> tuple[int, int]:
    """How many lists there are, and the entries for which each has room."""
    height, width, inputs, outputs = kernel
    room = -(-cut.chunk * height * width // _ENTRIES) * _ENTRIES
    return outputs // vector * -(-inputs // cut.chunk), room


def _power_from(number: int) -> int:
    """The smallest power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


def _powers(first: int, last: int) -> list[int]:
    """A power of 2 and those after it, up to the last one."""
    return [first << i for i in range(max(1, (last // first).bit_length()))]


def _result(conv: Convolution, shape: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of the output."""
    pads = sparse_convolution.pads(conv, shape[1:-1], kernel[:-2])
    return tuple(
        max(1, (size + sum(pad) - window) // stride + 1)
        for size, pad, window, stride in zip(
            shape[1:-1], pads, kernel[:-2], conv.strides, strict=True
        )
    )
