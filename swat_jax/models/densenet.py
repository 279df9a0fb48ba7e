"""Densely connected networks for small images (3x3 stem), bottleneck 4x, compression 0.5.

Source: Huang et al., "Densely connected convolutional networks", 2017 (DenseNet-BC), with the stage
sizes of the ImageNet networks, as in the SWAT paper's CIFAR experiments.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax.models import pooling
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.norm_relu import apply

BOTTLENECK = 4


class DenseLayer(nnx.Module):
    """Batch norm, ReLU, 1x1 conv; batch norm, ReLU, 3x3 conv; the result joins the input."""

    def __init__(self, inputs: int, growth: int, make: LayerFactory) -> None:
        self.norm1 = make.norm_relu(inputs)
        self.conv1: Any = make.conv(inputs, BOTTLENECK * growth, 1)
        self.norm2 = make.norm_relu(BOTTLENECK * growth)
        self.conv2: Any = make.conv(BOTTLENECK * growth, growth, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        active = self.norm1(x, readers=[self.conv1], before=True)
        y = self.norm2(apply(self.conv1, active.readers[0], self.norm2), readers=[self.conv2])
        y = apply(self.conv2, y.readers[0])
        return jnp.concatenate([active.before, y], axis=-1)


class Transition(nnx.Module):
    """Batch norm, ReLU, 1x1 conv to half the channels, 2x2 average pooling."""

    def __init__(self, inputs: int, outputs: int, make: LayerFactory) -> None:
        self.norm = make.norm_relu(inputs)
        self.conv: Any = make.conv(inputs, outputs, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        active = self.norm(x, readers=[self.conv])
        return pooling.average_by_two(apply(self.conv, active.readers[0]))


class DenseNet(nnx.Module):
    """3x3 stem of twice the growth, four stages with transitions between, average, classifier."""

    def __init__(
        self,
        stage_sizes: Sequence[int],
        growth: int,
        *,
        num_classes: int,
        in_channels: int,
        make: LayerFactory,
    ) -> None:
        """Builds the layers.

        Args:
          stage_sizes: dense layers in each stage.
          growth: channels that each dense layer adds.
          num_classes: width of the output.
          in_channels: channels of the images.
          make: layer factory.
        """
        channels = 2 * growth
        self.stem: Any = make.conv(in_channels, channels, 3)
        self.num_stages = len(stage_sizes)
        for number, size in enumerate(stage_sizes, start=1):
            if number > 1:
                setattr(self, f"transition{number - 1}", Transition(channels, channels // 2, make))
                channels //= 2
            layers = [DenseLayer(channels + i * growth, growth, make) for i in range(size)]
            setattr(self, f"stage{number}", nnx.List(layers))
            channels += size * growth
        self.norm = make.norm_relu(channels)
        self.classifier: Any = make.linear(channels, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes), float32, of images (N, H, W, C)."""
        pooling.check_image(x, network="DenseNet", smallest=2 ** (self.num_stages - 1))
        x = self.stem(x)
        for number in range(1, self.num_stages + 1):
            if number > 1:
                x = getattr(self, f"transition{number - 1}")(x)
            for layer in getattr(self, f"stage{number}"):
                x = layer(x)
        x = pooling.global_average(self.norm(x, dense=True).dense)
        return jnp.asarray(self.classifier(x), jnp.float32)
