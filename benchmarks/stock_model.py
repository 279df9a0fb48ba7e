"""ResNet-50 as a user writes it, with stock layers (`tests/stock_networks.py`), for the trainer."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
from flax import nnx

import swat_jax
from swat_jax import build, kernels

sys.path.append(str(pathlib.Path(__file__).parents[1]))

from tests.stock_networks import Layers, ResNet

SIZES, WIDTH = (3, 4, 6, 3), 64


class Fused(nnx.Module):
    """A network whose forward pass is fused."""

    def __init__(self, network: nnx.Module) -> None:
        self.network = network

    def __call__(self, images: jax.Array) -> jax.Array:
        return swat_jax.fuse(lambda network, images: network(images))(self.network, images)


def make(
    config: Any, *, num_classes: int, image_shape: tuple[int, int, int], rngs: nnx.Rngs
) -> nnx.Module:
    """Takes the place of `swat_jax.build.build` for ``imagenet_resnet50``.

    Dense it is as the user wrote it; sparse its conv and linear layers are SWAT layers of the
    config's sparsity, all but the first, and it is fused.
    """
    if config.model.name != "imagenet_resnet50" or image_shape[-1] != 3:
        raise ValueError(f"there is no network of stock layers like {config.model.name}")
    shared = {"rngs": rngs, "dtype": build.PRECISIONS[config.precision]}
    sparsity = config.sparsity
    if sparsity.distribution == "dense":
        return ResNet(SIZES, WIDTH, num_classes, Layers(**shared))
    stock = ResNet(SIZES, WIDTH, num_classes, Layers(**shared))
    network = swat_jax.sparsify(
        stock,
        sparsity=sparsity.weight,
        activation_sparsity=sparsity.activation,
        granularity=sparsity.granularity,
        threshold_every_steps=sparsity.threshold_every_steps,
        # Of sparsity 0 and not left as it is: so it is computed with its strides folded.
        overrides={"stem": 0.0} if sparsity.first_layer_dense else None,
        pack=build.packs(sparsity, kernels.packs()),
    )
    return Fused(network)
