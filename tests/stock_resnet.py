"""Networks written with stock Flax NNX layers, as a user would, for `swat_jax.fuse`.

`conv` and `linear` are the constructors of those layers, so that the same text makes a dense network
and one with SWAT layers in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx


class Layers:
    """Which conv and linear layers a network has, and what all its layers share."""

    def __init__(
        self,
        conv: Callable[..., Any] = nnx.Conv,
        linear: Callable[..., Any] = nnx.Linear,
        *,
        rngs: nnx.Rngs,
        **shared: Any,
    ):
        self.linear = functools.partial(linear, rngs=rngs, **shared)
        self.conv = functools.partial(conv, use_bias=False, rngs=rngs, **shared)
        self.norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs, **shared)


class Bottleneck(nnx.Module):
    def __init__(self, inputs, width, strides, layers):
        self.conv1 = layers.conv(inputs, width, (1, 1))
        self.bn1 = layers.norm(width)
        padding = ((1, 1), (1, 1))
        self.conv2 = layers.conv(width, width, (3, 3), strides=strides, padding=padding)
        self.bn2 = layers.norm(width)
        self.conv3 = layers.conv(width, 4 * width, (1, 1))
        self.bn3 = layers.norm(4 * width)
        self.projects = strides != 1 or inputs != 4 * width
        if self.projects:
            self.downsample = layers.conv(inputs, 4 * width, (1, 1), strides=strides)
            self.downsample_bn = layers.norm(4 * width)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = self.downsample_bn(self.downsample(x)) if self.projects else x
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    """ResNet-50 for sizes (3, 4, 6, 3) and width 64; the stride is in the 3x3 conv."""

    def __init__(self, sizes, width, classes, layers):
        self.conv1 = layers.conv(3, width, (7, 7), strides=2, padding=((3, 3), (3, 3)))
        self.bn1 = layers.norm(width)
        blocks, inputs = [], width
        for stage, size in enumerate(sizes):
            for index in range(size):
                strides = 2 if stage and not index else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, strides, layers))
                inputs = 4 * width * 2**stage
        self.blocks = nnx.List(blocks)
        self.head = layers.linear(inputs, classes)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)
