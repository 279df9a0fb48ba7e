"""What all SWAT layers have in common: how much they keep, and by which thresholds.

Linear layers and masks of channels, filters or vectors are cheap, and their weights are always
exact, whatever the period of thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from swat_jax import kernels
from swat_jax.activations import Activation
from swat_jax.algorithms import PLAIN, Algorithms
from swat_jax.layer_state import (
    ActivationThreshold,
    MeasuredSparsity,
    NextWeightThreshold,
    Threshold,
    ThresholdAge,
    WeightBudget,
    WeightThreshold,
)
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import packing, thresholds, top_k
from swat_jax.sparsity.top_k import Count

# Inputs that are less sparse than this are not packed: it would save no memory.
LEAST_PACKED_SPARSITY = 0.15

# What a SWAT layer has besides the attributes of the stock layer.
SPARSE_ATTRIBUTES = (
    *("granularity", "pack", "algorithms", "deterministic", "measure"),
    *("weight_sparsity", "activation_sparsity", "threshold_every_steps"),
    *("weight_budget", "weight_threshold", "activation_threshold", "threshold_age"),
    *("next_weight_threshold", "measured_sparsity"),
)


class SwatLayer(nnx.Module):
    """What both layers share: how many values are kept, and which thresholds are in use."""

    kernel: nnx.Param[jax.Array]
    next_weight_threshold: NextWeightThreshold | None

    # Whether thresholds are recomputed at every step whatever the period.
    always_exact: ClassVar[bool] = False

    def start(
        self,
        *,
        granularity: str,
        weight_sparsity: float,
        activation_sparsity: float | None,
        threshold_every_steps: int,
        pack: bool | None,
        algorithms: Algorithms = PLAIN,
        dynamic_budget: bool = False,
    ) -> None:
        """Adds what a stock layer has not: see `SPARSE_ATTRIBUTES`."""
        self.granularity = granularities.check(granularity)
        self.pack = kernels.packs() if pack is None else pack
        self.algorithms = algorithms
        self.deterministic = False
        self.measure = False
        self.set_sparsity(
            weight_sparsity=weight_sparsity,
            activation_sparsity=(
                weight_sparsity if activation_sparsity is None else activation_sparsity
            ),
            threshold_every_steps=threshold_every_steps,
            dynamic_budget=dynamic_budget,
        )

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by `flax.nnx.view`: training mode (False) or evaluation mode (True)."""
        if deterministic is not None:
            self.deterministic = deterministic

    def set_sparsity(
        self,
        *,
        weight_sparsity: float,
        activation_sparsity: float,
        threshold_every_steps: int = 1,
        dynamic_budget: bool = False,
    ) -> None:
        """Sets how sparse the layer is, and makes or drops the state that this needs.

        Args:
          weight_sparsity: fraction of zeros in the weights, in ``[0, 1)``.
          activation_sparsity: fraction of zeros in the saved input, in ``[0, 1)``. With a dynamic
            budget it follows the weights' instead.
          threshold_every_steps: steps between recomputed thresholds; 1 is exact.
          dynamic_budget: whether the number of kept weights is state that may change.

        Raises:
          UsageError: if one of them is out of range.
        """
        keep = top_k.keep_count(weight_sparsity, self._units, argument="weight_sparsity")
        top_k.check_sparsity(activation_sparsity, "activation_sparsity")
        period = thresholds.check_period(threshold_every_steps)
        self.weight_sparsity, self.activation_sparsity = weight_sparsity, activation_sparsity
        self.threshold_every_steps = period
        reused = period > 1 and not self.always_exact
        # Masks of channels, filters or vectors are cheap: few units, and exact at every step.
        reused_weights = reused and self.granularity == "unstructured"
        # Wide enough to hold a threshold of any type that the input may have.
        zero = jnp.zeros((), jax.dtypes.canonicalize_dtype(jnp.float64))
        budget = WeightBudget(jnp.asarray(keep, jnp.int32)) if dynamic_budget else None
        sparse_weights = dynamic_budget or weight_sparsity > 0
        weights = WeightThreshold(zero) if reused_weights and sparse_weights else None
        sparse_activations = dynamic_budget or activation_sparsity > 0
        activations = ActivationThreshold(zero) if reused and sparse_activations else None
        stateful = weights is not None or activations is not None
        self.weight_budget = nnx.data(budget)
        self.weight_threshold = nnx.data(weights)
        self.activation_threshold = nnx.data(activations)
        self.threshold_age = nnx.data(ThresholdAge(jnp.zeros((), jnp.int32)) if stateful else None)
        self.next_weight_threshold = nnx.data(None)
        self.measured_sparsity = nnx.data(None)

    @property
    def _units(self) -> int:
        return granularities.units(self.kernel.get_value().shape, self.granularity)

    def weight_keep(self) -> Count:
        """How many units of the weights (see `granularity.units`) are kept."""
        if self.weight_budget is not None:
            return self.weight_budget[...]
        return top_k.keep_count(self.weight_sparsity, self._units)

    def activation_keep(self, size: int) -> Count:
        """How many of ``size`` input values are kept for the backward pass."""
        if self.weight_budget is not None:
            return top_k.scale_count(self.weight_budget[...], self._units, size)
        return top_k.keep_count(self.activation_sparsity, size)

    @property
    def packs(self) -> bool:
        """Whether the saved input is packed in the present mode."""
        return self.packs_in_training and not self.deterministic

    @property
    def packs_in_training(self) -> bool:
        """Whether the saved input is packed in training mode."""
        return self.pack and self.activation_sparsity >= LEAST_PACKED_SPARSITY

    @property
    def masks_own_kernel(self) -> bool:
        """Whether the next call masks weights, and takes them as they are in ``kernel``."""
        sparse = self.weight_budget is not None or self.weight_sparsity > 0
        given: Any = self
        unchanged = given.promote_dtype is keep_kernel_dtype and getattr(self, "mask", None) is None
        is_one = self.kernel.get_value().ndim == len(getattr(self, "kernel_size", ())) + 2
        return sparse and unchanged and is_one and not self.deterministic

    def activation_capacity(self, size: int) -> int:
        """Room for packed values of an input of ``size``.

        A dynamic budget may come to keep everything, so there is room for that.
        """
        if self.weight_budget is not None:
            return size
        return packing.capacity(top_k.keep_count(self.activation_sparsity, size), size)

    def keep_threshold(self, limit: jax.Array) -> None:
        """Takes the threshold that its input was packed with, if it reuses thresholds."""
        if self.activation_threshold is not None:
            stored = self.activation_threshold[...]
            self.activation_threshold[...] = limit.astype(stored.dtype)

    def selection(self, given: Activation, x: jax.Array, kernel: jax.Array) -> dict[str, Any]:
        """The arguments that say to `functional` what is kept, after a refresh if one is due.

        And what computes it, in training.

        Args:
          given: the input as it came.
          x: the input as the product takes it.
          kernel: the weights.
        """
        weight_keep = self.weight_keep()
        if self.deterministic:
            return {"weight_keep": weight_keep, "activation_sparsity": 0.0}
        activation_keep = self.activation_keep(x.size)
        selection: dict[str, Any] = {"algorithms": self.algorithms}

        scores = granularities.score(kernel, self.granularity)
        if self.next_weight_threshold is not None:
            selection["weight_threshold"] = self.next_weight_threshold[...]
            self.next_weight_threshold = nnx.data(None)
        elif self.weight_threshold is None:
            selection["weight_keep"] = weight_keep
        else:
            selection["weight_threshold"] = self._refresh(
                self.weight_threshold, scores, weight_keep
            )
        if given.packed is None and self.packs:
            packed, limits = kernels.select(x, selection_for([self], [activation_keep], x))
            self.keep_threshold(limits[0])
            given = Activation(given.x, packed, limits[0])
        if given.packed is not None:
            # Who packed it has refreshed the threshold.
            selection |= {"packed": given.packed, "activation_threshold": given.threshold}
        elif self.activation_threshold is None:
            selection["activation_keep"] = activation_keep
        else:
            selection["activation_threshold"] = self._refresh(
                self.activation_threshold, x, activation_keep
            )
        if self.threshold_age is not None:
            self.threshold_age[...] = (self.threshold_age[...] + 1) % self.threshold_every_steps
        if self.measure:
            self.measured_sparsity = nnx.data(self._measured(x, kernel, selection))
        return selection

    def _measured(
        self, x: jax.Array, kernel: jax.Array, selection: dict[str, Any]
    ) -> MeasuredSparsity:
        """What the masks of this call let through, for which there is no gradient."""
        x, kernel, packed = lax.stop_gradient((x, kernel, selection.get("packed")))
        weight_limit = selection.get("weight_threshold")
        if weight_limit is None:
            scores = granularities.score(kernel, self.granularity)
            weight_limit = kernels.threshold(scores, selection["weight_keep"])
        limit = selection.get("activation_threshold")
        if limit is None:
            limit = kernels.threshold(x, selection["activation_keep"])
        masked = granularities.masked_weights(kernel, self.granularity, weight_limit)
        # XLA may compare values that it makes in this program before it has rounded them, and
        # the packed ones are rounded.
        kept = top_k.mask(lax.optimization_barrier(x), limit)
        dropped = jnp.float32(0)
        if packed is not None:
            held = top_k.mask(kernels.unpack(packed), limit)
            dropped = jnp.sum(kept & ~held, dtype=jnp.uint32).astype(jnp.float32)
        found = [jnp.mean(masked == 0), 1 - jnp.mean(kept), dropped]
        return MeasuredSparsity(jnp.stack(found))

    @property
    def is_due(self) -> jax.Array:
        """Whether thresholds that are state are recomputed in the next call."""
        assert self.threshold_age is not None
        return self.threshold_age[...] == 0

    def _refresh(self, stored: Threshold, x: jax.Array, keep: Count) -> jax.Array:
        stored[...] = kernels.refreshed_threshold(self.is_due, x, keep, stored[...])
        return stored[...]


