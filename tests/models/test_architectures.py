"""Layer lists, parameter counts and MACs against the publications, without allocating a network."""

import math

import jax
import pytest
from flax import nnx

from swat_jax import models
from tests.models.networks import FAMILIES, abstract, table

# Parameters that the networks are known to have, batch norm's scale and bias included.
# ImageNet: torchvision's resnet50 and wide_resnet50_2. DenseNet, CIFAR: pytorch-cifar. The others:
# the sum over the layer lists below plus biases and batch norm, as in the papers.
PARAMETERS = {
    "vgg11": 28_149_514,
    "vgg13": 28_334_410,
    "vgg16": 33_646_666,
    "vgg19": 38_958_922,
    # pytorch-cifar's 11,173,962 and so on, which have no conv biases, plus a bias for each channel
    "resnet18": 11_173_962 + 4_800,
    "resnet34": 21_282_122 + 8_512,
    "resnet50": 23_520_842 + 26_560,
    "resnet101": 42_512_970 + 52_672,
    "wrn16_8": 10_961_370,
    "wrn28_10": 36_479_194,
    "densenet121": 6_956_298,
    "densenet161": 26_482_378,
    "densenet169": 12_493_322,
    "densenet201": 18_104_330,
    "imagenet_resnet50": 25_557_032,
    "imagenet_wrn50_2": 68_883_240,
}
# Multiply-accumulates of one forward pass as published, to the digits given.
GMACS = {
    "imagenet_resnet50": (4.09, 2),
    "imagenet_wrn50_2": (11.40, 2),
    "wrn28_10": (5.2, 1),
    "resnet18": (0.56, 2),
    "vgg16": (0.33, 2),
}

Shape = tuple[tuple[int, ...], int]  # kernel shape, output height (1 for linear layers)


def conv(kernel: int, inputs: int, outputs: int, height: int) -> Shape:
    return (kernel, kernel, inputs, outputs), height


def vgg(*convs: tuple[int, int]) -> list[Shape]:
    shapes, inputs = [], 3
    for outputs, height in convs:
        shapes.append(conv(3, inputs, outputs, height))
        inputs = outputs
    return [*shapes, ((512, 4096), 1), ((4096, 4096), 1), ((4096, 10), 1)]


def bottlenecks(stem: Shape, sizes: tuple[int, ...], heights: tuple[int, ...], wide: int):
    """Layers of a bottleneck network in execution order, from table 1 of the ResNet paper."""
    shapes, inputs, before = [stem], 64, heights[0]
    for number, (size, height) in enumerate(zip(sizes, heights, strict=True)):
        width, outputs = 64 * 2**number, 256 * 2**number
        for index in range(size):
            inner = width * wide
            shapes.append(conv(1, inputs, inner, before))
            shapes.append(conv(3, inner, inner, height))
            shapes.append(conv(1, inner, outputs, height))
            if index == 0:
                shapes.append(conv(1, inputs, outputs, height))
            inputs, before = outputs, height
    return [*shapes, ((inputs, 10 if stem[0][0] == 3 else 1000), 1)]


