"""SWAT: Sparse Weight Activation Training for JAX and Flax.

Models of your own: `sparsify`, `densify`, `summary` (Flax NNX), `swat_jax.linen.sparsify` (Linen).
Layers: `swat_jax.layers` (Flax NNX), `swat_jax.linen` (Flax Linen). Products with gradient
rules: `swat_conv`, `swat_linear`. Networks of stock layers: `fuse`. Training:
``python -m swat_jax.main --config FILE``.
"""

from swat_jax import export, linen
from swat_jax.budgets import update_with_budgets
from swat_jax.errors import RunError, UsageError
from swat_jax.functional import swat_conv, swat_linear
from swat_jax.fusion import fuse
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.model_summary import summary
from swat_jax.sparsity.distribution import erdos_renyi_kernel
from swat_jax.surgery import densify, sparsify

__all__ = [
    "RunError",
    "SwatConv",
    "SwatLinear",
    "UsageError",
    "densify",
    "erdos_renyi_kernel",
    "export",
    "fuse",
    "linen",
    "sparsify",
    "summary",
    "swat_conv",
    "swat_linear",
    "update_with_budgets",
]
