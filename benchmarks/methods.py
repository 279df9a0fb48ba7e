"""The ways to train that are measured against each other; imports no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
      name: the method as it is spelled after a config's file.
      settings: further values of the config by their dotted names.
      checkpoints: whether blocks are computed again in the backward pass, by `jax.checkpoint`.
      sorts: whether thresholds come from a full sort.
      backend: the backend of the ops; None: the one that is in use.
      own_model: whether the network is that of `stock_model.py`, for `imagenet_resnet50` only.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoints: bool = False
    sorts: bool = False
    backend: str | None = None
    own_model: bool = False


_EXACT = {"sparsity.threshold_every_steps": 1}
_STOCK_AND_UNPACKED = {"sparsity.pack": False, "model.fused_batch_norm": False}

METHODS: dict[str, Method] = {
    "dense": Method("dense"),
    "dense + our batch norm": Method("dense", {"model.fused_batch_norm": True}),
    # Around every residual block or dense layer; in VGG, which has none, around every stage.
    "dense, checkpoint": Method("dense", checkpoints=True),
    # SWAT as it can be written in a few lines: exact thresholds by a full sort at every step, saved
    # activations as dense arrays with zeros, stock batch norm, no kernels.
    "naive u90": Method("u90", {**_EXACT, **_STOCK_AND_UNPACKED}, sorts=True, backend="xla"),
    "u80": Method("u80"),
    "u80 exact": Method("u80", _EXACT),
    "u90": Method("u90"),
    # The default: by the package's table, and what `swat_jax.tune` measured on this machine. All
    # others here take the plain way.
    "u90, tuned": Method("u90", {"sparsity.algorithms": "tuned"}),
    "u90 exact": Method("u90", _EXACT),
    "erk90": Method("erk90"),
    "erk90 exact": Method("erk90", _EXACT),
    "channel70": Method("channel70"),
    "channel70 exact": Method("channel70", _EXACT),
}

# `benchmarks/own_model.py`
OWN_MODEL: dict[str, Method] = {
    "u90, own model": Method("u90", own_model=True),
    "u90 exact, own model": Method("u90", _EXACT, own_model=True),
    "dense, own model": Method("dense", own_model=True),
}
