"""Initialisers of the networks that the paper trained (they are PyTorch's, in Flax's words)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer


def uniform_fan_in() -> Initializer:
    """Kernels U(-b, b) with b = 1/sqrt(fan_in): convs and linears of the CIFAR networks.

    A uniform variable on (-b, b) has variance b^2/3, hence the scale.
    """
    return nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def uniform_bias(fan_in: int) -> Initializer:
    """Biases U(-b, b) with b = 1/sqrt(fan_in) of the kernel that the bias belongs to.

    Args:
      fan_in: inputs of one output unit: kernel height * kernel width * input channels.
    """
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        del out_sharding  # biases are replicated
        return jax.random.uniform(key, shape, dtype or jnp.float32, -bound, bound)

    return init


def kaiming_normal_fan_out() -> Initializer:
    """Kernels N(0, 2/fan_out): the convs of the wide and of the ImageNet residual networks.

    Source: He et al., "Delving deep into rectifiers", 2015, eq. 14 (not truncated).
    """
    return nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
