"""Networks written with stock Flax NNX layers, as a user would, for `swat_jax.fuse`.

`Layers` holds the constructors of conv and linear layers, so that the same text makes a dense
network and one with SWAT layers in it. Shapes are those of the networks in `swat_jax.models`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx


class Layers:
    """Which conv, linear and dropout layers a network has, and what all its layers share."""

    def __init__(
        self,
        conv: Callable[..., Any] = nnx.Conv,
        linear: Callable[..., Any] = nnx.Linear,
        dropout: Callable[..., Any] = nnx.Dropout,
        *,
        rngs: nnx.Rngs,
        **shared: Any,
    ):
        self.linear = functools.partial(linear, rngs=rngs, **shared)
        self.norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs, **shared)
        self.dropout = functools.partial(dropout, rngs=rngs)
        self._conv = functools.partial(conv, rngs=rngs, **shared)

    def conv(self, inputs, outputs, size, strides=1, *, use_bias=False):
        padding = ((size // 2, size // 2),) * 2
        options = {"strides": strides, "padding": padding, "use_bias": use_bias}
        return self._conv(inputs, outputs, (size, size), **options)


class Bottleneck(nnx.Module):
    def __init__(self, inputs, width, strides, layers):
        self.conv1 = layers.conv(inputs, width, 1)
        self.bn1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, strides)
        self.bn2 = layers.norm(width)
        self.conv3 = layers.conv(width, 4 * width, 1)
        self.bn3 = layers.norm(4 * width)
        self.projects = strides != 1 or inputs != 4 * width
        if self.projects:
            self.downsample = layers.conv(inputs, 4 * width, 1, strides)
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
        self.stem = layers.conv(3, width, 7, 2)
        self.bn = layers.norm(width)
        blocks, inputs = [], width
        for stage, size in enumerate(sizes):
            for index in range(size):
                strides = 2 if stage and not index else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, strides, layers))
                inputs = 4 * width * 2**stage
        self.blocks = nnx.List(blocks)
        self.head = layers.linear(inputs, classes)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(jnp.mean(x, axis=(1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class VGG(nnx.Module):
    """Convs with a bias, max pooling after every stage, and two hidden linear layers."""

    def __init__(self, sizes, widths, hidden, classes, layers):
        stages, inputs = [], 3
        for size, width in zip(sizes, widths, strict=True):
            units = []
            for _ in range(size):
                conv = layers.conv(inputs, width, 3, use_bias=True)
                units.append(nnx.List([conv, layers.norm(width)]))
                inputs = width
            stages.append(nnx.List(units))
        self.stages = nnx.List(stages)
        self.hidden1 = layers.linear(inputs, hidden)
        self.dropout1 = layers.dropout(0.5)
        self.hidden2 = layers.linear(hidden, hidden)
        self.dropout2 = layers.dropout(0.5)
        self.head = layers.linear(hidden, classes)

    def __call__(self, x):
        for stage in self.stages:
            for conv, norm in stage:
                x = nnx.relu(norm(conv(x)))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = self.dropout1(nnx.relu(self.hidden1(jnp.mean(x, axis=(1, 2)))))
        x = self.dropout2(nnx.relu(self.hidden2(x)))
        return self.head(x)


class WideBlock(nnx.Module):
    def __init__(self, inputs, width, strides, layers):
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, width, 3, strides)
        self.norm2 = layers.norm(width)
        self.dropout = layers.dropout(0.3)
        self.conv2 = layers.conv(width, width, 3)
        self.projects = strides != 1 or inputs != width
        if self.projects:
            self.shortcut = layers.conv(inputs, width, 1, strides)

    def __call__(self, x):
        active = nnx.relu(self.norm1(x))
        y = self.conv1(active)
        y = self.conv2(self.dropout(nnx.relu(self.norm2(y))))
        return y + (self.shortcut(active) if self.projects else x)


class WideResNet(nnx.Module):
    """Pre-activation blocks with dropout between the convs, in three stages."""

    def __init__(self, blocks, widen, classes, layers):
        self.stem = layers.conv(3, 16, 3)
        made, inputs = [], 16
        for stage in range(3):
            for index in range(blocks):
                width = 16 * widen * 2**stage
                made.append(WideBlock(inputs, width, 2 if stage and not index else 1, layers))
                inputs = width
        self.blocks = nnx.List(made)
        self.norm = layers.norm(inputs)
        self.head = layers.linear(inputs, classes)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(jnp.maximum(self.norm(x), 0), axis=(1, 2)))


class DenseLayer(nnx.Module):
    def __init__(self, inputs, growth, layers):
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, 4 * growth, 1)
        self.norm2 = layers.norm(4 * growth)
        self.conv2 = layers.conv(4 * growth, growth, 3)

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nnx.Module):
    """Concatenating layers, with a transition between stages."""

    def __init__(self, sizes, growth, classes, layers):
        channels = 2 * growth
        self.stem = layers.conv(3, channels, 3)
        steps = []
        for stage, size in enumerate(sizes):
            if stage:
                steps.append(
                    nnx.List([layers.norm(channels), layers.conv(channels, channels // 2, 1)])
                )
                channels //= 2
            for _ in range(size):
                steps.append(DenseLayer(channels, growth, layers))
                channels += growth
        self.steps = nnx.List(steps)
        self.norm = layers.norm(channels)
        self.head = layers.linear(channels, classes)

    def __call__(self, x):
        x = self.stem(x)
        for step in self.steps:
            if isinstance(step, DenseLayer):
                x = step(x)
            else:
                norm, conv = step
                x = nnx.avg_pool(conv(nnx.relu(norm(x))), (2, 2), strides=(2, 2))
        return self.head(jnp.mean(nnx.relu(self.norm(x)), axis=(1, 2)))
