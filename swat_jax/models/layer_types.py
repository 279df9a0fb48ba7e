"""Which classes a network is built from: the one seam through which sparse layers enter."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from swat_jax.norm_relu import NormRelu


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """The constructors that a network calls for its conv and linear layers.

    Both are called with the arguments of `nnx.Conv` and `nnx.Linear`; a sparse layer that takes the
    same ones (and more, bound with `functools.partial`) can stand in their place.

    Attributes:
      conv: called as `conv(in_features, out_features, kernel_size, strides=..., ..., rngs=...)`.
      linear: called as `linear(in_features, out_features, ..., rngs=...)`.
      norm_relu: called as `norm_relu(channels, ..., rngs=...)` with the arguments of
        `nnx.BatchNorm`; what it makes is called as a `NormRelu`.
      max_pool: called as `nnx.max_pool`.
      dropout: called as `dropout(rate, rngs=rngs)`.
    """

    conv: Callable[..., Any] = nnx.Conv
    linear: Callable[..., Any] = nnx.Linear
    norm_relu: Callable[..., Any] = NormRelu
    max_pool: Callable[..., Any] = nnx.max_pool
    dropout: Callable[..., Any] = nnx.Dropout
