"""SGD as PyTorch writes it, and the learning rate of a run: config -> optax.

The papers' recipes are stated for PyTorch's SGD, so that is what is built here. With gradient
`g`, weights `w`, momentum buffer `v` (zero at the start) and learning rate `lr`:

    g = g + weight_decay * w          (weights that decay)
    v = momentum * v + g
    w = w - lr * v                    (Nesterov: w - lr * (g + momentum * v))

Weight decay therefore enters the momentum buffer, and the learning rate does not.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from swat_jax.errors import UsageError

SCHEDULES = ("step", "cosine", "constant")


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int, epochs: float
) -> optax.Schedule:
    """The learning rate of every optimizer step.

    `step` multiplies the rate by `factor` at the first step of each epoch in `milestones` (epochs
    count from 0: milestone 50 means that epochs 0 to 49 run at the full rate). `cosine` falls from
    the full rate at the end of the warm-up to zero at the end of training, step by step.

    The warm-up is a straight line in steps: with `W = warmup_epochs * steps_per_epoch`, step
    `s < W` runs at `(s + 1) / W` of the rate, so that the first step moves the weights and step
    `W - 1` has the full rate. `learning_rate` is the rate itself; it is not scaled by the batch
    size here.

    Args:
      config: `config.optimizer`: `learning_rate` and `schedule` (`name`, `milestones`, `factor`,
        `warmup_epochs`).
      steps_per_epoch: optimizer steps in one epoch, at least 1.
      epochs: the length of the whole run in epochs.

    Returns:
      A function from the step (an int or a traced integer, from 0) to a float32 scalar.

    Raises:
      UsageError: a value is out of its range, or the schedule's name is unknown.

    Example:
      >>> config = ConfigDict(dict(learning_rate=0.1, schedule=dict(
      ...     name="step", milestones=(2,), factor=0.1, warmup_epochs=0)))
      >>> schedule = learning_rate_schedule(config, steps_per_epoch=10, epochs=4)
      >>> float(schedule(19)), float(schedule(20))
      (0.10000000149011612, 0.009999999776482582)
    """
    rate, schedule = config.learning_rate, config.schedule
    _check_number("learning_rate", rate, low=0, open_low=True)
    _check_number("schedule.warmup_epochs", schedule.warmup_epochs, low=0)
    if schedule.name not in SCHEDULES:
        raise UsageError(
            f"config.optimizer.schedule.name is {schedule.name!r}; allowed: {', '.join(SCHEDULES)}"
        )
    if schedule.warmup_epochs and schedule.warmup_epochs >= epochs:
        raise UsageError(
            f"config.optimizer.schedule.warmup_epochs is {schedule.warmup_epochs}, but the run has "
            f"{epochs} epochs and would never reach its learning rate; set it below "
            f"{epochs}, or to 0"
        )
    warmup = max(1, round(schedule.warmup_epochs * steps_per_epoch))
    total = round(epochs * steps_per_epoch)

    if schedule.name == "step":
        boundaries, values = _step_table(schedule, rate, steps_per_epoch)
    else:
        boundaries, values = np.zeros(0, np.int32), np.array([rate], np.float32)
    # Without a warm-up, `warmup` is 1 only so that nothing divides by zero: step 0 has (0 + 1) / 1.
    cosine_start = warmup if schedule.warmup_epochs else 0

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        # A table made on the host: each value is the float32 nearest to the exact one.
        # An empty table would reach `shard_map` as an array without elements, of which the
        # partitioner of JAX 0.11.2 dies.
        place = jnp.sum(step >= boundaries) if boundaries.size else 0
        value = jnp.asarray(values)[place]
        if schedule.name == "cosine":
            share = (step - cosine_start) / max(1, total - cosine_start)
            value = value * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
        return value * jnp.minimum(1, (step + 1) / warmup).astype(jnp.float32)

    return learning_rate


def create(
    config: ConfigDict, schedule: optax.Schedule, params: Mapping[Any, Any]
) -> optax.GradientTransformation:
    """SGD with momentum, weight decay inside the gradient, as PyTorch has it.

    Args:
      config: `config.optimizer`: `momentum`, `nesterov`, `weight_decay`, `decay_batch_norm`.
      schedule: step -> learning rate, from `learning_rate_schedule`.
      params: nested dict of the weights, any leaves; only its keys are looked at.

    Returns:
      The transformation. Its `update` needs the weights: `update(gradients, state, params)`.

    Raises:
      UsageError: a value is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from swat_jax import recipe
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> optimizer = create(recipe.base().optimizer, lambda step: 0.1, params)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    """
    _check_number("momentum", config.momentum, low=0, high=1)
    _check_number("weight_decay", config.weight_decay, low=0)
    if config.nesterov and not config.momentum:
        raise UsageError(
            "config.optimizer.nesterov is True with config.optimizer.momentum 0; "
            "set a momentum above 0, or nesterov to False"
        )
    mask = None if config.decay_batch_norm else decay_mask(params)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.trace(decay=config.momentum, nesterov=config.nesterov),
        optax.scale_by_learning_rate(schedule),
    )


def decay_mask(params: Mapping[Any, Any]) -> dict[Any, Any]:
    """Which weights decay when batch norm does not.

    Batch norm parameters are the leaves called `scale` and the `bias` beside one. The biases of
    convolutions and linear layers decay, as they do in PyTorch's reference recipe.

    Args:
      params: nested dict of the weights.

    Returns:
      A dict of the same structure with True where weight decay applies.

    Example:
      >>> decay_mask({"conv": {"kernel": 1, "bias": 1}, "norm": {"scale": 1, "bias": 1}})
      {'conv': {'kernel': True, 'bias': True}, 'norm': {'scale': False, 'bias': False}}
    """
    exempt = ("scale", "bias") if "scale" in params else ()
    return {
        key: decay_mask(value) if isinstance(value, Mapping) else key not in exempt
        for key, value in params.items()
    }


def momentum_buffer(state: optax.OptState) -> Any:
    """The momentum buffer, for SWAT-M's redistribution.

    Args:
      state: the optimizer state of a transformation made by `create`.

    Returns:
      A tree of the weights' structure and shapes; after `update` it holds this step's buffer `v`,
      weight decay included.

    Raises:
      ValueError: the state has no such buffer, or several.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.TraceState))
    buffers = [node.trace for node in nodes if isinstance(node, optax.TraceState)]
    if len(buffers) != 1:
        raise ValueError(
            f"expected one momentum buffer in the optimizer state, found {len(buffers)}"
        )
    return buffers[0]


def _step_table(
    schedule: ConfigDict, rate: float, steps_per_epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """First steps of each stretch (int32), and the rates before, between and after (float32)."""
    milestones = tuple(schedule.milestones)
    for milestone in milestones:
        _check_number("schedule.milestones", milestone, low=0, open_low=True)
    if list(milestones) != sorted(set(milestones)):
        raise UsageError(
            f"config.optimizer.schedule.milestones is {milestones}; give epochs in rising order"
        )
    _check_number("schedule.factor", schedule.factor, low=0, open_low=True)
    boundaries = np.array([round(m * steps_per_epoch) for m in milestones], np.int32)
    values = np.array(
        [rate * schedule.factor**count for count in range(len(milestones) + 1)], np.float32
    )
    return boundaries, values


def _check_number(
    key: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False
) -> None:
    """Refuses what is not a number in [low, high), or in (low, high) with `open_low`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value < high and not (open_low and value == low):
        return
    floor = f"above {low}" if open_low else f"at least {low}"
    ceiling = "" if high == math.inf else f" and below {high}"
    raise UsageError(f"config.optimizer.{key} is {value!r}; give a number {floor}{ceiling}")
