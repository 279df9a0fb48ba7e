"""Models that know nothing of SWAT, and the same ones written with SWAT layers by hand."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax import SwatConv, SwatLinear


class Block(nnx.Module):
    """A residual block with a list, a dict and an attribute that is no layer."""

    def __init__(self, conv, channels, *, rngs):
        self.convs = nnx.List([conv(channels, channels, (3, 3), rngs=rngs) for _ in range(2)])
        self.norms = nnx.Dict({name: nnx.BatchNorm(channels, rngs=rngs) for name in ("one", "two")})
        self.scale = 0.5

    def __call__(self, x):
        y = nnx.relu(self.norms["one"](self.convs[0](x)))
        return nnx.relu(x + self.scale * self.norms["two"](self.convs[1](y)))


class Net(nnx.Module):
    """Nested and shared modules, dilation, groups, dropout, a linear layer without a bias."""

    def __init__(self, conv=nnx.Conv, linear=nnx.Linear, stem=nnx.Conv, *, rngs):
        self.stem = stem(3, 8, (3, 3), rngs=rngs)
        self.block = Block(conv, 8, rngs=rngs)
        self.again = self.block
        self.wide = conv(
            8, 16, (3, 3), strides=2, feature_group_count=2, kernel_dilation=2, rngs=rngs
        )
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.heads = nnx.Dict({"a": linear(16, 5, use_bias=False, rngs=rngs)})

    def __call__(self, x):
        x = self.again(self.block(nnx.relu(self.stem(x))))
        x = nnx.relu(self.wide(x)).mean(axis=(1, 2))
        return self.heads["a"](self.drop(x))


def stock(seed=0):
    return Net(rngs=nnx.Rngs(seed))


def by_hand(seed=0, **sparse):
    """`Net` of SWAT layers: what `sparsify` has to come to; the stem stays dense."""
    conv = functools.partial(SwatConv, **sparse)
    options = {name: value for name, value in sparse.items() if name != "granularity"}
    linear = functools.partial(SwatLinear, **options)
    return Net(conv, linear, nnx.Conv, rngs=nnx.Rngs(seed))


X = jax.random.normal(jax.random.key(7), (4, 8, 8, 3))
LABELS = jnp.arange(4) % 5
