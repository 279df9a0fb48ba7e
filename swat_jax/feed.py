"""Where the batches of a run come from: the device itself, or the host.

Both have the same face: `advance` does the steps up to the next point at which the host has
something to do, `evaluation` gives the batches of a split that is scored, `sample` is the batch on
which sparsity is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from swat_jax import data, step
from swat_jax.data import Dataset, Split
from swat_jax.step import Trainer, TrainState

Inputs = tuple[jax.Array, jax.Array]


class Resident:
    """Data that live on the device: many steps in one dispatch."""

    def __init__(self, trainer: Trainer, dataset: Dataset) -> None:
        self._trainer = trainer
        self._dataset = dataset
        self._evaluation: dict[Split, list[Inputs]] = {}
        images, labels = dataset.arrays("train")
        self._images = jax.device_put(images, trainer.replicated)
        self._labels = jax.device_put(labels, trainer.replicated)
        self._epoch: int | None = None
        self._chunk = _steps_per_dispatch(trainer)

    def advance(self, state: TrainState, done: int) -> tuple[TrainState, step.Metrics, int]:
        """Does the steps up to the next point at which the host has something to do."""
        per_epoch = self._trainer.steps_per_epoch
        epoch, position = divmod(done, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._trainer.epoch_order(epoch)
        every = self._trainer.config.checkpoint.every_steps
        # Where a dispatch ends depends on the step alone, so a resumed run cuts as the first did.
        stops = [
            done + self._chunk - position % self._chunk,
            (epoch + 1) * per_epoch,
            total_steps(self._trainer),
            *([done + every - done % every] if every else []),
        ]
        count = min(stops) - done
        state, values = self._trainer.train_steps(
            state, self._images, self._labels, self._order, count
        )
        return state, values, count

    def evaluation(self, split: Split) -> Iterable[Inputs]:
        """Images and labels of a split in batches, which stay on the device like those of training.

        If they are more than those, they come from the host each time.
        """
        info = self._dataset.info
        count = {"train": info.num_train, "holdout": info.num_holdout, "test": info.num_test}[split]
        batches = _put(self._trainer, self._dataset, split)
        if count > info.num_train:
            return batches
        if split not in self._evaluation:
            self._evaluation[split] = list(batches)
        return self._evaluation[split]

    @functools.cached_property
    def sample(self) -> Inputs:
        """The batch on which sparsity is measured: the same in every process of a run."""
        batch = self._trainer.config.batch_size
        order = self._trainer.epoch_order(0)
        rows = np.asarray(order)[:batch]
        images, labels = self._images[rows], self._labels[rows]
        sharded = self._trainer.sharded
        return jax.device_put(images, sharded), jax.device_put(labels, sharded)


class Stream:
    """Data that come from the host, batch by batch."""

    def __init__(self, trainer: Trainer, dataset: Dataset) -> None:
        self._trainer = trainer
        self._dataset = dataset
        self._batches: Iterator[data.Batch] = iter(())
        self._next_step: int | None = None

    def advance(self, state: TrainState, done: int) -> tuple[TrainState, step.Metrics, int]:
        """Does one step."""
        epoch, position = divmod(done, self._trainer.steps_per_epoch)
        if position == 0 or self._next_step != done:
            self._batches = self._dataset.train(epoch, position)
        batch = next(self._batches)
        inputs = step.put_batch(self._trainer, batch["image"], batch["label"])
        self._next_step = done + 1
        state, values = self._trainer.train_step(state, *inputs)
        return state, jax.tree.map(lambda value: value[None], values), 1

    def evaluation(self, split: Split) -> Iterable[Inputs]:
        """Images and labels of a split in batches."""
        return _put(self._trainer, self._dataset, split)

    @functools.cached_property
    def sample(self) -> Inputs:
        """The batch on which sparsity is measured: the same in every process of a run."""
        batch = next(iter(self._dataset.train(0)))
        return step.put_batch(self._trainer, batch["image"], batch["label"])


def _put(trainer: Trainer, dataset: Dataset, split: Split) -> Iterator[Inputs]:
    for batch in dataset.evaluate(split):
        yield step.put_batch(trainer, batch["image"], batch["label"])


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run."""
    config = trainer.config
    steps = config.epochs * trainer.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _steps_per_dispatch(trainer: Trainer) -> int:
    """How many steps run without the host: on a CPU one, since XLA is slow in loops there."""
    chosen = trainer.config.steps_per_dispatch
    if chosen is not None:
        return chosen
    if trainer.mesh.devices.flat[0].platform == "cpu":
        return 1
    steps = trainer.steps_per_epoch
    # A divisor of the epoch means one length, so one compilation.
    divisors = [n for n in range(1, min(steps, 100) + 1) if steps % n == 0]
    return divisors[-1] if divisors[-1] >= 10 else min(steps, 50)


Feed = Resident | Stream
