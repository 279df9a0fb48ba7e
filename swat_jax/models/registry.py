"""The networks by name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from flax.typing import Dtype

from swat_jax.errors import UsageError, did_you_mean
from swat_jax.models import init
from swat_jax.models.densenet import DenseNet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.layer_types import LayerTypes
from swat_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from swat_jax.models.vgg import STAGE_SIZES as VGG_STAGE_SIZES
from swat_jax.models.vgg import VGG
from swat_jax.models.wide_resnet import WideResNet


@dataclasses.dataclass(frozen=True)
class _Network:
    """How to build one network.

    Attributes:
      module: its class.
      arguments: what sets it apart from others of the class.
      factory: options of the layer factory (see `LayerFactory`).
      dropout_rate: its own rate; None: it has no dropout.
    """

    module: Callable[..., nnx.Module]
    arguments: Mapping[str, Any]
    factory: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropout_rate: float | None = None


def _small_resnet(block: type[BasicBlock] | type[Bottleneck], *stage_sizes: int) -> _Network:
    arguments = {"block": block, "stage_sizes": stage_sizes}
    return _Network(ResNet, arguments, {"conv_bias": True})


def _imagenet_resnet(widen: int) -> _Network:
    arguments = {
        "block": Bottleneck,
        "stage_sizes": (3, 4, 6, 3),
        "widen": widen,
        "stem": "7x7",
    }
    return _Network(ResNet, arguments, {"conv_init": init.kaiming_normal_fan_out()})


def _wide_resnet(depth: int, widen: int) -> _Network:
    factory = {"conv_init": init.kaiming_normal_fan_out(), "zero_linear_bias": True}
    return _Network(WideResNet, {"depth": depth, "widen": widen}, factory, dropout_rate=0.3)


def _densenet(growth: int, *stage_sizes: int) -> _Network:
    return _Network(DenseNet, {"growth": growth, "stage_sizes": stage_sizes})


_NETWORKS: dict[str, _Network] = {
    "resnet8": _Network(
        ResNet,
        {"block": BasicBlock, "stage_sizes": (1, 1, 1), "widths": (24, 48, 96)},
        {"conv_bias": True},
    ),
    **{
        f"vgg{depth}": _Network(VGG, {"stage_sizes": sizes}, {"conv_bias": True}, dropout_rate=0.5)
        for depth, sizes in VGG_STAGE_SIZES.items()
    },
    "resnet18": _small_resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _small_resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _small_resnet(Bottleneck, 3, 4, 6, 3),
    "resnet101": _small_resnet(Bottleneck, 3, 4, 23, 3),
    "wrn16_8": _wide_resnet(16, 8),
    "wrn28_10": _wide_resnet(28, 10),
    "densenet121": _densenet(32, 6, 12, 24, 16),
    "densenet161": _densenet(48, 6, 12, 36, 24),
    "densenet169": _densenet(32, 6, 12, 32, 32),
    "densenet201": _densenet(32, 6, 12, 48, 32),
    "imagenet_resnet50": _imagenet_resnet(1),
    "imagenet_wrn50_2": _imagenet_resnet(2),
}


def names() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_NETWORKS)


def check(name: str, dropout_rate: float | None = None) -> None:
    """Refuses what `create` would refuse, without building anything.

    Args:
      name: one of `names()`.
      dropout_rate: replaces the network's own rate; None keeps it.

    Raises:
      UsageError: unknown name; a rate out of range; dropout for a network that has none.
    """
    if name not in _NETWORKS:
        near = did_you_mean(name, _NETWORKS.keys())
        known = ", ".join(_NETWORKS)
        raise UsageError(f"config.model.name: no network {name!r}; known: {known}{near}")
    if _NETWORKS[name].dropout_rate is None:
        if dropout_rate:
            raise UsageError(
                f"config.model.dropout_rate: {name} has no dropout, got {dropout_rate}; "
                "leave it unset"
            )
    elif dropout_rate is not None and not (math.isfinite(dropout_rate) and 0 <= dropout_rate < 1):
        raise UsageError(f"config.model.dropout_rate: must be in [0, 1), got {dropout_rate}")


def create(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    layers: LayerTypes | None = None,
    dtype: Dtype | None = None,
    dropout_rate: float | None = None,
    batch_norm_axis_name: str | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a network.

    Called with images (N, H, W, in_channels) it returns float32 logits (N, num_classes);
    `model.train()` and `model.eval()` switch batch norm and dropout. The first conv of every
    network is `model.stem`.

    Args:
      name: one of `names()`.
      num_classes: width of the output.
      in_channels: channels of the images.
      layers: the conv and linear classes; None: stock Flax ones.
      dtype: compute dtype (parameters are float32); None: float32.
      dropout_rate: replaces the network's own rate; None keeps it.
      batch_norm_axis_name: mapped axis over which batch statistics are averaged; None: per device.
      rngs: source of keys (`params`, and `dropout` where there is dropout).

    Raises:
      UsageError: unknown name; a number out of range; dropout for a network that has none.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = create("resnet8", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """
    check(name, dropout_rate)
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise UsageError(f"{argument}: must be at least 1, got {value}")
    network = _NETWORKS[name]
    arguments = dict(network.arguments)
    if network.dropout_rate is not None:
        rate = network.dropout_rate if dropout_rate is None else dropout_rate
        arguments["dropout_rate"] = float(rate)
    make = LayerFactory(
        layers or LayerTypes(),
        rngs=rngs,
        dtype=dtype,
        batch_norm_axis_name=batch_norm_axis_name,
        **network.factory,
    )
    return network.module(**arguments, num_classes=num_classes, in_channels=in_channels, make=make)