def densenet(growth: int, sizes: tuple[int, ...]) -> list[Shape]:
    shapes, channels, height = [conv(3, 3, 2 * growth, 32)], 2 * growth, 32
    for number, size in enumerate(sizes):
        if number:
            shapes.append(conv(1, channels, channels // 2, height))
            channels, height = channels // 2, height // 2
        for _ in range(size):
            shapes.append(conv(1, channels, 4 * growth, height))
            shapes.append(conv(3, 4 * growth, growth, height))
            channels += growth
    return [*shapes, ((channels, 10), 1)]


RESNET18 = [
    conv(3, 3, 64, 32),
    *[conv(3, 64, 64, 32)] * 4,
    conv(3, 64, 128, 16),
    conv(3, 128, 128, 16),
    conv(1, 64, 128, 16),
    *[conv(3, 128, 128, 16)] * 2,
    conv(3, 128, 256, 8),
    conv(3, 256, 256, 8),
    conv(1, 128, 256, 8),
    *[conv(3, 256, 256, 8)] * 2,
    conv(3, 256, 512, 4),
    conv(3, 512, 512, 4),
    conv(1, 256, 512, 4),
    *[conv(3, 512, 512, 4)] * 2,
    ((512, 10), 1),
]
WRN16_8 = [
    conv(3, 3, 16, 32),
    conv(3, 16, 128, 32),
    conv(3, 128, 128, 32),
    conv(1, 16, 128, 32),
    *[conv(3, 128, 128, 32)] * 2,
    conv(3, 128, 256, 16),
    conv(3, 256, 256, 16),
    conv(1, 128, 256, 16),
    *[conv(3, 256, 256, 16)] * 2,
    conv(3, 256, 512, 8),
    conv(3, 512, 512, 8),
    conv(1, 256, 512, 8),
    *[conv(3, 512, 512, 8)] * 2,
    ((512, 10), 1),
]
VGG16 = vgg(*[(64, 32)] * 2, *[(128, 16)] * 2, *[(256, 8)] * 3, *[(512, 4)] * 3, *[(512, 2)] * 3)
VGG11 = vgg((64, 32), (128, 16), *[(256, 8)] * 2, *[(512, 4)] * 2, *[(512, 2)] * 2)
LAYERS = {
    "vgg11": VGG11,
    "vgg16": VGG16,
    "resnet18": RESNET18,
    "resnet50": bottlenecks(conv(3, 3, 64, 32), (3, 4, 6, 3), (32, 16, 8, 4), 1),
    "resnet101": bottlenecks(conv(3, 3, 64, 32), (3, 4, 23, 3), (32, 16, 8, 4), 1),
    "wrn16_8": WRN16_8,
    "densenet121": densenet(32, (6, 12, 24, 16)),
    "densenet161": densenet(48, (6, 12, 36, 24)),
    "densenet169": densenet(32, (6, 12, 32, 32)),
    "densenet201": densenet(32, (6, 12, 48, 32)),
    "imagenet_resnet50": bottlenecks(conv(7, 3, 64, 112), (3, 4, 6, 3), (56, 28, 14, 7), 1),
    "imagenet_wrn50_2": bottlenecks(conv(7, 3, 64, 112), (3, 4, 6, 3), (56, 28, 14, 7), 2),
}
# Number of convs and linears where a name says it ("layers with weights", shortcuts aside).
DEPTH = {
    "vgg11": 11,
    "vgg13": 13,
    "vgg16": 16,
    "vgg19": 19,
    "resnet8": 8,
    "resnet18": 18,
    "resnet34": 34,
    "resnet50": 50,
    "resnet101": 101,
    "wrn16_8": 16 - 2,  # a WRN's depth counts its three shortcuts and not its classifier
    "wrn28_10": 28 - 2,
    "densenet121": 121,
    "densenet161": 161,
    "densenet169": 169,
    "densenet201": 201,
    "imagenet_resnet50": 50,
    "imagenet_wrn50_2": 50,
}


def count(name: str) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract(name), nnx.Param)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert count(name) == PARAMETERS[name]


def test_resnet8_is_small():
    assert 50_000 <= count("resnet8") <= 300_000


@pytest.mark.parametrize("name", GMACS)
def test_macs(name):
    published, digits = GMACS[name]
    assert round(sum(layer.macs_forward for layer in table(name)) / 1e9, digits) == published


@pytest.mark.parametrize("name", LAYERS)
def test_layer_lists(name):
    found = [(x.kernel_shape, x.output_hw[0] if x.output_hw else 1) for x in table(name)]
    assert found == LAYERS[name]


@pytest.mark.parametrize("name", DEPTH)
def test_depth_is_what_the_name_says(name):
    assert len([x for x in table(name) if "shortcut" not in x.path]) == DEPTH[name]


def test_every_network_is_covered():
    assert set(models.names()) == {"resnet8", *PARAMETERS} == set(DEPTH)


@pytest.mark.parametrize("name", models.names())
def test_first_layer_is_the_stem_and_paths_are_unique(name):
    paths = [layer.path for layer in table(name)]
    assert paths[0] == "stem"
    assert paths[-1] == "classifier"
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "resnet50"])
def test_logits_are_float32_whatever_is_computed_in(name):
    model = nnx.eval_shape(
        lambda: models.create(name, num_classes=7, dtype="bfloat16", rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((3, 64, 64, 3), "bfloat16")
    logits, _ = jax.eval_shape(lambda s, x: _train(graph, s, x), state, images)
    assert (logits.shape, logits.dtype) == ((3, 7), "float32")
    assert all(x.dtype == "float32" for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _train(graph, state, images):
    model = nnx.merge(graph, state)
    model.train()
    return model(images), nnx.state(model, nnx.BatchStat)
