"""When thresholds are recomputed, and what stands in for them in between.

Exact SWAT recomputes every threshold at every step. The paper's runs recompute at every P-th
step and reuse the old ones between (section 4, "Top-K selection"): then thresholds are state.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from swat_jax.errors import UsageError
from swat_jax.sparsity.varying import varying_like


def check_period(every_steps: int, argument: str = "threshold_every_steps") -> int:
    """``every_steps`` itself, or a `UsageError` if it is no whole number of at least 1."""
    if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
        raise UsageError(f"{argument} must be a whole number of steps >= 1, got {every_steps!r}")
    return every_steps


def is_refresh_step(
    step_in_epoch: jax.Array | int,
    epoch: jax.Array | int,
    *,
    every_steps: int,
    exact_epochs: int = 0,
) -> jax.Array | bool:
    """Whether thresholds are recomputed at this step.

    Args:
      step_in_epoch: counted from 0 in every epoch.
      epoch: counted from 0.
      every_steps: the period P; 1 is exact SWAT.
      exact_epochs: in the first epochs thresholds are recomputed at every step.

    Example:
      >>> [is_refresh_step(step, 3, every_steps=2) for step in range(4)]
      [True, False, True, False]
    """
    due = step_in_epoch % check_period(every_steps) == 0
    return due | (epoch < exact_epochs)


def refresh(
    is_refresh: jax.Array | bool, stored: jax.Array, compute: Callable[[], jax.Array]
) -> jax.Array:
    """``compute()`` at a refresh step, else ``stored``; the work is skipped where it can be.

    No gradient flows through a threshold.

    Args:
      is_refresh: scalar boolean, possibly traced.
      stored: the threshold in use, which also fixes the type of the result.
      compute: makes the new threshold.
    """

    def fresh() -> jax.Array:
        return lax.stop_gradient(compute()).astype(stored.dtype)

    if isinstance(is_refresh, bool):
        return fresh() if is_refresh else stored
    stored = varying_like(stored, jax.eval_shape(fresh))
    return lax.cond(is_refresh, fresh, lambda: stored)
