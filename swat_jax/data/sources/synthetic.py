"""Images that are made, not read: to time a training step, or to try a network without data.

Each class has a coarse pattern of colours and each image is that of its class with noise, so that a
network can learn them. The sizes are those of the data set that `config.dataset` names. Large sets
repeat one image per class. Images come ready: random_resized_crop does nothing to them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swat_jax.data.augment import AUGMENTATIONS
from swat_jax.data.in_memory import Arrays, InMemoryDataset
from swat_jax.data.interface import Split
from swat_jax.data.settings import Settings
from swat_jax.errors import UsageError


class Sizes(NamedTuple):
    """How many there are of what."""

    classes: int
    train: int
    test: int


# By `config.dataset`.
SIZES = {
    "digits": Sizes(10, 1437, 360),
    "cifar10": Sizes(10, 50_000, 10_000),
    "cifar100": Sizes(100, 50_000, 10_000),
    "imagenet": Sizes(1000, 1_281_167, 50_000),
}
OTHER = Sizes(10, 10_240, 1_024)

# A split that would need more memory repeats one image per class.
MAX_SPLIT_BYTES = 256 << 20
_GRID = 4  # cells of a class's pattern, each way
_PATTERN, _NOISE = (16, 144), 96  # pixel values: from, below; the noise is 0 to 95 on top


class RepeatedArrays(Arrays):
    """More labels than images: image i is number i modulo the size of the pool."""

    def take(self, indices: NDArray[np.int64]) -> Arrays:
        """A copy of some of them."""
        return Arrays(self.images[indices % len(self.images)], self.labels[indices])


class SyntheticDataset(InMemoryDataset):
    """An `InMemoryDataset` that may repeat images."""

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """See `Dataset.arrays`."""
        images, labels = super().arrays(split)
        if len(images) != len(labels):
            raise UsageError(
                f"config.data.on_device: {len(labels)} synthetic images of this size are too "
                "many; set --config.data.on_device=False"
            )
        return images, labels


def load(settings: Settings) -> SyntheticDataset:
    """Makes the images.

    Args:
      settings: checked config.

    Raises:
      UsageError: a hold-out is asked of a set that repeats its images; the batch is too large.
    """
    sizes = SIZES.get(settings.title, OTHER)
    if settings.augmentation not in AUGMENTATIONS:
        settings = dataclasses.replace(settings, augmentation="none")
    rng = np.random.default_rng(sizes.classes)
    grids = rng.integers(
        *_PATTERN, (sizes.classes, _GRID, _GRID, settings.channels), dtype=np.uint8
    )
    train = _make(rng, grids, sizes.train, settings.image_size)
    if settings.holdout and isinstance(train, RepeatedArrays):
        raise UsageError(
            f"config.data.holdout: must be 0 for synthetic images of {settings.image_size} pixels "
            f"(they repeat), got {settings.holdout}"
        )
    return SyntheticDataset(
        settings,
        name="synthetic",
        class_names=tuple(str(label) for label in range(sizes.classes)),
        train=train,
        test=_make(rng, grids, sizes.test, settings.image_size),
    )


def _make(
    rng: np.random.Generator, grids: NDArray[np.uint8], count: int, image_size: int
) -> Arrays:
    """Images of all classes in turn: noise over enlarged grids."""
    labels = np.arange(count, dtype=np.int32) % len(grids)
    cells = np.arange(image_size) * _GRID // image_size
    image_bytes = image_size * image_size * grids.shape[-1]
    made = count if count * image_bytes <= MAX_SPLIT_BYTES else len(grids)
    shape = (made, image_size, image_size, grids.shape[-1])
    images = rng.integers(0, _NOISE, shape, dtype=np.uint8)
    for label, grid in enumerate(grids):
        images[label :: len(grids)] += grid[cells][:, cells]
    return Arrays(images, labels) if made == count else RepeatedArrays(images, labels)
