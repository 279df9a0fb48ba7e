"""Wide residual networks for small images: WRN-depth-width, pre-activation.

Source: Zagoruyko and Komodakis, "Wide residual networks", 2016.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax.models import pooling
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.norm_relu import apply

STEM_WIDTH = 16


class WideBlock(nnx.Module):
    """Batch norm, ReLU, 3x3 conv, twice, with dropout between; ReLU before, not after, the sum.

    Where the shape changes, the shortcut is a bare 1x1 conv of the ACTIVATED input.
    """

    def __init__(
        self, inputs: int, width: int, *, strides: int, dropout_rate: float, make: LayerFactory
    ) -> None:
        self.norm1 = make.norm_relu(inputs)
        self.conv1: Any = make.conv(inputs, width, 3, strides=strides)
        self.norm2 = make.norm_relu(width)
        self.dropout = make.dropout(dropout_rate)
        self.conv2: Any = make.conv(width, width, 3)
        self.projects = strides != 1 or inputs != width
        if self.projects:
            self.shortcut: Any = make.conv(inputs, width, 1, strides=strides)

    def __call__(self, x: jax.Array) -> jax.Array:
        readers = [self.conv1, self.shortcut] if self.projects else [self.conv1]
        active = self.norm1(x, readers=readers, before=not self.projects)
        y = apply(self.conv1, active.readers[0], self.norm2)
        y = self.norm2(y, readers=[self.conv2], dropout=self.dropout)
        y = apply(self.conv2, y.readers[0])
        return y + (apply(self.shortcut, active.readers[1]) if self.projects else active.before)


class WideResNet(nnx.Module):
    """Stem of 16 channels, three stages of wide blocks, batch norm, ReLU, average, classifier."""

    def __init__(
        self,
        depth: int,
        widen: int,
        *,
        num_classes: int,
        in_channels: int,
        dropout_rate: float,
        make: LayerFactory,
    ) -> None:
        """Builds the layers.

        Args:
          depth: 6n + 4 for n blocks in each stage.
          widen: factor k on the stage widths 16, 32, 64.
          num_classes: width of the output.
          in_channels: channels of the images.
          dropout_rate: fraction dropped inside each block while training.
          make: layer factory.
        """
        blocks_per_stage, rest = divmod(depth - 4, 6)
        if rest or blocks_per_stage < 1:
            raise ValueError(f"depth: must be 6n + 4 with n >= 1, got {depth}")
        self.stem: Any = make.conv(in_channels, STEM_WIDTH, 3)
        inputs = STEM_WIDTH
        for number in (1, 2, 3):
            width = STEM_WIDTH * widen * 2 ** (number - 1)
            blocks = []
            for index in range(blocks_per_stage):
                strides = 2 if index == 0 and number > 1 else 1
                blocks.append(
                    WideBlock(inputs, width, strides=strides, dropout_rate=dropout_rate, make=make)
                )
                inputs = width
            setattr(self, f"stage{number}", nnx.List(blocks))
        self.norm = make.norm_relu(inputs)
        self.classifier: Any = make.linear(inputs, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes), float32, of images (N, H, W, C)."""
        pooling.check_image(x, network="WideResNet", smallest=1)
        x = self.stem(x)
        for number in (1, 2, 3):
            for block in getattr(self, f"stage{number}"):
                x = block(x)
        x = pooling.global_average(self.norm(x, dense=True).dense)
        return jnp.asarray(self.classifier(x), jnp.float32)
