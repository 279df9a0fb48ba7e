"""SWAT: Sparse Weight Activation Training for JAX and Flax.

Models of your own: `sparsify`, `densify`, `summary` (Flax NNX), `swat_jax.linen.sparsify` (Linen).
Layers: `swat_jax.layers` (Flax NNX), `swat_jax.linen` (Flax Linen). Products with gradient
rules: `swat_conv`, `swat_linear`. Networks of stock layers: `fuse`. Training:
``python -m swat_jax.main --config FILE``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from swat_jax import linen
from swat_jax.budgets import update_with_budgets
from swat_jax.errors import RunError, UsageError
from swat_jax.functional import swat_conv, swat_linear
from swat_jax.fusion import fuse
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.model_summary import summary
from swat_jax.sparsity.distribution import erdos_renyi_kernel
from swat_jax.surgery import densify, sparsify

if TYPE_CHECKING:
    from swat_jax import export

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


def __getattr__(name: str) -> Any:
    # It is a program, too, and `python -m` warns of programs that are imported before they run.
    if name == "export":
        return importlib.import_module("swat_jax.export")
    raise AttributeError(f"module 'swat_jax' has no attribute {name!r}")