def selection_for(
    readers: Sequence[Any], keeps: Sequence[Count], x: jax.Array
) -> kernels.Selection:
    """What is packed of ``x`` for SWAT layers that all reuse their thresholds, or none of them.

    Args:
      readers: the layers, one or two.
      keeps: how many values each of them keeps.
      x: their input.
    """
    first = readers[0]
    reuses = first.activation_threshold is not None
    wide = jnp.promote_types(x.dtype, jnp.float32)
    stored = [reader.activation_threshold[...] for reader in readers] if reuses else None
    return kernels.Selection(
        keep=jnp.stack([jnp.stack(top_k.words(keep)) for keep in keeps]),
        capacity=max(reader.activation_capacity(x.size) for reader in readers),
        is_refresh=first.is_due if reuses else None,
        stored=jnp.stack(stored).astype(wide) if stored else None,
    )


def keep_kernel_dtype(
    args: tuple[jax.Array, jax.Array, jax.Array | None], /, *, dtype: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Stock type promotion of (inputs, kernel, bias), but for the kernel.

    The mask is taken from the master weights; `functional` rounds what is left.
    """
    inputs, kernel, bias = args
    common = dtypes.canonicalize_dtype(*args, dtype=dtype)
    return (
        jnp.asarray(inputs, common),
        kernel,
        None if bias is None else jnp.asarray(bias, common),
    )
