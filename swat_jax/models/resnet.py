"""Residual networks, for small images (3x3 stem) and for ImageNet (7x7 stem and max pooling).

Source: He et al., "Deep residual learning for image recognition", 2016; the stride of a
bottleneck is in its 3x3 conv ("v1.5"). Wide bottlenecks: Zagoruyko and Komodakis, "Wide residual
networks", 2016.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax.activations import Activation, Branches
from swat_jax.models import pooling
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.norm_relu import apply, branch


def reads(block: Any) -> dict[str, Any]:
    """Who reads the input of a block: what the layer before it has to know."""
    if block.projects:
        return {"readers": [block.conv1, block.shortcut]}
    return {"readers": [block.conv1], "dense": True}


def shortcut(block: Any, x: Branches) -> jax.Array | None:
    """What a block adds to the output of its last norm."""
    if block.projects:
        y = apply(block.shortcut, x.readers[1], block.shortcut_norm)
        return block.shortcut_norm(y, relu=False, dense=True).dense
    return x.dense


class BasicBlock(nnx.Module):
    """Two 3x3 convs around a shortcut; ReLU after the addition."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, *, strides: int, make: LayerFactory, widen: int = 1
    ) -> None:
        if widen != 1:
            raise ValueError(f"widen: a basic block takes 1 only, got {widen}")
        self.conv1: Any = make.conv(inputs, width, 3, strides=strides)
        self.norm1 = make.norm_relu(width)
        self.conv2: Any = make.conv(width, width, 3)
        self.norm2 = make.norm_relu(width)
        self.projects = strides != 1 or inputs != width
        if self.projects:
            self.shortcut: Any = make.conv(inputs, width, 1, strides=strides)
            self.shortcut_norm = make.norm_relu(width)

    def __call__(self, x: Branches, after: Mapping[str, Any]) -> Branches:
        y = self.norm1(apply(self.conv1, x.readers[0], self.norm1), readers=[self.conv2])
        y = apply(self.conv2, y.readers[0], self.norm2)
        return self.norm2(y, shortcut(self, x), **after)


class Bottleneck(nnx.Module):
    """1x1, 3x3 (strided), 1x1 convs around a shortcut; ReLU after the addition."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, *, strides: int, make: LayerFactory, widen: int = 1
    ) -> None:
        inner, outputs = width * widen, width * self.expansion
        self.conv1: Any = make.conv(inputs, inner, 1)
        self.norm1 = make.norm_relu(inner)
        self.conv2: Any = make.conv(inner, inner, 3, strides=strides)
        self.norm2 = make.norm_relu(inner)
        self.conv3: Any = make.conv(inner, outputs, 1)
        self.norm3 = make.norm_relu(outputs)
        self.projects = strides != 1 or inputs != outputs
        if self.projects:
            self.shortcut: Any = make.conv(inputs, outputs, 1, strides=strides)
            self.shortcut_norm = make.norm_relu(outputs)

    def __call__(self, x: Branches, after: Mapping[str, Any]) -> Branches:
        y = self.norm1(apply(self.conv1, x.readers[0], self.norm1), readers=[self.conv2])
        y = self.norm2(apply(self.conv2, y.readers[0], self.norm2), readers=[self.conv3])
        y = apply(self.conv3, y.readers[0], self.norm3)
        return self.norm3(y, shortcut(self, x), **after)


class ResNet(nnx.Module):
    """Stem, stages of residual blocks (`stage1`, `stage2`, ...), global average, classifier."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stage_sizes: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        widen: int = 1,
        stem: Literal["3x3", "7x7"] = "3x3",
        num_classes: int,
        in_channels: int,
        make: LayerFactory,
    ) -> None:
        """Builds the layers.

        Args:
          block: kind of residual block.
          stage_sizes: blocks in each stage; every stage but the first halves the resolution.
          widths: width of each stage (before the block's expansion).
          widen: factor on the inner width of bottlenecks (2 in WRN-50-2).
          stem: "3x3" at stride 1 for small images, "7x7" at stride 2 with 3x3 max pooling.
          num_classes: width of the output.
          in_channels: channels of the images.
          make: layer factory.
        """
        large = stem == "7x7"
        inputs = widths[0]
        self.stem: Any = make.conv(in_channels, inputs, 7 if large else 3, strides=1 + large)
        self.stem_norm = make.norm_relu(inputs)
        self.stem_pools = large
        self.max_pool = make.max_pool
        self.num_stages = len(stage_sizes)
        for number, (size, width) in enumerate(zip(stage_sizes, widths, strict=True), start=1):
            blocks = []
            for index in range(size):
                strides = 2 if index == 0 and number > 1 else 1
                blocks.append(block(inputs, width, strides=strides, make=make, widen=widen))
                inputs = width * block.expansion
            setattr(self, f"stage{number}", nnx.List(blocks))
        self.classifier: Any = make.linear(inputs, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes), float32, of images (N, H, W, C)."""
        pooling.check_image(x, network="ResNet", smallest=1)
        stages = [getattr(self, f"stage{number + 1}") for number in range(self.num_stages)]
        blocks: list[Any] = list(itertools.chain(*stages))
        followers = [*map(reads, blocks), {"dense": True}]
        y: Any = apply(self.stem, Activation(x), self.stem_norm)
        if self.stem_pools:
            y = self.stem_norm(y, dense=True).dense
            y = pooling.max_three_by_two(y, self.max_pool)
            y = branch(y, **followers[0])
        else:
            y = self.stem_norm(y, **followers[0])
        for block, after in zip(blocks, followers[1:], strict=True):
            y = block(y, after)
        return jnp.asarray(self.classifier(pooling.global_average(y.dense)), jnp.float32)
