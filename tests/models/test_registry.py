"""Creation by name: injected layer types, initialisation, options and refusals."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import models
from swat_jax.errors import UsageError
from tests.models import networks


def create(name, **kwargs) -> Any:
    return models.create(name, **{"num_classes": 10, "rngs": nnx.Rngs(0), **kwargs})


def abstract(name, **kwargs) -> Any:
    return nnx.eval_shape(lambda: create(name, **kwargs)) if kwargs else networks.abstract(name)


def layers_of(model, kind) -> dict[str, Any]:
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, kind)
    }


class MarkedConv(nnx.Conv):
    def __init__(self, *args, mark, **kwargs):
        super().__init__(*args, **kwargs)
        self.mark = mark


class MarkedLinear(nnx.Linear):
    pass


@pytest.mark.parametrize("name", networks.FAMILIES)
def test_every_conv_and_linear_comes_from_the_layer_types(name):
    types = models.LayerTypes(functools.partial(MarkedConv, mark=3), MarkedLinear)
    model = abstract(name, layers=types)
    marked = layers_of(model, (MarkedConv, MarkedLinear))
    assert set(marked) == {layer.path for layer in networks.table(name)}
    assert set(marked) == set(layers_of(model, (nnx.Conv, nnx.Linear)))


@pytest.mark.parametrize("name", [*networks.FAMILIES, "imagenet_resnet50"])
def test_convs_have_biases_in_vgg_and_small_resnets_only(name):
    with_bias = name.startswith(("vgg", "resnet"))
    convs = layers_of(networks.abstract(name), nnx.Conv)
    assert {conv.use_bias for conv in convs.values()} == {with_bias}


def test_batch_norm_gets_axis_name_momentum_and_dtype():
    model = abstract("wrn16_8", batch_norm_axis_name="data", dtype=jnp.bfloat16)
    norms = layers_of(model, nnx.BatchNorm)
    assert len(norms) == 13  # before each of 12 convs, and before the classifier
    seen = {(x.axis_name, x.momentum, x.epsilon, x.dtype) for x in norms.values()}
    assert seen == {("data", 0.9, 1e-5, jnp.bfloat16)}


def check_uniform(values):
    """Values that should be uniform on (-1, 1): range, and moments within five standard errors."""
    values = np.concatenate([np.ravel(value) for value in values])
    assert np.all(np.abs(values) <= 1)
    assert np.abs(values).max() > 0.9
    error = 5 / math.sqrt(len(values))
    assert abs(values.mean()) < error
    assert abs(values.std() - 1 / math.sqrt(3)) < error


def test_small_networks_start_uniform_by_fan_in():
    layers = layers_of(create("resnet8"), (nnx.Conv, nnx.Linear)).values()
    bounds = [1 / math.sqrt(math.prod(layer.kernel[...].shape[:-1])) for layer in layers]
    for layer, bound in zip(layers, bounds, strict=True):
        check_uniform([layer.kernel[...] / bound])
    check_uniform([layer.bias[...] / bound for layer, bound in zip(layers, bounds, strict=True)])


@pytest.mark.parametrize("name", ["wrn16_8", "imagenet_resnet50"])
def test_wide_and_imagenet_networks_start_kaiming_normal_by_fan_out(name):
    convs = ("stem", "stage1/0/conv2", "stage2/0/shortcut")

    @jax.jit  # makes what is returned only, not the whole network
    def parameters():
        model = create(name)
        layers = layers_of(model, nnx.Conv)
        kernels = [layers[path].kernel[...] for path in convs]
        return kernels, model.classifier.kernel[...], model.classifier.bias[...]

    kernels, kernel, bias = jax.tree.map(np.asarray, parameters())
    for conv in kernels:
        kh, kw, _, outputs = conv.shape
        expected = math.sqrt(2 / (kh * kw * outputs))
        assert abs(conv.std() / expected - 1) < 5 / math.sqrt(conv.size)
        assert np.abs(conv).max() > 2.3 * expected  # normal, neither uniform nor truncated at 2
    check_uniform([kernel * math.sqrt(len(kernel))])
    assert np.all(bias == 0) == (name == "wrn16_8")


def test_dropout_rates():
    def rates(name, **kwargs):
        return {x.rate for x in layers_of(abstract(name, **kwargs), nnx.Dropout).values()}

    assert rates("wrn16_8") == {0.3}
    assert rates("vgg16") == {0.5}
    assert rates("vgg16", dropout_rate=0.25) == {0.25}
    assert rates("wrn16_8", dropout_rate=0.0) == {0.0}
    assert rates("resnet18") == rates("densenet121") == rates("resnet18", dropout_rate=0.0) == set()


def test_same_key_same_network():
    one, two = create("resnet8"), create("resnet8")
    other = create("resnet8", rngs=nnx.Rngs(1))
    equal = jax.tree.map(
        lambda a, b: bool(jnp.all(a == b)), nnx.state(one, nnx.Param), nnx.state(two, nnx.Param)
    )
    assert all(jax.tree.leaves(equal))
    assert not np.array_equal(one.stem.kernel[...], other.stem.kernel[...])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet9", {}, r"config.model.name.*'resnet9'.*resnet8.*imagenet_wrn50_2"),
        ("", {}, "config.model.name"),
        ("resnet8", {"num_classes": 0}, "num_classes.*at least 1, got 0"),
        ("resnet8", {"in_channels": -1}, "in_channels.*got -1"),
        ("resnet8", {"dropout_rate": 0.1}, "resnet8 has no dropout"),
        ("vgg16", {"dropout_rate": 1.0}, r"\[0, 1\), got 1.0"),
        ("vgg16", {"dropout_rate": -0.1}, r"\[0, 1\), got -0.1"),
        ("wrn16_8", {"dropout_rate": math.nan}, r"\[0, 1\), got nan"),
    ],
)
def test_refusals(name, kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        create(name, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("vgg11", (1, 16, 32, 3)), ("densenet121", (1, 4, 8, 3)), ("resnet8", (8, 8, 3))],
)
def test_images_that_pooling_would_shrink_to_nothing_are_refused(name, shape):
    graph, state = nnx.split(abstract(name))
    with pytest.raises(UsageError, match="must be"):
        jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, jnp.zeros(shape))
