"""Networks of stock Flax NNX layers, by name; sparse layers enter through `LayerTypes`."""

from swat_jax.models.layer_types import LayerTypes
from swat_jax.models.registry import check, create, names

__all__ = ["LayerTypes", "check", "create", "names"]
