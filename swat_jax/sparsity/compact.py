"""The compact form of a kernel that is mostly zeros: what is kept of it, and where that lies.

It is what convolutions with sparse weights walk over. It is made of the masked kernel itself, so it
needs no threshold, suits every granularity and has room for whatever is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from swat_jax.errors import UsageError
from swat_jax.sparsity.varying import varying_like

# Output channels that may share their positions.
VECTORS = (1, 8, 16, 32)


class Compact(NamedTuple):
    """The kept weights of a kernel (height, width, in, out), output by output.

    ``vector`` output channels are a group and share positions; input channels are cut into chunks
    of ``chunk``. What is kept of a group in a chunk is a segment, filled up with zeros at position
    0 to a multiple of ``multiple``; segments of a group follow one another.

    Attributes:
      values: (groups, room, vector), of the kernel's type.
      positions: int32 (groups, room): ``tap * chunk + channel % chunk``, rising in a segment, where
        tap is ``row * width + column``.
      starts: int32 (groups, chunks + 1); segment ``c`` of group ``g`` is
        ``[starts[g, c], starts[g, c + 1])``. What lies beyond the last is unspecified.
    """

    values: jax.Array
    positions: jax.Array
    starts: jax.Array


def sizes(
    shape: tuple[int, ...], vector: int, chunk: int, multiple: int
) -> tuple[int, int, int, int]:
    """Groups, chunks, positions of a chunk, and how many entries a segment has room for.

    Args:
      shape: of the kernel, (height, width, in, out).
      vector: output channels of a group, one of `VECTORS`.
      chunk: input channels of a chunk, at least 1.
      multiple: of entries in a segment, at least 1.

    Raises:
      UsageError: for a kernel or numbers other than these, or 2**31 entries of one group or more.

    Example:
      >>> sizes((3, 3, 40, 16), 8, 32, 4)
      (2, 2, 288, 288)
    """
    if len(shape) != 4:
        raise UsageError(f"kernel must have axes (height, width, in, out), got shape {shape}")
    if vector not in VECTORS:
        raise UsageError(f"vector must be one of {VECTORS}, got {vector}")
    if chunk < 1 or multiple < 1:
        raise UsageError(f"chunk and multiple must be at least 1, got {chunk} and {multiple}")
    height, width, inputs, outputs = shape
    if outputs % vector:
        raise UsageError(f"vector must divide the {outputs} output channels, got {vector}")
    positions = height * width * chunk
    chunks, room = -(-inputs // chunk), -(-positions // multiple) * multiple
    if chunks * room >= 2**31:
        raise UsageError(f"kernel must have fewer than 2**31 entries of a group, got shape {shape}")
    return outputs // vector, chunks, positions, room


def compact(kernel: jax.Array, vector: int, chunk: int, multiple: int) -> Compact:
    """The compact form of ``kernel``: zeros are dropped, NaN is kept.

    Args:
      kernel: (height, width, in, out), zeros where nothing is kept.
      vector: output channels that share positions, 1, 8, 16 or 32; a position is kept if any of its
        values is not zero.
      chunk: input channels of a chunk.
      multiple: what the length of every segment is a multiple of.

    Raises:
      UsageError: see `sizes`.

    Example:
      >>> kernel = jnp.zeros((1, 1, 4, 1)).at[0, 0, 1].set(5.0).at[0, 0, 3].set(7.0)
      >>> values, positions, starts = compact(kernel, vector=1, chunk=2, multiple=1)
      >>> values[0, :2, 0].tolist(), positions[0, :2].tolist(), starts.tolist()
      ([5.0, 7.0], [1, 1], [[0, 1, 2]])
    """
    groups, chunks, size, room = sizes(kernel.shape, vector, chunk, multiple)
    height, width, inputs, _ = kernel.shape
    taps = height * width
    parts = jnp.pad(
        kernel.reshape(taps, inputs, groups, vector),
        ((0, 0), (0, chunks * chunk - inputs), (0, 0), (0, 0)),
    )
    parts = parts.reshape(taps, chunks, chunk, groups, vector).transpose(3, 1, 0, 2, 4)
    parts = parts.reshape(groups, chunks, size, vector)
    is_kept = jnp.any(parts != 0, axis=-1)
    lengths = -(-jnp.sum(is_kept, axis=-1, dtype=jnp.int32) // multiple) * multiple
    ends = jnp.cumsum(lengths, axis=1, dtype=jnp.int32)
    starts = jnp.pad(ends, ((0, 0), (1, 0)))
    rank = jnp.cumsum(is_kept, axis=-1, dtype=jnp.int32) - 1
    # What is not kept is sent out of bounds, where a scatter drops it.
    to = jnp.where(is_kept, starts[:, :-1, None] + rank, chunks * room)
    group = jnp.arange(groups)[:, None, None]
    values = varying_like(jnp.zeros((groups, chunks * room, vector), kernel.dtype), kernel)
    positions = varying_like(jnp.zeros((groups, chunks * room), jnp.int32), kernel)
    position = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), to.shape)
    return Compact(
        values=values.at[group, to].set(parts, mode="drop"),
        positions=positions.at[group, to].set(position, mode="drop"),
        starts=starts,
    )


def transposed(kernel: jax.Array) -> jax.Array:
    """The kernel of the input gradient: taps in reverse, input and output channels swapped.

    At stride 1 the input gradient is a convolution of the output gradient with it.

    Example:
      >>> transposed(jnp.arange(6.0).reshape(1, 3, 1, 2))[0, :, :, 0].tolist()
      [[4.0, 5.0], [2.0, 3.0], [0.0, 1.0]]
    """
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
