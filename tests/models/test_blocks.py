"""Blocks against the same thing written out in numpy: where norm, ReLU and shortcut sit."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from swat_jax import models
from swat_jax.models import densenet, pooling, resnet, vgg, wide_resnet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.layer_types import LayerTypes
from swat_jax.norm_relu import branch


@pytest.fixture
def make():
    return LayerFactory(LayerTypes(), rngs=nnx.Rngs(0), conv_bias=True)


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(2, 6, 6, 8)).astype("float32")


def randomise(model) -> Any:
    """Random batch norm, so that nothing cancels, and evaluation mode."""
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name in ("scale", "bias", "mean", "var"):
                variable = getattr(module, name)
                variable[...] = rng.uniform(0.5, 1.5, variable[...].shape).astype("float32")
    model.eval()
    return model


def conv(layer, x, strides=1) -> Any:
    """NHWC convolution in numpy: a sum over the taps of the kernel."""
    kernel = np.asarray(layer.kernel[...])
    pad = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = x.shape[1:3]
    y = 0
    for i, j in np.ndindex(kernel.shape[:2]):
        y = y + padded[:, i : i + height : strides, j : j + width : strides] @ kernel[i, j]
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def norm(layer, x):
    mean, var, scale, bias = (
        np.asarray(v[...]) for v in (layer.mean, layer.var, layer.scale, layer.bias)
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def relu(x):
    return np.maximum(x, 0)


def run(model, x):
    """The model under jit: one compilation instead of one for each operation."""
    graph, state = nnx.split(model)
    return jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x)


def run_block(block, x):
    """A block of a residual network alone, between a branch and nothing."""
    graph, state = nnx.split(block)

    def forward(state, x):
        block = nnx.merge(graph, state)
        return block(branch(x, **resnet.reads(block)), {"dense": True}).dense

    return jax.jit(forward)(state, x)


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("width", "strides"), [(8, 1), (12, 1), (8, 2)])
def test_basic_block(make, images, width, strides):
    block = randomise(resnet.BasicBlock(8, width, strides=strides, make=make))
    y = relu(norm(block.norm1, conv(block.conv1, images, strides)))
    y = norm(block.norm2, conv(block.conv2, y))
    skip = images
    if (width, strides) != (8, 1):
        skip = norm(block.shortcut_norm, conv(block.shortcut, images, strides))
    check(run_block(block, images), relu(y + skip))


def test_bottleneck_has_its_stride_in_the_3x3(make, images):
    block = randomise(resnet.Bottleneck(8, 4, strides=2, make=make, widen=2))
    y = relu(norm(block.norm1, conv(block.conv1, images)))
    y = relu(norm(block.norm2, conv(block.conv2, y, 2)))
    y = norm(block.norm3, conv(block.conv3, y))
    skip = norm(block.shortcut_norm, conv(block.shortcut, images, 2))
    check(run_block(block, images), relu(y + skip))
    assert block.conv2.kernel[...].shape == (3, 3, 8, 8)


@pytest.mark.parametrize(("width", "strides"), [(8, 1), (16, 2)])
def test_wide_block_activates_first(make, images, width, strides):
    block = randomise(wide_resnet.WideBlock(8, width, strides=strides, dropout_rate=0.3, make=make))
    active = relu(norm(block.norm1, images))
    y = conv(block.conv2, relu(norm(block.norm2, conv(block.conv1, active, strides))))
    skip = images if strides == 1 else conv(block.shortcut, active, strides)
    check(run(block, images), y + skip)


def test_wide_block_drops_between_its_convs(make, images):
    block = wide_resnet.WideBlock(8, 8, strides=1, dropout_rate=0.5, make=make)
    product = jax.lax.conv_general_dilated
    graph, state = nnx.split(block)

    @jax.jit
    def forward(state, x):
        seen = []
        block = nnx.merge(graph, state)

        def record(x, *args, **kwargs):
            seen.append(x)
            return product(x, *args, **kwargs)

        block.conv2.conv_general_dilated = record
        block.train()
        block(x)
        return seen[0], nnx.state(block)

    first, state = forward(state, images)
    second, _ = forward(state, images)
    assert 0.6 < np.mean(first == 0) < 0.9  # half of the ReLU's zeros and half of the rest
    assert not np.array_equal(first, second)


def test_dense_layer_joins_its_input(make, images):
    layer = randomise(densenet.DenseLayer(8, 4, make))
    y = conv(layer.conv1, relu(norm(layer.norm1, images)))
    y = conv(layer.conv2, relu(norm(layer.norm2, y)))
    check(run(layer, images), np.concatenate([images, y], axis=-1))


def test_transition_halves(make, images):
    layer = randomise(densenet.Transition(8, 4, make))
    y = conv(layer.conv, relu(norm(layer.norm, images)))
    check(run(layer, images), y.reshape(2, 3, 2, 3, 2, 4).mean(axis=(2, 4)))


def test_vgg_unit(make, images):
    unit = randomise(vgg.ConvUnit(8, 4, make))
    graph, state = nnx.split(unit)

    def forward(state, x):
        unit = nnx.merge(graph, state)
        return unit(branch(x, readers=[unit.conv]), {"dense": True}).dense

    found = jax.jit(forward)(state, images)
    check(found, relu(norm(unit.norm, conv(unit.conv, images))))


def test_stem_pooling_has_padding_that_never_wins():
    x = -np.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    pooled = jax.jit(pooling.max_three_by_two)(x)[0, :, :, 0]
    np.testing.assert_array_equal(pooled, [[-1, -2], [-5, -6]])


def test_resnet8_written_out():
    model: Any = models.create("resnet8", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    randomise(model)
    images = np.random.default_rng(2).normal(size=(4, 8, 8, 1)).astype("float32")
    y = relu(norm(model.stem_norm, conv(model.stem, images)))
    for stage, strides in ((model.stage1, 1), (model.stage2, 2), (model.stage3, 2)):
        (block,) = stage
        z = relu(norm(block.norm1, conv(block.conv1, y, strides)))
        z = norm(block.norm2, conv(block.conv2, z))
        if strides == 2:
            y = norm(block.shortcut_norm, conv(block.shortcut, y, 2))
        y = relu(y + z)
    features = y.mean(axis=(1, 2))
    logits = features @ np.asarray(model.classifier.kernel[...]) + model.classifier.bias[...]
    check(run(model, images), logits)


def test_training_moves_the_running_averages_and_evaluation_does_not():
    model: Any = models.create("resnet8", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    images = np.random.default_rng(2).normal(3, 1, (4, 8, 8, 1)).astype("float32")

    def averages(training):
        graph, state = nnx.split(model)

        def forward(state, x):
            model = nnx.merge(graph, state)
            model.train() if training else model.eval()
            model(x)
            return model.stem_norm.mean[...]

        return jax.jit(forward)(state, images)

    check(averages(training=True), 0.1 * conv(model.stem, images).mean(axis=(0, 1, 2)))
    np.testing.assert_array_equal(averages(training=False), 0)
