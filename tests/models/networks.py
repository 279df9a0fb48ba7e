"""Layer tables and abstract models, made once and shared by the tests."""

import functools

import jax
from flax import nnx

from swat_jax import models
from swat_jax.layer_table import Layer, layer_table

# The smallest of each family: enough for what a whole family shares.
FAMILIES = ("resnet8", "vgg11", "resnet18", "resnet50", "wrn16_8", "densenet121")


def input_size(name: str) -> int:
    return 224 if name.startswith("imagenet") else 32


def num_classes(name: str) -> int:
    return 1000 if name.startswith("imagenet") else 10


@functools.cache
def table(name: str) -> tuple[Layer, ...]:
    size = input_size(name)
    return tuple(layer_table(abstract(name), (size, size, 3)))


class OneKey:
    """Stands in for `nnx.Rngs` where values do not matter: under tracing, the counter of a stream
    takes JAX 0.10 a time that grows with the square of the number of layers.
    """

    def __init__(self):
        self._key = jax.random.key(0)

    def params(self):
        return self._key


@functools.cache
def abstract(name: str) -> nnx.Module:
    has_dropout = name.startswith(("vgg", "wrn"))
    return nnx.eval_shape(
        lambda: models.create(
            name,
            num_classes=num_classes(name),
            rngs=nnx.Rngs(0) if has_dropout else OneKey(),  # pyright: ignore[reportArgumentType]
        )
    )
