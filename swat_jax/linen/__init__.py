"""SWAT for Flax Linen: `sparsify` for a module as it is, and layers for one of your own.

`sparsify` makes the `nn.Conv` and `nn.Dense` layers of any module sparse, without a change of its
code or of its parameters.

`SwatConv` and `SwatDense` take the fields of `flax.linen.Conv` and `flax.linen.Dense` plus the
sparse ones, and have the same parameters. As in `flax.linen.Dropout`, ``deterministic`` (a field,
or an argument of the call) chooses between training (False, the default) and evaluation, where
activations are dense, masks exact, and no variable changes.

With ``threshold_every_steps > 1`` the thresholds are variables of the collection ``thresholds``,
which a training step must declare mutable::

    y, updates = model.apply(variables, x, mutable=["thresholds"])
"""

from swat_jax.linen.layers import SwatConv, SwatDense
from swat_jax.linen.surgery import SparseModule, sparsify

__all__ = ["SparseModule", "SwatConv", "SwatDense", "sparsify"]
