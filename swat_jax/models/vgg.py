"""VGG with batch norm for 32x32 images.

Source: Simonyan and Zisserman, "Very deep convolutional networks", 2015, with batch norm after each
conv and a 512-4096-4096-classes head, as in the SWAT paper's CIFAR experiments.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax.activations import Activation, Branches
from swat_jax.models import pooling
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.norm_relu import apply, branch

STAGE_SIZES = {11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 4096


class ConvUnit(nnx.Module):
    """3x3 conv, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, make: LayerFactory) -> None:
        self.conv: Any = make.conv(inputs, outputs, 3)
        self.norm = make.norm_relu(outputs)

    def __call__(self, x: Branches, after: Mapping[str, Any]) -> Branches:
        return self.norm(apply(self.conv, x.readers[0], self.norm), **after)


class VGG(nnx.Module):
    """Five stages of 3x3 convs, each ended by 2x2 max pooling, and three linear layers.

    The very first conv is `stem`; stage 1 holds the convs after it (none in VGG-11).
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        dropout_rate: float,
        make: LayerFactory,
    ) -> None:
        """Builds the layers.

        Args:
          stage_sizes: number of convs in each of the five stages.
          num_classes: width of the output.
          in_channels: channels of the images.
          dropout_rate: fraction dropped after each hidden linear layer while training.
          make: layer factory.
        """
        self.stem: Any = make.conv(in_channels, WIDTHS[0], 3)
        self.stem_norm = make.norm_relu(WIDTHS[0])
        self.max_pool = make.max_pool
        inputs = WIDTHS[0]
        for number, (size, width) in enumerate(zip(stage_sizes, WIDTHS, strict=True), start=1):
            units = []
            for _ in range(size - 1 if number == 1 else size):
                units.append(ConvUnit(inputs, width, make))
                inputs = width
            setattr(self, f"stage{number}", nnx.List(units))
        self.hidden1: Any = make.linear(inputs, HIDDEN)
        self.dropout1 = make.dropout(dropout_rate)
        self.hidden2: Any = make.linear(HIDDEN, HIDDEN)
        self.dropout2 = make.dropout(dropout_rate)
        self.classifier: Any = make.linear(HIDDEN, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes), float32, of images (N, H, W, C)."""
        pooling.check_image(x, network="VGG", smallest=2 ** len(WIDTHS))
        x = apply(self.stem, Activation(x), self.stem_norm)
        for number in range(1, len(WIDTHS) + 1):
            units = getattr(self, f"stage{number}")
            followers = [*({"readers": [unit.conv]} for unit in units), {"dense": True}]
            y: Any = (self.stem_norm if number == 1 else branch)(x, **followers[0])
            for unit, after in zip(units, followers[1:], strict=True):
                y = unit(y, after)
            x = pooling.max_by_two(y.dense, self.max_pool)
        # At 32x32 one pixel is left and this is a reshape; larger images are averaged.
        x = pooling.global_average(x)
        x = self.dropout1(nnx.relu(self.hidden1(x)))
        x = self.dropout2(nnx.relu(self.hidden2(x)))
        return jnp.asarray(self.classifier(x), jnp.float32)
