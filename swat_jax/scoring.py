"""Scores of a run: of every epoch that is evaluated, and those at its end."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import statistics
from collections.abc import Iterable
from typing import Any

import jax

from swat_jax import flops, method, pruning
from swat_jax.feed import Feed, Inputs
from swat_jax.step import Trainer, TrainState


@dataclasses.dataclass
class Report:
    """What a run adds up for its result; part of every checkpoint's position."""

    # Wall time up to the last checkpoint, of all processes of the run one after the other. The
    # final scores are not in it: they may be asked for again, and the figure must not grow then.
    seconds: float = 0.0
    rates: list[float] = dataclasses.field(default_factory=list)  # images/s between two logs
    final_loss: float | None = None
    flop_reduction: float = 0.0  # sum over the measurements, percent
    measurements: int = 0
    dropped: float = 0.0  # the most in any measurement


def evaluate_epoch(
    trainer: Trainer,
    state: TrainState,
    feed: Feed,
    report: Report,
) -> dict[str, float]:
    """Scores under exact masks, and the sparsity of a training batch."""
    params = trainer.prune(state)
    test = evaluate(trainer, feed.evaluation("test"), params, state["batch_stats"])
    scores = {f"test_{name}": value for name, value in test.items()}
    if trainer.info.num_holdout:
        held = evaluate(trainer, feed.evaluation("holdout"), params, state["batch_stats"])
        scores |= {f"holdout_{name}": value for name, value in held.items()}
    measured = _measure(trainer, state, feed)
    report.flop_reduction += measured.flop_reduction
    report.measurements += 1
    report.dropped = max(report.dropped, measured.dropped)
    return scores | {
        "weight_sparsity": measured.weight_sparsity,
        "activation_sparsity": measured.activation_sparsity,
        "dropped_activations": measured.dropped,
        "training_flop_reduction": report.flop_reduction / report.measurements,
    }


def final_result(
    trainer: Trainer,
    state: TrainState,
    feed: Feed,
    report: Report,
) -> dict[str, Any]:
    """What ``result.json`` holds: the scores of the weights at the end, and the run's figures."""
    pruned = trainer.prune(state)
    candidates = {
        "test_accuracy": trainer.mask_as_stored(state),
        "pruned_test_accuracy": pruned,
        "dense_master_accuracy": state["params"],
    }
    result: dict[str, Any] = {}
    for name, params in candidates.items():
        scores = evaluate(trainer, feed.evaluation("test"), params, state["batch_stats"])
        result[name] = scores["accuracy"]
        result[name.replace("accuracy", "top5_accuracy")] = scores["top5_accuracy"]
    measured = _measure(trainer, state, feed)
    zeros, _ = pruning.count_zeros(trainer.layers, pruned)
    weights = sum({layer.path: layer.weights for layer in trainer.layer_table}.values())
    config, info = trainer.config, trainer.info
    planned = flops.sparsities(trainer.layer_table, config.sparsity)
    device = trainer.mesh.devices.flat[0]
    return result | {
        "final_loss": report.final_loss,
        "weight_sparsity": zeros / weights,
        "activation_sparsity": measured.activation_sparsity,
        "dropped_activations": max(report.dropped, measured.dropped),
        "training_flop_reduction": report.flop_reduction / max(report.measurements, 1),
        "planned_training_flop_reduction": flops.training_flop_reduction(
            trainer.layer_table, planned.weight, planned.activation
        ),
        "seconds": report.seconds,
        # The median does not see the few stretches that compile.
        "images_per_second": statistics.median(report.rates) if report.rates else None,
        "steps": int(state["step"]),
        "dataset": config.dataset,
        "network": config.model.name,
        "method": method.label(config.sparsity),
        "seed": config.seed,
        "num_classes": info.num_classes,
        "class_names": list(info.class_names),
        "image_shape": list(info.image_shape),
        "layers": measured.layers,
        "device": f"{trainer.mesh.size} x {device.device_kind} ({device.platform})",
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
        },
    }


def evaluate(
    trainer: Trainer, batches: Iterable[Inputs], params: Any, batch_stats: Any
) -> dict[str, float]:
    """Scores of weights, as they are, in the dense network.

    Args:
      trainer: from `training_setup.make_trainer`.
      batches: images and labels, as `step.put_batch` makes them.
      params: weights.
      batch_stats: running averages of batch norm.

    Returns:
      ``loss`` (mean cross-entropy), ``accuracy`` (top-1) and ``top5_accuracy``, as fractions.
    """
    sums: dict[str, float] = {"count": 0, "loss": 0, "correct": 0, "correct_top5": 0}
    pending = [trainer.eval_step(params, batch_stats, *inputs) for inputs in batches]
    for values in jax.device_get(pending):
        for name, value in values.items():
            sums[name] += float(value)
    return {
        "loss": sums["loss"] / sums["count"],
        "accuracy": sums["correct"] / sums["count"],
        "top5_accuracy": sums["correct_top5"] / sums["count"],
    }


@dataclasses.dataclass(frozen=True)
class _Measured:
    layers: dict[str, dict[str, float]]
    weight_sparsity: float
    activation_sparsity: float
    dropped: float  # values that had to be kept but found no room, summed over layers
    flop_reduction: float


def _measure(trainer: Trainer, state: TrainState, feed: Feed) -> _Measured:
    """Zeros in weights and saved inputs, as one training batch has them."""
    table = trainer.layer_table
    found = jax.device_get(trainer.measure(state, *feed.sample))
    weight = {layer.path: 0.0 for layer in table}
    activation = dict(weight)
    dropped = 0.0
    for path, (zeros, saved_zeros, lost) in found.items():
        weight[path], activation[path] = float(zeros), float(saved_zeros)
        dropped += float(lost)
    return _Measured(
        layers={
            path: {"weight_sparsity": weight[path], "activation_sparsity": activation[path]}
            for path in found
        },
        weight_sparsity=flops.mean_weight_sparsity(table, weight) / 100,
        activation_sparsity=flops.mean_activation_sparsity(table, activation) / 100,
        dropped=dropped,
        flop_reduction=flops.training_flop_reduction(table, weight, activation),
    )
