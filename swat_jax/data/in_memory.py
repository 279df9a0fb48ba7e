"""Data sets that fit into memory: uint8 arrays of equally large images."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from swat_jax.data import augment, stratify
from swat_jax.data.base import BaseDataset
from swat_jax.data.interface import Batch, Info, Split
from swat_jax.data.settings import Settings
from swat_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images with their labels.

    Attributes:
      images: uint8 (N, H, W, C).
      labels: int32 (N,).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]

    def take(self, indices: NDArray[np.int64]) -> "Arrays":
        """A copy of some of them."""
        return Arrays(self.images[indices], self.labels[indices])


class InMemoryDataset(BaseDataset):
    """A `Dataset` over arrays; batches are cut and augmented as a whole.

    Args:
      settings: checked config.
      name: for messages.
      class_names: one per class.
      train: the training set; `settings.holdout` of it is held out.
      test: the test set.

    Raises:
      UsageError: image size or channels are not those of the config; batch or hold-out too large.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        class_names: tuple[str, ...],
        train: Arrays,
        test: Arrays,
    ) -> None:
        check_image_shape(name, train.images.shape[1:], settings)
        held_out = stratify.part_size(settings.holdout, len(train.labels))
        self._splits: dict[str, Arrays] = {"train": train, "test": test}
        if held_out:
            kept, chosen = stratify.stratified(train.labels, held_out)
            self._splits |= {"train": train.take(kept), "holdout": train.take(chosen)}
        info = Info(
            name=name,
            num_classes=len(class_names),
            image_shape=(settings.image_size, settings.image_size, settings.channels),
            num_train=len(train.labels) - held_out,
            num_holdout=held_out,
            num_test=len(test.labels),
            mean=settings.mean,
            std=settings.std,
            class_names=class_names,
        )
        super().__init__(settings, info)

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """See `Dataset.arrays`."""
        self._size(split)
        return self._splits[split].images, self._splits[split].labels

    def _train_batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        batch = self._splits["train"].take(indices)
        kind = self.settings.augmentation
        if kind == "none":
            return {"image": batch.images, "label": batch.labels}
        batch_size = self.settings.batch_size
        drawn = augment.draw(rng, batch_size, kind).rows(self._share(batch_size))
        return {"image": augment.apply(batch.images, drawn), "label": batch.labels}

    def _eval_batch(self, split: Split, indices: NDArray[np.int64]) -> Batch:
        batch = self._splits[split].take(indices)
        return {"image": batch.images, "label": batch.labels}


def check_image_shape(name: str, shape: tuple[int, ...], settings: Settings) -> None:
    """Compares the shape of images with what the config says.

    Args:
      name: the data set, for the message.
      shape: height, width, channels.
      settings: checked config.

    Raises:
      UsageError: they differ.
    """
    height, width, channels = shape
    if (height, width) != (settings.image_size, settings.image_size):
        raise UsageError(
            f"config.data.image_size: the images of {name} are {height}x{width} pixels, "
            f"got {settings.image_size}"
        )
    if channels != settings.channels:
        raise UsageError(
            f"config.data.mean: the images of {name} have {channels} channel(s), got "
            f"{settings.channels} number(s)"
        )
