"""What every data set looks like to the training loop."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "holdout", "test"]

# Label of the rows that fill up the last batch of an evaluation; their pixels are 0.
PADDING_LABEL = -1


class Batch(TypedDict):
    """This process's part of one batch.

    Attributes:
      image: uint8 (B, H, W, C), RGB or grey.
      label: int32 (B,); `PADDING_LABEL` marks rows that are no images (evaluation only).
    """

    image: NDArray[np.uint8]
    label: NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Info:
    """Facts about a data set.

    Attributes:
      name: what to call it in tables and messages.
      num_classes: labels are 0 to num_classes - 1.
      image_shape: height, width and channels of every image in a batch.
      num_train: training images, without the held-out ones.
      num_holdout: images held out of the training set (`config.data.holdout`).
      num_test: images of the test (or validation) set.
      mean: per channel, of pixel / 255.
      std: per channel, of pixel / 255.
      class_names: one per class, in the order of the labels.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    num_train: int
    num_holdout: int
    num_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


class Dataset(Protocol):
    """Batches as pure functions of the config, the epoch and the step.

    No iterator state has to be saved: to resume, ask for the epoch and the step where it stopped.
    Neither `config.data.workers` nor the number of processes changes an image or the order.
    """

    @property
    def info(self) -> Info:
        """Facts about the data set."""
        ...

    def train(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Augmented full batches of one epoch; what is left after the last one is dropped.

        Args:
          epoch: from 0; every epoch has its own order and its own augmentation.
          start_step: first step of the epoch to yield.
        """
        ...

    def evaluate(self, split: Split) -> Iterator[Batch]:
        """All images of a split once, in a fixed order, not augmented; the last batch is padded.

        Args:
          split: "test", "holdout" or "train".

        Raises:
          UsageError: "holdout" where nothing is held out.
        """
        ...

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """A whole split, not augmented, for training on the device.

        Returns:
          Images (N, H, W, C) and labels (N,).

        Raises:
          UsageError: the split is too large for that, or "holdout" where nothing is held out.
        """
        ...
