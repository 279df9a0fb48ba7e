"""Order and random numbers of the host path: pure functions of seed, epoch and step."""

import numpy as np
from numpy.typing import NDArray

# Streams that must not share random numbers.
_SHUFFLE, _AUGMENT = 0, 1


def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the training images.

    Args:
      seed: `config.seed`.
      epoch: from 0.
      size: number of training images.

    Returns:
      A permutation of 0 to size - 1.
    """
    return np.random.default_rng((seed, _SHUFFLE, epoch)).permutation(size)


def augmentation_rng(seed: int, epoch: int, step: int) -> np.random.Generator:
    """The random numbers that augment the batch of one step, the same on every process.

    Args:
      seed: `config.seed`.
      epoch: from 0.
      step: from 0, within the epoch.
    """
    return np.random.default_rng((seed, _AUGMENT, epoch, step))
