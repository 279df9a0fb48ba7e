"""What all data sets do alike: splits, steps, shares of processes, padding."""

import abc
from collections.abc import Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from swat_jax.data import order
from swat_jax.data.interface import PADDING_LABEL, Batch, Info, Split
from swat_jax.data.settings import Settings
from swat_jax.data.stream import stream
from swat_jax.errors import UsageError


class BaseDataset(abc.ABC):
    """A `Dataset`; subclasses read images.

    Attributes:
      settings: checked config.
      info: facts about the data set.
    """

    def __init__(self, settings: Settings, info: Info) -> None:
        if settings.batch_size > info.num_train:
            raise UsageError(
                f"config.batch_size: must be at most the {info.num_train} training images of "
                f"{info.name}, got {settings.batch_size}"
            )
        for split, count in (("training", info.num_train), ("test", info.num_test)):
            if not count:
                raise UsageError(f"config.data: {info.name} has no {split} images")
        self.settings = settings
        self.info = info

    def train(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `Dataset.train`."""
        settings = self.settings
        steps = self.info.num_train // settings.batch_size
        if not 0 <= start_step <= steps:
            raise UsageError(f"start_step: must be 0 to {steps}, got {start_step}")
        permutation = order.epoch_order(settings.seed, epoch, self.info.num_train)
        share = self._share(settings.batch_size)

        def make_batch(step: int) -> Batch:
            first = step * settings.batch_size
            rng = order.augmentation_rng(settings.seed, epoch, step)
            return self._train_batch(permutation[first + share.start : first + share.stop], rng)

        return stream(make_batch, start_step, steps, settings.workers)

    def evaluate(self, split: Split) -> Iterator[Batch]:
        """See `Dataset.evaluate`."""
        size = self._size(split)
        batch = self.settings.eval_batch_size
        share = self._share(batch)

        def make_batch(step: int) -> Batch:
            first = step * batch
            indices = np.arange(first + share.start, min(first + share.stop, size))
            return _pad(self._eval_batch(split, indices), share.stop - share.start)

        return stream(make_batch, 0, -(-size // batch), self.settings.workers)

    def _size(self, split: Split) -> int:
        info = self.info
        sizes = {"train": info.num_train, "holdout": info.num_holdout, "test": info.num_test}
        if split not in get_args(Split):
            raise UsageError(f"split: must be one of {', '.join(sizes)}, got {split!r}")
        if split == "holdout" and not info.num_holdout:
            raise UsageError(
                "config.data.holdout: nothing is held out of the training set; set a fraction, "
                "such as --config.data.holdout=0.1"
            )
        return sizes[split]

    def _share(self, batch_size: int) -> slice:
        """The rows of a batch that are this process's."""
        share = batch_size // self.settings.process_count
        first = self.settings.process_index * share
        return slice(first, first + share)

    @abc.abstractmethod
    def _train_batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """Augmented training images of this process.

        Args:
          indices: (B,) into the training split.
          rng: random numbers of the whole batch; draw for all of it and take this process's part.
        """

    @abc.abstractmethod
    def _eval_batch(self, split: Split, indices: NDArray[np.int64]) -> Batch:
        """Images of a split, not augmented; `indices` may be empty."""

    @abc.abstractmethod
    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """See `Dataset.arrays`."""


def _pad(batch: Batch, size: int) -> Batch:
    image, label = batch["image"], batch["label"]
    missing = size - len(label)
    if not missing:
        return batch
    return {
        "image": np.pad(image, ((0, missing), (0, 0), (0, 0), (0, 0))),
        "label": np.pad(label, (0, missing), constant_values=PADDING_LABEL),
    }
