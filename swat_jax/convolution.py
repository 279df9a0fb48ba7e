"""Convolutions as values, and another way to compute those of few input channels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

# Tensor cores take input channels by so many; images have three.
_CHANNELS = 8


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution, linear in input and kernel, and hashable; channels last.

    Attributes:
      strides: of the window, for every spatial axis.
      padding: as `jax.lax.conv_general_dilated` takes it.
      input_dilation: as ``lhs_dilation`` there.
      kernel_dilation: as ``rhs_dilation`` there.
      feature_group_count: as there.
      precision: as there.
      preferred_element_type: as there.
      folds: whether `folded` is used where it can be.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    feature_group_count: int = 1
    precision: Any = None
    preferred_element_type: Any = None
    folds: bool = False

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The product of x (N, *spatial, in) and kernel (*window, in / groups, out)."""
        if self.folds and self._can_fold(kernel) and not _has_explicit_axes(x):
            return self.folded(x, kernel)
        last = x.ndim - 1
        image = (0, last, *range(1, last))
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                image, (last, last - 1, *range(last - 1)), image
            ),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def _can_fold(self, kernel: jax.Array) -> bool:
        window = kernel.shape[:-2]
        return (
            kernel.shape[-2] < _CHANNELS
            and self.feature_group_count == 1
            and math.prod(self.input_dilation + self.kernel_dilation) == 1
            and all(size >= stride for size, stride in zip(window, self.strides, strict=True))
        )

    def folded(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The same product at stride 1, of pixels that are blocks of ``strides`` pixels of x.

        A window of 7x7 at stride 2 on 3 channels becomes one of 4x4 at stride 1 on 12, which are
        filled up to 16. cuDNN takes half the time for it or less, and makes no padded copy.

        Needs a kernel without groups and dilations.
        """
        axes = range(x.ndim - 2)
        window, size = kernel.shape[:-2], x.shape[1:-1]
        pads = self.padding
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(size, window, self.strides, pads)
        # Whole blocks: zeros after the kernel, and the input as far as its windows then reach.
        taps = [-(-window[a] // self.strides[a]) for a in axes]
        outputs = [(size[a] + sum(pads[a]) - window[a]) // self.strides[a] + 1 for a in axes]
        blocks = [outputs[a] + taps[a] - 1 for a in axes]
        after = [blocks[a] * self.strides[a] - size[a] - pads[a][0] for a in axes]
        x_pads = [(pads[a][0], after[a], 0) for a in axes]
        kernel_pads = [(0, taps[a] * self.strides[a] - window[a], 0) for a in axes]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *x_pads, (0, 0, 0)])
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*kernel_pads, (0, 0, 0), (0, 0, 0)])
        plain = dataclasses.replace(self, folds=False, strides=(1,) * len(axes), padding="VALID")
        kernel = _fold(kernel[None], taps, self.strides, axis=-2)[0]
        return plain(_fold(x, blocks, self.strides, axis=-1), kernel)


def _has_explicit_axes(x: jax.Array) -> bool:
    """Whether the type of ``x`` says how it is sharded; reshaping would have to say it, too."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _fold(x: jax.Array, blocks: list[int], strides: tuple[int, ...], axis: int) -> jax.Array:
    """(N, *(blocks * strides), ..., C, ...) to (N, *blocks, ..., strides * C and zeros, ...).

    ``axis`` is that of the channels, from the end.
    """
    spatial, end = len(blocks), x.ndim + axis
    split = [size for pair in zip(blocks, strides, strict=True) for size in pair]
    rest = x.shape[1 + spatial :]
    x = x.reshape(x.shape[0], *split, *rest)
    block_axes = range(1, 1 + 2 * spatial, 2)
    inner_axes = range(2, 2 + 2 * spatial, 2)
    x = x.transpose(0, *block_axes, *inner_axes, *range(1 + 2 * spatial, x.ndim))
    channels = math.prod(strides) * rest[0]
    x = x.reshape(x.shape[0], *blocks, channels, *rest[1:])
    lacking = [(0, 0)] * x.ndim
    lacking[end] = (0, -channels % _CHANNELS)
    return jnp.pad(x, lacking)
