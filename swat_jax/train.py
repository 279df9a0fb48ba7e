"""Training from a config to a hard-pruned, evaluated network; read it from top to bottom.

The config is checked, and compared with that of the workdir, before anything is opened, computed
or written. Then resuming goes in this order: the data are opened, the networks are built, the
newest complete checkpoint replaces the initial state, metrics beyond it are dropped, and the data
go on at its epoch and step. All randomness is a function of seed and step, so a resumed run
computes what an uninterrupted one would have. Other data than those of the checkpoint are
refused as far as their numbers and shapes show it.

An epoch is saved before it is scored: whatever goes wrong with the test set costs no training, and
the run that goes on from there begins with the scores that are missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from swat_jax import (
    checkpoint,
    data,
    data_parallel,
    dispatch,
    flops,
    metrics,
    same_run,
    scoring,
    step,
    training_setup,
)
from swat_jax.data import Info
from swat_jax.errors import RunError, UsageError
from swat_jax.feed import Resident, Stream, total_steps
from swat_jax.step import Trainer, TrainState

# How many of a run's last rates its images per second are the median of.
_MOST_RATES = 1000

# What of a state does not fit another number of devices.
_OF_DEVICES = ("activation_thresholds",)

# Makes XLA choose the same deterministic GPU algorithms in every process.
DETERMINISTIC_FLAGS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def set_deterministic_flags() -> None:
    """Adds `DETERMINISTIC_FLAGS`; XLA reads them once, when the first device is used."""
    present = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{present} {DETERMINISTIC_FLAGS}".strip()


def train_and_evaluate(config: Any, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates.

    Writes to ``workdir``: ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``
    and, at the end, ``result.json``.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      workdir: the run's folder; made where it is missing.

    Returns:
      The contents of ``result.json``. Accuracies and sparsities are fractions.

    Raises:
      UsageError: a request that cannot be met; nothing was computed.
      RunError: the loss is not finite, or the disk is full; the last checkpoint is good.

    Example:
      >>> from swat_jax import config_file
      >>> config = config_file.load("configs/digits.py:u90")
      >>> config.max_steps = 2
      >>> result = train_and_evaluate(config, "run")
      >>> result["steps"]
      2
    """
    started = time.monotonic()
    _check(config)
    plain = json.loads(json.dumps(config.to_dict()))
    workdir = Path(workdir)
    _check_workdir(workdir, plain)
    mesh = data_parallel.make_mesh(config.devices)
    training_setup.check(config, mesh)
    data_parallel.connect(mesh)
    dataset = data.load(
        config, process_index=jax.process_index(), process_count=jax.process_count()
    )
    trainer, make_state = training_setup.make_trainer(config, dataset.info, mesh)
    trainer, notes = training_setup.choose_algorithms(trainer)
    best = config.checkpoint.select == "best_holdout"
    feed = (Resident if config.data.on_device else Stream)(trainer, dataset)
    report = scoring.Report()

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            checkpoint.Checkpointer(
                workdir / "checkpoints",
                keep=config.checkpoint.keep,
                config=plain,
                best_metric="holdout_accuracy" if best else None,
            )
        )
        state = make_state()
        restored = checkpointer.restore(state, refresh=_OF_DEVICES)
        if restored is not None:
            _check_same_data(restored.position, dataset.info, checkpointer.directory)
            state = _resumed(trainer, restored)
            report = dataclasses.replace(report, **restored.position["report"])
        done = 0 if restored is None else restored.step
        scored = restored is not None and bool(restored.metrics)
        total = total_steps(trainer)

        if jax.process_index() == 0:
            metrics.write_json(workdir / "config.json", plain)
        writer = stack.enter_context(_open_writer(workdir))
        if writer is not None:
            writer.truncate(done, scored=scored)
        # One of several processes speaks for all.
        silence = stack.enter_context(open(os.devnull, "w")) if jax.process_index() else None
        progress = stack.enter_context(
            metrics.Progress(
                total,
                done,
                steps_per_epoch=trainer.steps_per_epoch,
                stream=silence,
            )
        )
        for note in notes:
            progress.message(note)
        if restored is not None:
            progress.message(f"resumed at step {done} from {checkpointer.directory}")

        before = report.seconds - started
        pending: list[step.Metrics] = []
        logged, since = done, time.monotonic()
        while True:
            if not scored and _is_score_due(trainer, done):
                scores = scoring.evaluate_epoch(trainer, state, feed, report)
                progress.message(_epoch_line(-(-done // trainer.steps_per_epoch), scores))
                if writer is not None:
                    writer.write(done, scores, kind="eval")
                report.seconds = before + time.monotonic()
                checkpointer.score(done, _position(trainer, report), scores)
                since = time.monotonic()  # the rate is that of training alone
            if done >= total:
                break
            state, values, count = feed.advance(state, done)
            done, scored = done + count, False
            pending.append(values)
            epoch, rest = divmod(done, trainer.steps_per_epoch)
            epoch_end = rest == 0 or done == total
            save_now = (
                done == total
                or _is_multiple(done, config.checkpoint.every_steps)
                or (rest == 0 and _is_multiple(epoch, config.checkpoint.every_epochs))
                or (best and _is_score_due(trainer, done))  # the best may be any that has a score
            )
            if epoch_end or save_now or done - logged >= config.log.every_steps:
                means = _means(pending)  # waits for the steps
                rate = (done - logged) * config.batch_size / (time.monotonic() - since)
                report.rates = [*report.rates, rate][-_MOST_RATES:]
                pending, logged, since = [], done, time.monotonic()
                if not math.isfinite(means["loss"]):
                    what = f"the loss is {means['loss']} at step {done}"
                    raise RunError(_not_finite(what, checkpointer))
                report.final_loss = means["loss"]
                progress.update(done, loss=means["loss"], accuracy=means["accuracy"], rate=rate)
                if writer is not None:
                    writer.write(done, means)
            if (epoch_end or save_now) and not trainer.is_finite(state):
                # The loss was that of the weights before; a checkpoint of these could not go on.
                what = f"the weights are not finite after step {done}"
                raise RunError(_not_finite(what, checkpointer))
            if save_now:
                report.seconds = before + time.monotonic()
                checkpointer.save(done, state, _position(trainer, report))
                since = time.monotonic()

        if best:
            chosen = checkpointer.restore(state, best=True, refresh=_OF_DEVICES)
            if chosen is not None:
                state = _resumed(trainer, chosen)
                progress.message(f"final scores are of step {chosen.step}, best on the holdout")
        result = scoring.final_result(trainer, state, feed, report)

    if jax.process_index() == 0:
        metrics.write_json(workdir / "result.json", result)
    return result


def layer_table(config: Any, result: dict[str, Any]) -> str:
    """The per-layer table of a finished run: what was asked for beside what was measured."""
    table = flops.network_table(
        config.model.name,
        num_classes=result["num_classes"],
        image_shape=tuple(result["image_shape"]),
    )
    wanted = flops.sparsities(table, config.sparsity)
    rows = []
    for layer in {layer.path: layer for layer in table}.values():
        measured = result["layers"].get(layer.path, {})
        rows.append(
            metrics.LayerRow(
                layer.path,
                layer.kernel_shape,
                wanted.weight[layer.path],
                measured.get("weight_sparsity"),
                wanted.activation[layer.path],
                measured.get("activation_sparsity"),
            )
        )
    return metrics.layer_table(rows)


def _position(trainer: Trainer, report: scoring.Report) -> dict[str, Any]:
    """What a checkpoint holds besides arrays. The place in the data is a function of its step."""
    return {"data": _facts(trainer.info), "report": dataclasses.asdict(report)}


def _facts(info: Info) -> dict[str, Any]:
    """What the steps of a run depend on; the path to the data may change."""
    return {
        "training images": info.num_train,
        "images held out": info.num_holdout,
        "image shape": list(info.image_shape),
        "classes": info.num_classes,
    }


def _check_same_data(position: dict[str, Any], info: Info, where: Path) -> None:
    """Refuses to go on with other data than those of the checkpoint."""
    saved, facts = position.get("data", {}), _facts(info)
    differences = [name for name in saved if saved[name] != facts[name]]
    if differences:
        found = "; ".join(f"{x}: {facts[x]}, were {saved[x]}" for x in differences)
        raise UsageError(
            f"config.data: not the data of the checkpoints in {where}: {found}; give the same "
            "data, or use another --workdir"
        )


def _is_score_due(trainer: Trainer, done: int) -> bool:
    epoch, rest = divmod(done, trainer.steps_per_epoch)
    at_epoch = done > 0 and rest == 0 and _is_multiple(epoch, trainer.config.eval.every_epochs)
    return at_epoch or done >= total_steps(trainer)


def _resumed(trainer: Trainer, restored: checkpoint.Restored) -> TrainState:
    state = dict(restored.state)
    if restored.refreshed:
        # Another number of devices: every threshold is recomputed at the next step.
        stale = np.ones((), bool)
        state["stale"] = jax.device_put(stale, trainer.replicated)
    return state


def _check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Refuses a workdir that is no folder, cannot be written or belongs to another run."""
    # Of a workdir that is yet to be made, the folder that it will be made in.
    present = next(path for path in (workdir, *workdir.absolute().parents) if os.path.lexists(path))
    if not present.is_dir():
        raise UsageError(f"--workdir must be a folder, got {workdir}: {present} is none")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {workdir} cannot be written: no permission in {present}")
    file = workdir / "config.json"
    is_saved = bool(checkpoint.complete_steps(workdir / "checkpoints"))
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # The config is the first file that a run writes, and every checkpoint holds it too.
        left = [name for name in ("metrics.jsonl", "result.json") if (workdir / name).exists()]
        if left and not is_saved:
            raise UsageError(
                f"--workdir: {workdir} holds {' and '.join(left)}, but neither config.json nor a "
                "checkpoint to go on from; use another --workdir, or move what is there away"
            ) from None
        return
    except OSError as error:
        raise UsageError(f"--workdir: cannot read {file}: {error.strerror}") from error
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        remedy = ", or delete that file: the checkpoints hold the config too" if is_saved else ""
        raise UsageError(
            f"--workdir: {file} is not the config of a run; use another --workdir{remedy}"
        )
    same_run.check_same_run(saved, config, where=f"--workdir {workdir}")


def _check(config: Any) -> None:
    """Refuses what no later check would catch before the work starts."""
    select = config.checkpoint.select
    if select not in ("last", "best_holdout"):
        raise UsageError(
            f"config.checkpoint.select must be 'last' or 'best_holdout', got {select!r}"
        )
    if select == "best_holdout" and not config.data.holdout:
        raise UsageError(
            "config.checkpoint.select 'best_holdout' needs config.data.holdout above 0: "
            "the part of the training set to choose by"
        )
    for key in ("max_steps", "steps_per_dispatch", "devices"):
        value = config[key]
        if value is not None and (isinstance(value, bool) or value < 1):
            raise UsageError(f"config.{key} must be a whole number >= 1, got {value!r}")
    dispatch.check(config.sparsity.algorithms)
    missing = DETERMINISTIC_FLAGS not in os.environ.get("XLA_FLAGS", "")
    if config.deterministic and missing and jax.default_backend() == "gpu":
        raise UsageError(
            "config.deterministic needs the environment variable "
            f"XLA_FLAGS='{DETERMINISTIC_FLAGS}' before JAX starts"
        )


def _open_writer(workdir: Path) -> Any:
    if jax.process_index() == 0:
        return metrics.MetricsWriter(workdir)
    return contextlib.nullcontext()


def _is_multiple(number: int, of: int) -> bool:
    return of > 0 and number % of == 0


def _means(pending: list[step.Metrics]) -> dict[str, float]:
    fetched = jax.device_get(pending)
    return {
        name: float(np.mean(np.concatenate([values[name] for values in fetched])))
        for name in fetched[0]
    }


def _epoch_line(epoch: int, scores: dict[str, float]) -> str:
    dropped = scores["dropped_activations"]
    return (
        f"epoch {epoch}: test accuracy {scores['test_accuracy']:.2%} (pruned)"
        f"  zeros in weights {scores['weight_sparsity']:.1%}"
        f", in saved activations {scores['activation_sparsity']:.1%}"
        f"  training FLOPs saved so far {scores['training_flop_reduction']:.1f} %"
        + (f"  {math.ceil(dropped)} values to be saved found no room" if dropped else "")
    )


def _not_finite(what: str, checkpointer: checkpoint.Checkpointer) -> str:
    steps = checkpointer.steps()
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was saved"
    return (
        f"{what}; {kept}; lower config.optimizer.learning_rate, or set config.precision to float32"
    )
